"""Sources: what they find, and one line for what they do not."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from maejax.data.content import sample_of
from maejax.data.decode import BadImage
from maejax.data.scan import scan
from maejax.data.sources import ArrayRecords, Digits, Folder, make_source
from maejax.data.transforms import read_record
from maejax.errors import UsageError


def save(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def test_digits_splits_are_disjoint_and_complete():
    train, test, both = (Digits(split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1438, 359, 1797)
    assert len({s.fingerprint() for s in (train, test, both)}) == 3
    assert {train.name(i) for i in range(1438)} | {test.name(i) for i in range(359)} == {
        f"digit {i}" for i in range(1797)
    }
    assert both[0]["image"].shape == (8, 8, 1) and both[0]["image"].max() == 255 * 15 // 16 and both[0]["label"] == 0


def test_a_nested_folder_without_classes(tmp_path):
    for name in ("b.PNG", "a/x.jpg", "a/deep/er/y.webp", ".hidden/z.png", "c/.z.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a/deep/er/y.webp", "a/x.jpg", "b.PNG"]
    assert source.num_classes is None and "label" not in source[0]


def test_class_folders_give_labels_and_split_folders_are_found(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            save(tmp_path / split / name / "1.png", label)
    source = Folder(tmp_path, split="train")
    assert source.num_classes == 2 and [source[i]["label"] for i in range(2)] == [0, 1]
    assert source.classes == ("cat", "dog")
    assert len(Folder(tmp_path)) == 4
    with pytest.raises(UsageError, match="has train and val, and no 'test'; set --config.data.split and"):
        Folder(tmp_path, split="test")
    for name in ("train", "bus"):  # classes, although one is named like a split
        save(tmp_path / "vehicles" / name / "1.png")
    assert Folder(tmp_path / "vehicles", split="test").classes == ("bus", "train")


def test_fingerprint_goes_with_the_content_not_the_place(tmp_path):
    for place in ("one", "two"):
        save(tmp_path / place / "x.png")
    one, two = Folder(tmp_path / "one"), Folder(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint()
    content = bytearray((tmp_path / "two" / "x.png").read_bytes())
    content[-20] ^= 1
    (tmp_path / "two" / "x.png").write_bytes(content)  # of the same size
    assert Folder(tmp_path / "two").fingerprint() != one.fingerprint()
    save(tmp_path / "one" / "y.png")
    assert Folder(tmp_path / "one").fingerprint() != one.fingerprint()


def test_of_much_content_a_sample_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("maejax.data.content.SAMPLED", 1000)
    monkeypatch.setattr("maejax.data.content.FILES", 10)
    paths = [tmp_path / f"{i}" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 200)
    before = sample_of(paths)  # of every fourth the first half
    for name, content, seen in (("5", b"x", False), ("8", bytes([8]) * 100 + b"x", False), ("8", b"x", True)):
        (tmp_path / name).write_bytes(content.ljust(200, content[-1:]))
        assert (sample_of(paths) != before) == seen
    os.mkfifo(tmp_path / "pipe")
    assert sample_of([tmp_path / "pipe", tmp_path / "nowhere"]) == sample_of([tmp_path / "nowhere"] * 2)


def array_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records_of_images_and_of_examples(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    save(tmp_path / "x.png", 9)
    png = (tmp_path / "x.png").read_bytes()
    array_records(tmp_path / "plain.array_record", [png, png])
    plain = ArrayRecords(str(tmp_path / "plain*"))
    assert len(plain) == 2 and plain[1] == {"image": png} and plain.num_classes is None

    example = tf_example_pb2.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(png)
    example.features.feature["image/class/label"].int64_list.value.append(3)
    array_records(tmp_path / "labelled.array_record", [example.SerializeToString()])
    labelled = make_source(f"arrayrecord:{tmp_path}/labelled*", split="train")
    assert labelled[0] == {"image": png, "label": 3} and labelled.num_classes == 4


def example(*, label=None, image=None):
    from tensorflow_datasets.proto import tf_example_pb2

    record = tf_example_pb2.Example()
    if image is not None:
        record.features.feature["image"].bytes_list.value.append(image)
    if label is not None:
        record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


def test_array_records_with_bad_and_unlabelled_records(tmp_path):
    records = [example(label=1, image=b"x"), example(label=7), example(label=3, image=b"x")]
    array_records(tmp_path / "bad.array_record", records)  # the second has no image
    source = ArrayRecords(str(tmp_path / "bad*"))
    assert source.num_classes == 4
    with pytest.raises(BadImage, match="an Example with label"):
        source[1]
    array_records(tmp_path / "some.array_record", [example(label=1, image=b"x"), example(image=b"x")])
    assert ArrayRecords(str(tmp_path / "some*")).num_classes is None


def test_array_records_are_not_read_whole_to_count_their_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("maejax.data.sources.LOOKED_AT", 5)
    array_records(tmp_path / "x.array_record", [example(label=i, image=b"x") for i in range(40)])
    read = []
    get = ArrayRecords.__getitem__
    monkeypatch.setattr(ArrayRecords, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    assert ArrayRecords(str(tmp_path / "x*")).num_classes == 40
    assert read == [0, 9, 19, 29, 39]


def test_a_damaged_array_record_file_is_a_bad_image(tmp_path):
    path = tmp_path / "x.array_record"
    array_records(path, [os.urandom(200_000) for _ in range(4)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    source, causes = ArrayRecords(str(path)), []
    for i in range(4):
        try:
            read_record(source, i)
        except BadImage as error:
            causes.append(error.cause)
    assert causes == ["unreadable"]


def test_links_in_folders(tmp_path):
    save(tmp_path / "photos" / "a" / "x.png")
    save(tmp_path / "elsewhere" / "y.png")
    (tmp_path / "photos" / "a" / "up").symlink_to("..")  # a loop
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b.png").symlink_to("nowhere")
    source = Folder(tmp_path / "photos")
    assert [source.name(i) for i in range(len(source))] == ["a/x.png", "b.png", "b/y.png"]
    assert len(source.fingerprint()) == 16
    assert dict(scan(source, max_pixels=10**6).unreadable) == {"b.png": "unreadable"}


def test_sources_can_be_sent_to_workers(tmp_path):
    save(tmp_path / "x.png", 9)
    array_records(tmp_path / "x.array_record", [(tmp_path / "x.png").read_bytes()])
    for source in (Digits(split="test"), Folder(tmp_path), ArrayRecords(str(tmp_path / "*.array_record"))):
        first = source[0]
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(copy[0]["image"], first["image"])
        assert copy.fingerprint() == source.fingerprint()


def test_tfds(shared_data):
    source = make_source("tfds:cifar10", split="test", data_dir=str(shared_data / "tfds"))
    assert len(source) == 10_000 and source.num_classes == 10 and 0 <= source[5]["label"] < 10
    with pytest.raises(UsageError, match="its splits are train, test"):
        make_source("tfds:cifar10", split="nosuch", data_dir=str(shared_data / "tfds"))
    with pytest.raises(UsageError, match="there are: cifar10"):
        make_source("tfds:imagenet2012", split="train", data_dir=str(shared_data / "tfds"))


class Mine:
    """A source from outside the package."""

    num_classes = None

    def __init__(self, split):
        self.split = split


def test_a_dotted_name_is_a_source():
    assert make_source(f"{__name__}:Mine", split="x").split == "x"


@pytest.mark.parametrize(
    "spec, says",
    [
        ("nosuch/folder", "does not exist"),
        ("zip:photos.zip", "unknown scheme 'zip'; allowed are digits, a folder"),
        ("arrayrecord:/nosuch/*", "no file matches"),
        ("os.path:nosuch", "cannot be imported"),
        ("./photos:2024", "unknown scheme './photos'"),
        ("~/my.photos:x", "unknown scheme '~/my.photos'"),
        ("tfds:nosuch", "not prepared"),
        ("folder:", "no image file"),
    ],
)
def test_mistakes_are_one_line(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says) as caught:
        make_source(spec, split="train", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_scan_tells_what_is_there(tmp_path):
    save(tmp_path / "a.png", size=(10, 20))
    save(tmp_path / "b.jpg", size=(30, 20))
    save(tmp_path / "c.jpg", size=(100, 50))
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:-40])
    (tmp_path / "text.png").write_text("hello")
    found = scan(Folder(tmp_path), max_pixels=10**6)
    assert found.total == 5 and found.formats == {"JPEG": 2, "PNG": 1} and found.median_side == 20
    assert dict(found.unreadable) == {"broken.jpg": "truncated", "text.png": "not_an_image"}
    text = "\n".join(found.lines())
    assert "found 5 images" in text and "smallest 10x20, median 30x20, largest 100x50" in text
    assert "unreadable: 2" in text and "broken.jpg" in text


def test_scan_of_nothing_readable(tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(UsageError, match=r"none of the 1 image files can be read \(1 not_an_image\)"):
        scan(Folder(tmp_path), max_pixels=10**6)
    with pytest.raises(UsageError, match="no image file"):
        Folder(make_empty(tmp_path))


def make_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"

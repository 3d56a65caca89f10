"""Reports and `watch`: what a page holds, read back with a parser of its own; curves from numbers known by hand."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console as RichConsole

from maejax import config as configs
from maejax import sweep as sweeps
from maejax import visualize
from maejax.cli import main
from maejax.errors import Preempted
from maejax.metrics import Console
from maejax.overrides import override
from maejax.record import read
from maejax.reports import charts
from maejax.reports.charts import Series, chart, thin, ticks
from maejax.reports.page import page, tag, write
from maejax.sweep import Point, Request, Sweep
from maejax.watch import braille, frame, half_blocks, shades

NASTY = "<script>alert(1)</script> & \"quotes\" 'too'"
VOID = ("meta", "link", "input", "img", "br")
LOG = """\
2026-01-02 03:00:00 run       /runs/a
2026-01-02 03:00:00 data      digits: 1,438 images, id 00
2026-01-02 03:00:00 length    1,000 steps = 89 epochs, warm-up 20 steps
2026-01-02 03:00:10 step 100/1000 10%  loss 0.9000  lr 1.00e-03  |g| 1.5
2026-01-02 03:00:20 ended     SIGTERM: saved step 120; the same command goes on from there
2026-01-02 04:00:00 log_steps changed from 100 to 50
2026-01-02 04:00:00 run       /runs/a
2026-01-02 04:00:00 data      digits: 1,438 images, id 00
2026-01-02 04:00:00 length    1,000 steps = 89 epochs, warm-up 20 steps
2026-01-02 04:00:01 resuming at step 120
2026-01-02 04:00:30 step 400/1000 40%  loss 0.7000  lr 1.00e-03  |g| 1.2
2026-01-02 05:00:00 run       /runs/a
2026-01-02 05:00:00 length    1,000 steps = 89 epochs, warm-up 20 steps
2026-01-02 05:00:01 checkpoint 300 is damaged: x was changed; set aside as rejected-300
2026-01-02 05:00:02 resuming at step 200
2026-01-02 05:01:00 step 1000/1000 100%  loss 0.5000  lr 1.00e-05  |g| 1.1
2026-01-02 05:01:05 done      /runs/a at step 1000
a line without a stamp
"""


class Page(HTMLParser):
    """A page's text by section, its elements with their attributes, and whether every element is closed."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "h2":
            self._section = data
        if not {"script", "style"} & set(self._open):
            self.text[self._section] = self.text.get(self._section, "") + data + "\n"

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [a for name, a in self.elements if name == tag and attributes.items() <= a.items()]


def picture(shade: int) -> Image.Image:
    """Two images of 16x16 under one mask, reconstructed as a grey."""
    original = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
    masked = np.where(np.arange(16)[:, None, None] < 8, original, np.uint8(118))
    columns = dict(zip(visualize.TITLES, [original, masked, np.full_like(original, shade)]))
    return visualize.grid(columns, caption=f"step {shade}")


def small_config(**keys: str):
    assigned = {"image_size": "16", "model.patch": "4", "total_steps": "1000", "data.source": "digits"}
    return override(configs.default(), assigned | keys)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was interrupted, killed, and found a damaged checkpoint, written by hand."""
    folder = tmp_path / "a <run>"
    (folder / "pictures").mkdir(parents=True)
    (folder / "evals").mkdir()
    (folder / "config.json").write_text(json.dumps(configs.to_dict(small_config(base_lr="0.003"))))
    lines = [
        {
            "step": step,
            "time": 1.0,
            "train/loss": loss,
            "train/lr": 1e-3,
            "train/grad_norm": 1.0,
            "perf/img_per_sec": 100,
        }
        for step, loss in ((100, 0.9), (200, 0.8), (400, float("nan")), (1000, 0.5))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 1100, "train/lo')  # being written
    for step, top1 in ((0, 0.5), (500, 0.75), (1000, 0.875)):
        result = {"metrics": {"knn_top1": top1}, "data": "digits", "images": {"train": 1438, "test": 359}}
        (folder / "evals" / f"knn_{step}.json").write_text(json.dumps(result))
    for step in (10, 200, 1000):
        picture(step % 256).save(folder / "pictures" / f"reconstruction_{step}.png")
    (folder / "pictures" / "reconstruction_1001.png").write_bytes(b"\x89PNG half")
    bad = [{"step": 1, "name": NASTY, "cause": cause} for cause in ("truncated", NASTY, "truncated")]
    (folder / "bad_images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    (folder / "train.log").write_text(LOG)
    (folder / "command.txt").write_text(f"maejax pretrain '{NASTY}'\nmaejax pretrain '{NASTY}'\n")
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "host": NASTY, "versions": {"jax": "0.1"}}))
    return folder


def report(folder: Path) -> Page:
    assert main(["report", str(folder)]) == 0
    return Page((folder / "report.html").read_text())


def test_a_run_is_told_in_one_file(run, capsys):
    found = report(run)
    assert "report.html (0." in capsys.readouterr().out
    assert found.all("title") and "a <run>" in found.text[""] and "finished 2026-01-02 05:01" in found.text[""]
    assert "1,000\n" in found.text[""] and "of 1,000 steps" in found.text[""] and "87.50 %" in found.text[""]
    # Three starts: 20 s, 30 s and 65 s.
    assert "1m55s" in found.text[""]
    assert re.findall(r"(untrained|step \d+|[\d.]+ %)\n", found.text["Evaluations"].replace(",", "")) == [
        "untrained", "step 500", "step 1000", "50.00 %", "75.00 %", "87.50 %"
    ]  # fmt: skip
    told = found.text["Starts and faults"]
    for text in ("3 times", "SIGTERM: saved step 120", "killed without a word", "checkpoint 300 is damaged",
                 "log_steps changed from 100 to 50", "finished"):  # fmt: skip
        assert text in told, text
    assert re.findall(r"\n(\d+)\n(\d[\d,]*)\n\d+", told) == [("0", "100"), ("120", "400"), ("200", "1,000")]
    assert "truncated\n2\n" in found.text["Bad images"] and "Read 3 times" in found.text["Bad images"]
    assert "base_lr\n0.003\n0.00015" in found.text["Config"]
    assert found.text["Commands and environment"].count("maejax pretrain") == 1
    assert "# 2 times" in found.text["Commands and environment"] and "jax 0.1" in found.text["Commands and environment"]


def test_what_differs_from_the_default_is_highlighted(run):
    changed = re.findall(r'<tr class="changed"><td><code>([\w.]+)', (report(run), run / "report.html")[1].read_text())
    assert changed == ["base_lr", "image_size", "model.patch", "total_steps"]


def test_nothing_in_a_page_needs_the_network(run):
    found = report(run)
    text = (run / "report.html").read_text()
    for _, attributes in found.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http" not in text.replace("http://www.w3.org", "") and "url(" not in text and "@import" not in text


def test_what_a_run_wrote_is_escaped(run):
    found = report(run)
    assert len(found.all("script")) == 1  # its own
    for section in ("Bad images", "Commands and environment"):
        assert NASTY in found.text[section]


def test_pictures_are_there_once_and_by_step(run):
    found = report(run)
    assert [a["data-words"] for a in found.all("div", **{"class": "frame"})] == ["10", "200", "1,000"]
    slider = found.all("input", type="range")[0]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    # Two originals, two masked, and two reconstructions of each of three steps; the unfinished picture is left out.
    assert len(found.all("img")) == 2 + 2 + 3 * 2


def test_a_run_with_nothing_in_it_yet(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(small_config())))
    found = report(tmp_path)
    assert "has not started yet" in found.text[""] and found.text["Curves"].count("nothing written down yet") == 4
    assert "Reconstructions" not in found.text and "Evaluations" not in found.text


@pytest.mark.parametrize("verb", ["report", "watch"])
def test_a_folder_that_is_no_run_is_one_line(verb, tmp_path, capsys):
    flags = ["--once"] if verb == "watch" else []
    assert main([verb, str(tmp_path / "nothing"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing is n" in error and "config.json" in error
    (tmp_path / "config.json").write_text("{ broken")
    assert main([verb, str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    assert main(["report", str(run), f"--out={tmp_path}/no/where.html"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no/where.html" in error and "name another file" in error


def test_bytes_that_are_no_characters_do_not_stop_a_page(tmp_path):
    write(tmp_path / "x.html", page("x", tag("p", "a\udc80b")))
    assert ">a?b<" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    "error, told",
    [(Preempted("SIGTERM: saved step 3"), "SIGTERM: saved step 3"), (ValueError("a\nb"), "ValueError a b")],
)
def test_the_log_says_why_a_run_ended(tmp_path, capsys, error, told):
    with pytest.raises(type(error)):
        with Console(tmp_path / "train.log") as console:
            console.say("run       /runs/a")
            raise error
    lines = [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()]  # after the time
    assert lines == ["run       /runs/a", f"ended     {told}"]
    assert capsys.readouterr().out == "run       /runs/a\n"  # the terminal has it from the command line


# ---- Curves ---------------------------------------------------------------------------------------------------------


def test_a_path_from_known_numbers(monkeypatch):
    for name, value in {"WIDTH": 110, "HEIGHT": 120, "LEFT": 10, "RIGHT": 0, "TOP": 0, "BOTTOM": 20}.items():
        monkeypatch.setattr(charts, name, value)
    # 100 pixels for steps 0 to 200 and for values 0 to 4, which lie at the bottom and at the top.
    scale = charts.Scale((0, 200), (0.0, 4.0))
    points = [(0, 0.0), (50, 4.0), (100, float("nan")), (150, 1.0), (200, 2.0)]
    assert charts.path(points, scale) == "M10.0 100.0L35.0 0.0M85.0 75.0L110.0 50.0"


def test_scales_hold_everything_with_air():
    series = [Series(name="a", points=[(1, 2.0), (3, float("inf"))]), Series(name="b", points=[(5, 4.0)], spread=[1.0])]
    scale = charts.scale_of(series)
    assert scale and scale.x == (1, 5) and scale.y == pytest.approx((2 - 0.15, 5 + 0.15))
    assert charts.scale_of([Series(name="a", points=[(1, float("nan"))])]) is None


def test_ticks_are_round():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.97) == [0.2, 0.4, 0.6, 0.8] and ticks(40, 61) == [40, 45, 50, 55, 60]
    assert ticks(0, 3e-4) == [0, 1e-4, 2e-4, 3e-4] and ticks(5, 5) == [5]
    assert [charts.number(x) for x in (0.25, 3e-5, 1500, 62500, 2e6)] == ["0.25", "3e-5", "1,500", "62.5k", "2M"]


def test_thinning_keeps_ends_and_extremes():
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.normal(size=10_000))]
    points[5003] = (5003, 99.0)
    points[7001] = (7001, -99.0)
    kept = thin(points, 400)
    assert len(kept) <= 402 and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], points[5003], points[7001]} <= set(kept)
    assert thin(points[:400], 400) == points[:400]


def test_a_chart_marks_what_happened_and_tells_its_values():
    found = Page(
        page("x", chart("Loss", [Series(name="loss", points=[(0, 1.0), (10, 0.5)])], marks=[(5, "here"), (99, "no")]))
    )
    assert "here" in found.text[""] and "\nno\n" not in found.text[""]
    assert found.all("g", **{"data-name": "loss"})[0]["data-values"] == "0:1 10:0.5"
    shares = Page(page("x", chart("a", [Series(name="k", points=[(0, 0.25)])], percent=True)))
    assert shares.all("g", **{"data-name": "k"})[0]["data-values"] == "0:25"


# ---- Sweeps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(run, tmp_path):
    """Two ratios with two seeds; one point is broken, one waits."""
    workdir = tmp_path / "ratios"
    points = []
    for ratio, seed, top1 in (("0.5", 0, 0.8), ("0.5", 1, 0.9), ("0.75", 0, 0.7), ("0.75", 1, None)):
        name = f"ratio={ratio},seed={seed}"
        points.append(
            Point(name=name, workdir=workdir / name, settings={"mask.ratio": ratio}, seed=seed, steps=1000,
                  evals=("knn",), computes={"mask.ratio": ratio, "seed": seed}, arguments=("pretrain",))
        )  # fmt: skip
        if top1 is None:
            continue
        shutil.copytree(run, workdir / name)
        (workdir / name / "pictures" / "reconstruction_1001.png").unlink()
        for step in (0, 1000):
            (workdir / name / "evals" / f"knn_{step}.json").write_text(json.dumps({"metrics": {"knn_top1": top1}}))
    request = Request(config="digits.py", assignments={}, grid={"mask.ratio": ["0.5", "0.75"], "seed": ["0", "1"]})
    sweeps.write(Sweep(workdir=workdir, request=request, points=tuple(points)))
    sweeps.note_failure(workdir, points[3].name, NASTY)
    return workdir


def test_a_sweep_is_ranked_and_its_curves_are_switched(sweep, monkeypatch):
    monkeypatch.setattr("maejax.sweep.sealed_steps", lambda folder: [1000] if folder.parent.exists() else [])
    found = report(sweep)
    assert "4 points, 2 seeds each: 3 done, 1 broken" in found.text[""]
    # Mean 85 %, deviation 0.1 / sqrt(2).
    assert "85.00 % ± 7.07" in found.text["Ranking"] and NASTY in found.text["Ranking"]
    assert found.text["Ranking"].index("85.00 %") < found.text["Ranking"].index("70.00 %")
    assert "Ranked by knn_top1: never by loss" in found.text["Ranking"]
    assert [a["data-group"] for a in found.all("input", type="checkbox")] == ["0", "1"]
    losses = [a for a in found.all("g") if "series" in (a.get("class") or "") and "data-group" in a]
    assert [a["data-name"] for a in losses[:3]] == ["ratio=0.5,seed=0", "ratio=0.5,seed=1", "ratio=0.75,seed=0"]
    assert [a["data-group"] for a in losses] == ["0", "0", "1"] * 4
    figure = found.all("g", **{"data-name": "knn_top1"})[0]
    assert figure["data-values"] == "0.5:85 0.75:70"
    told = found.text["Points"]
    assert told.count("SIGTERM: saved step 120") == 3 and "broken" in told
    assert "mask.ratio" not in found.text["Config"] and "0.5, 0.75" in found.text["What was asked"]


def test_a_sweep_that_has_not_begun(sweep):
    for folder in sweep.glob("ratio=*"):
        shutil.rmtree(folder)
    found = report(sweep)
    assert "3 waiting, 1 broken" in found.text[""] and "Not ranked" in found.text["Ranking"]


def test_watch_names_what_it_cannot_do(sweep, run, capsys):
    assert main(["watch", str(sweep), "--once"]) == 2
    assert "is a sweep; watch one of the runs in it" in capsys.readouterr().err
    assert main(["watch", str(run)]) == 2  # no terminal here
    assert "--once prints one frame" in capsys.readouterr().err
    assert main(["watch", str(run), "--every=0"]) == 2
    assert "--every=0 is too often" in capsys.readouterr().err


# ---- The terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(80, 24), (120, 50), (40, 12)])
@pytest.mark.parametrize("colors", [True, False])
def test_a_frame_fits_the_terminal(run, width, height, colors):
    text = frame(read(run), width, height, colors=colors)
    lines = text.plain.split("\n")
    assert lines.pop() == "" and len(lines) <= height - 1
    assert all(len(line) <= width for line in lines)
    assert "a <run>" in lines[0] and "step 1000/1000" in lines[0]
    assert any("loss  0.5" in line for line in lines)
    if height >= 24:
        assert "original | masked | reconstruction, step 1000" in lines[-1]
        assert ("▀" in text.plain) == colors


def test_a_frame_of_a_run_that_goes_on_and_of_an_empty_one(run, tmp_path, capsys):
    log = (run / "train.log").read_text().split("2026-01-02 05:01:05")[0]
    (run / "train.log").write_text(log)
    text = frame(read(run), 80, 24, colors=False, now=datetime(2026, 1, 2, 5, 2)).plain
    assert "last heard of 1m00s ago" in text
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(small_config())))
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "not started yet" in capsys.readouterr().out


def test_watch_follows_until_it_is_interrupted(run):
    """In a terminal of its own: alternate screen, colors, a new frame when the run goes on, and a clean end."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "maejax", "watch", str(run), "--every=0.1"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)

    def until(*texts: str) -> str:
        seen = ""
        while not all(text in seen for text in texts):
            assert select.select([master], [], [], 30)[0], seen
            seen += os.read(master, 65536).decode(errors="replace")
        return seen

    def rest():
        while select.select([master], [], [], 30)[0]:
            try:
                yield os.read(master, 65536).decode(errors="replace")
            except OSError:  # so a terminal says that nobody writes to it any more
                return

    try:
        assert "\x1b[?1049h" in until("step 1000/1000", "▀", "step 1000")  # another screen, as editors have
        with (run / "metrics.jsonl").open("a") as file:  # ends the line that was not whole, and adds another
            file.write("\n" + json.dumps({"step": 1200, "train/loss": 0.25}) + "\n")
        until("step 1200/1000", "0.25")
        process.send_signal(signal.SIGINT)
        until("\x1b[?1049l")
        after = "".join(rest())  # the last frame stays on the usual screen
        assert "reconstruction, step 1000" in after and "Traceback" not in after and process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_braille_of_a_falling_line():
    # Two columns of dots a character, four rows: a line from the upper left to the lower right corner.
    assert braille([(0, 3.0), (1, 0.0)], 1, 1) == ["⢣"]
    assert braille([(0, 1.0), (10, 1.0)], 3, 1) == ["⠒⠒⠒"]  # in the middle: the second row of four
    assert braille([], 2, 2) == ["⠀⠀", "⠀⠀"]


def test_half_blocks_are_two_pixels_each():
    image = np.array([[[255, 0, 0], [1, 2, 3]], [[0, 0, 255], [4, 5, 6]]], np.uint8)
    console = RichConsole(width=20, force_terminal=True, color_system="truecolor", record=True, file=io.StringIO())
    console.print(half_blocks(image)[0])
    assert "38;2;255;0;0;48;2;0;0;255m▀" in console.export_text(styles=True)
    assert shades(np.array([[[0] * 3, [255] * 3]] * 2, np.uint8))[0].plain == " @"


def test_pictures_come_apart_as_they_were_put_together():
    sheet = np.asarray(picture(7))
    taken = visualize.tiles(sheet, (16, 16))
    assert taken.shape == (2, 3, 112, 112, 3)
    original = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
    np.testing.assert_array_equal(taken[:, 0, ::7, ::7], original)
    assert (taken[:, 2] == 7).all()
    with pytest.raises(ValueError, match="is no grid of images"):
        visualize.tiles(sheet, (16, 24))

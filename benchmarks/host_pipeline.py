"""The host's pipeline beside torchvision's on the same cores: images a second and CPU time of an image, interleaved.

    python benchmarks/host_pipeline.py FOLDER --torch=PYTHON [--windows=5] [--images=960] [--out=FILE]

FOLDER holds JPEGs; PYTHON is an interpreter with torch and torchvision (their versions stand in the results), which
maejax never needs. The comparison is MAE's own recipe: ImageFolder, RandomResizedCrop(224, (0.2, 1), bicubic), flip,
ToTensor, Normalize, DataLoader with 2 workers; maejax's batches have masks, too. Each side is a process of its own that
waits while the others run; of a window, the first batches, which were made while waiting, do not count.
CPU time is of the process with its workers: what remains comparable when a machine is shared.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

SIDES = ("torchvision", "exact", "fast", "shards", "cache", "repeats", "shards_repeats")
OURS = {  # what train_batches is given
    "exact": {}, "fast": {"fast": True}, "shards": {}, "cache": {"cache": 256}, "repeats": {"repeats": 4},
    "shards_repeats": {"repeats": 4},
}  # fmt: skip
BATCH = 48
COPIES = 4  # links to each image: enough of them for a window


def main() -> None:
    """Prints, and writes, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--torch", metavar="PYTHON", help="an interpreter with torch and torchvision; none: maejax alone"
    )
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--images", type=int, default=960, help="of a window")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--only", default=",".join(SIDES), help="some of the sides, with commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.serve:
        serve(options.serve, options.folder)
        return
    sides = [side for side in options.only.split(",") if side != "torchvision" or options.torch]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "images" / "all").mkdir(parents=True)
        for path in sorted(options.folder.rglob("*.[jJ][pP]*[gG]")):
            for copy in range(COPIES):
                (root / "images" / "all" / f"{path.stem}_{copy}.jpg").symlink_to(path.absolute())
        packing = [sys.executable, "-m", "maejax", "data", "pack", str(root / "images"), str(root / "shards")]
        subprocess.run(packing, check=True, stdout=sys.stderr)
        children = {side: Child(side, root, options) for side in sides}
        times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for window in range(options.windows):
            for side in sides if window % 2 == 0 else sides[::-1]:
                times[side].append(children[side].measure(options.images))
                print(window, side, times[side][-1], file=sys.stderr, flush=True)
        versions = {name: child.versions for name, child in children.items() if name in ("torchvision", "exact")}
        for child in children.values():
            child.close()
    result = report(times) | {"versions": versions} | vars(options) | {"folder": options.folder.name, "torch": ""}
    result |= {"load_average": [round(load, 1) for load in os.getloadavg()]}  # of what else the machine did
    result |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "processor": processor(), "out": ""}
    text = json.dumps({key: value for key, value in result.items() if value not in ("", None)}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def report(times: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians of each side, and their ratios to torchvision's of the same window."""
    sides: dict[str, dict[str, float]] = {}
    for side, windows in times.items():
        found = {key: statistics.median(window[key] for window in windows) for key in windows[0]}
        sides[side] = {"img_per_sec": round(1 / found["wall"], 1), "cpu_ms": round(1e3 * found["cpu"], 3)}
        for key, name in (("wall", "speedup"), ("cpu", "speedup_cpu")):
            if "torchvision" in times:
                ratios = [theirs[key] / ours[key] for theirs, ours in zip(times["torchvision"], windows, strict=True)]
                sides[side][name] = round(statistics.median(ratios), 2)
    return {"sides": sides}


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class Child:
    """One side, in a process that measures when it is asked to."""

    def __init__(self, side: str, root: Path, options: argparse.Namespace):
        python = options.torch if side == "torchvision" else sys.executable
        folder = root / ("shards" if side.startswith("shards") else "images")
        command = [python, __file__, str(folder), f"--serve={side}", f"--cores={options.cores}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = json.loads(self._process.stdout.readline())

    def measure(self, images: int) -> dict[str, float]:
        """Seconds of an image, by the wall's clock and of CPU."""
        self._process.stdin.write(f"{images}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


# ---- In the processes -----------------------------------------------------------------------------------------------


def serve(side: str, folder: Path) -> None:
    """Measures as often as a line comes in."""
    batches, rows = (torchvision_batches if side == "torchvision" else our_batches)(side, folder)
    for _ in range(4):
        next(batches)
    names = ("torch", "torchvision", "pillow") if side == "torchvision" else ("simplejpeg", "cykooz.resizer", "grain")
    print(json.dumps({name: importlib.metadata.version(name) for name in names}), flush=True)
    for line in sys.stdin:
        for _ in range(8):  # made while waiting
            next(batches)
        wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
        while images < int(line):
            images += len(rows(next(batches)))
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        print(json.dumps({key: value / images for key, value in seconds.items()}), flush=True)
    os._exit(0)  # workers end with it


def cpu_seconds() -> float:
    """Of this process and its children."""
    import multiprocessing

    total = 0.0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def our_batches(side, folder):
    """maejax's batches, without end, and how to get a batch's rows."""
    from maejax.allocator import keep_freed_memory

    keep_freed_memory()  # as the command line does
    from maejax.data.masking import Mask
    from maejax.data.pipeline import train_batches
    from maejax.data.sources import make_source
    from maejax.data.transforms import Augment

    transforms = [Augment(size=(224, 224)), Mask(sampler="random", grid=(14, 14), visible=49)]
    source = make_source(str(folder), split="train")
    options = dict(channels=3, max_pixels=10**8, batch_size=BATCH, seed=0, prefetch=2)
    return iter(train_batches(source, transforms, **options, **OURS[side])), lambda batch: batch["image"]


def torchvision_batches(side, folder):
    """The official recipe's batches, without end."""
    import torch

    # torchvision's wheel may be built for another torch: then its operators, which no transform needs, are missing.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    size, bicubic = 224, transforms.InterpolationMode.BICUBIC
    recipe = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    data = datasets.ImageFolder(str(folder), recipe)
    loader = torch.utils.data.DataLoader(
        data, batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )

    def endless():
        while True:
            yield from loader

    return endless(), lambda batch: batch[0]


if __name__ == "__main__":
    main()

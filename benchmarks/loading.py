"""Reading class folders: the first start decodes them, later starts map the cache.

    python benchmarks/loading.py --data_path data/cifar10-jpeg --json

Rows: real CIFAR-10 (JPEG), and a generated tree of 110,000 JPEGs of 64 pixels in 200 classes. Memory is the sum of the
resident sizes of all processes, which counts shared pages several times: an upper bound.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import harness
from utils.data.class_folders import CACHE

READ = """
import sys
sys.path.insert(0, {project!r})
import torch
from utils.data import datasets
datasets.load({name!r}, {path!r}, torch.device("cpu"))
"""


def write_tree(root, classes, train, test, size, different=500):
    """Write class folders of JPEGs in the layout of Tiny ImageNet; `different` images stand again and again."""
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(different):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for label in range(classes):
        wnid = f"n{label:08d}"
        for folder, count in ((root / "train" / wnid / "images", train), (root / "val" / wnid, test)):
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{wnid}_{number}.JPEG").write_bytes(encoded[(number * 7 + label) % different])
    return root


def processes(pid):
    """Yield `pid` and all processes below it."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from processes(int(child))


def resident(pid):
    """Return the bytes of memory of `pid` and all processes below it."""
    total = 0
    for process in processes(pid):
        with contextlib.suppress(OSError):  # it may have ended
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def start(name, path):
    """Read a data set in a new process; returns (seconds from start to end, peak bytes)."""
    program = READ.format(project=str(Path(__file__).resolve().parent.parent), name=name, path=str(path))
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f"error: reading {path} ended with {process.returncode}; its message stands above")
    return time.perf_counter() - begun, peak


def main():
    own = ("--data_path", str, "data/cifar10-jpeg", "CIFAR-10 in class folders; its cache is made anew")
    options = harness.parse(__doc__, own, pairs=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.smallest:
            cifar10 = write_tree(Path(folder) / "cifar10", classes=10, train=1, test=1, size=32, different=5)
            tree = write_tree(Path(folder) / "tree", classes=200, train=2, test=1, size=64, different=5)
            titles = "10 classes of 32 pixels", "200 classes of 64 pixels"
        else:
            cifar10 = Path(options.data_path)
            tree = write_tree(Path(folder) / "tree", classes=200, train=500, test=50, size=64)
            titles = "CIFAR-10 (JPEG), 60,000 images", "generated tree, 110,000 images of 64 pixels"
        for title, name, path in zip(titles, ("CIFAR10", "Tiny"), (cifar10, tree), strict=True):
            shutil.rmtree(path / CACHE, ignore_errors=True)
            (first, peak), (later, _) = start(name, path), start(name, path)
            rows.append({"label": title, "first_s": first, "later_s": later, "peak_bytes": peak})
    lines = [
        (row["label"], f"{row['first_s']:.1f}", f"{row['later_s']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}")
        for row in rows
    ]
    head = ("row", "first (s)", "later (s)", "peak memory (GB)")
    about = f"{os.cpu_count()} CPU cores"
    harness.show("start of a process until the data are there", about, head, lines, rows, options)


if __name__ == "__main__":
    harness.run(main)

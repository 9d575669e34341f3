"""Reading class folders: the first start decodes them, later starts map the cache.

    python benchmarks/loading.py --data_path data/cifar10-jpeg --json

Rows: real CIFAR-10 (JPEG), and a generated tree of 110,000 JPEGs of 64 pixels in 200 classes. Memory is the sum of the
resident sizes of all processes, which counts shared pages several times: an upper bound.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils.pictures import CACHE

READ = """
import sys
sys.path.insert(0, {project!r})
import torch
from utils import datasets
real = datasets.load({name!r}, {path!r}, torch.device("cpu"))
print(len(real.train) + len(real.test), "pictures")
"""


def write_tree(root, classes=200, train=500, test=50, size=64, different=500):
    """Write a tree in the layout of Tiny ImageNet; `different` pictures stand again and again."""
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(different):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for label in range(classes):
        wnid = f"n{label:08d}"
        for folder, count in ((root / "train" / wnid / "images", train), (root / "val" / wnid, test)):
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{wnid}_{number}.JPEG").write_bytes(encoded[(number * 7 + label) % different])


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
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"reading {path} ended with {process.returncode}")
    return time.perf_counter() - begun, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="data/cifar10-jpeg", help="CIFAR-10 in class folders")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON line at the end")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        write_tree(tree)
        for title, name, path in (
            ("CIFAR-10 (JPEG), 60,000 pictures", "CIFAR10", Path(options.data_path)),
            ("generated tree, 110,000 pictures of 64 pixels", "Tiny", tree),
        ):
            shutil.rmtree(path / CACHE, ignore_errors=True)
            (first, peak), (later, _) = start(name, path), start(name, path)
            rows.append({"row": title, "first_s": first, "later_s": later, "peak_bytes": peak})
    print(f"start of a process until the data are there ({os.cpu_count()} CPU cores)")
    for row in rows:
        print(f"{row['row']}: first {row['first_s']:.1f} s, later {row['later_s']:.1f} s, "
              f"peak memory {row['peak_bytes'] / 1e9:.2f} GB")  # fmt: skip
    if options.json:
        print(json.dumps({"title": "loading", "rows": rows}))


if __name__ == "__main__":
    main()

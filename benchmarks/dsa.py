"""DSA on 256 images 3x32x32, forward: batched code against the published one (affine matrices in Python loops).

python benchmarks/dsa.py --json
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import baseline, harness
from utils.augment import DSA, OPERATIONS
from utils.run.device import setup_device


def published(name, images, repeat, device):
    x = torch.randn(images, 3, 32, 32, device=device)

    def work():
        for _ in range(repeat):
            baseline.augment(x, name)

    return work


def project(name, images, repeat, device):
    setup_device(device)
    x = torch.randn(images, 3, 32, 32, device=device)
    dsa, rng = DSA(name), np.random.default_rng(0)

    def work():
        for _ in range(repeat):
            dsa.apply(x, dsa.draw(images, rng))

    return work


def main():
    options = harness.parse(__doc__)
    images, repeat = (2, 1) if options.smallest else (256, 20)
    rows = [
        harness.pair(name, published, project, options, name=name, images=images, repeat=repeat) for name in OPERATIONS
    ]
    harness.show_pairs(f"DSA, {repeat} batches of {images} images 3x32x32", rows, options)
    total = [sum(row[key] for row in rows) for key in ("baseline_s", "project_s")]
    mean = statistics.mean(1 / row["ratio_median"] for row in rows)
    print(f"all entries together: {total[0] / total[1]:.2f} x faster; mean of the entries' factors {mean:.2f} x")


if __name__ == "__main__":
    harness.run(main)

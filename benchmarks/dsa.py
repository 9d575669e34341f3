"""DSA on 256 pictures 3x32x32, forward: batched code against the published one (affine matrices in Python loops).

python benchmarks/dsa.py --json
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import baseline, harness
from utils import runtime
from utils.augment import DSA, OPERATIONS

REPEAT = 20


def published(name, device="cpu"):
    x = torch.randn(256, 3, 32, 32, device=device)

    def work():
        for _ in range(REPEAT):
            baseline.augment(x, name)

    return work


def project(name, device="cpu"):
    runtime.choose_device(device)
    x = torch.randn(256, 3, 32, 32, device=device)
    dsa, rng = DSA(name), np.random.default_rng(0)

    def work():
        for _ in range(REPEAT):
            dsa.apply(x, dsa.draw(256, rng))

    return work


def main():
    options = harness.parser(__doc__).parse_args()
    rows = [
        harness.pair(
            name,
            "benchmarks.dsa",
            "published",
            "project",
            {"name": name, "device": options.device},
            options.pairs,
            options.threads,
        )
        for name in OPERATIONS
    ]
    harness.show(f"DSA, {REPEAT} batches of 256 pictures 3x32x32", rows, options)
    total = [sum(row[key] for row in rows) for key in ("baseline_s", "project_s")]
    mean = statistics.mean(1 / row["ratio_median"] for row in rows)
    print(f"all entries together: {total[0] / total[1]:.2f} x faster; mean of the entries' factors {mean:.2f} x")


if __name__ == "__main__":
    main()

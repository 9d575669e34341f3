"""Draw the 20 training images of each of a few classes that are easiest to learn, and the 20 hardest.

    python Figs/draw_hardness.py FORGETTING OUT.png --data_path data/cifar10-jpeg --labels 1 7

FORGETTING is the forgetting.pt that --drop_easy keeps beside the experts. A class has two rows: easiest, hardest.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from utils.data import datasets
from utils.results import report
from utils.run import files

COLUMNS = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forgetting")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data_path", default="data")
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 7])
    args = parser.parse_args()
    real = datasets.load("CIFAR10", args.data_path, torch.device("cpu"))
    scores = files.load_trusted(Path(args.forgetting))["scores"]
    rows = []
    for label in args.labels:
        indices = torch.from_numpy(real.class_indices[label])
        order = indices[scores[indices].argsort(stable=True)]
        rows += [order[:COLUMNS], order[-COLUMNS:]]
        found = scores[indices]
        print(f"class {label}: score {found.min():.2f} to {found.max():.2f}, median {found.median():.2f}")
    pixels = real.train.images[torch.cat(rows)].float() / 255
    report.save_grid(args.out, pixels, torch.arange(len(rows)).repeat_interleave(COLUMNS))
    print(args.out)


if __name__ == "__main__":
    main()

"""Memory and time of trajectory matching in constant-memory mode (no graph retained).

    python benchmarks/memory.py --json

Rows: constant memory against full unrolling at 50 steps; constant memory against retaining all graphs; an iteration of
100 steps in constant memory against ten iterations of 10 steps, which are as much work. On a GPU also CIFAR-100 with
1,000 images a minibatch, whole and in slices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.matching import DIGITS, project, published


def constant(**case):
    return project(**case, retained_graphs=0)


def in_slices(batch, **case):
    return project(batch=batch, **case, retained_graphs=0, slice_size=batch // 4)


def ten_tenths(steps, **case):
    iteration = constant(steps=steps // 10, **case)

    def work():
        for _ in range(10):
            iteration()

    return work


def main():
    options = harness.parse(__doc__)
    models = [DIGITS] if options.smallest else [{"model": "ConvNet"}, {"model": "ConvNetW32"}]
    steps, many = (2, 10) if options.smallest else (50, 100)
    cases = []
    for shape in models:
        model = shape["model"]
        cases += [
            (f"{model}, {steps} steps: unrolling -> constant memory", published, constant, {**shape, "steps": steps}),
            (f"{model}, {steps} steps: all graphs kept -> constant memory", project, constant,
             {**shape, "steps": steps}),
            (f"{model}, constant memory: 10 times {many // 10} steps -> {many} steps", ten_tenths, constant,
             {**shape, "steps": many}),
        ]  # fmt: skip
    if options.device != "cpu" or options.smallest:
        name, batch, shape = ("Digits", 8, DIGITS) if options.smallest else ("CIFAR-100", 1000, {"model": "ConvNet"})
        large = {**shape, "steps": 2 if options.smallest else 20, "batch": batch, "total": batch, "classes": 100}
        label = (
            f"{name}, {batch:,} images a minibatch, {large['steps']} steps: constant memory -> in slices of "
            f"{batch // 4}"
        )
        cases.append((label, constant, in_slices, large))
    rows = [harness.pair(label, first, second, options, **case) for label, first, second, case in cases]
    harness.show_pairs("memory of trajectory matching", rows, options)


if __name__ == "__main__":
    harness.run(main)

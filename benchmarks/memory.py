"""Memory and time of trajectory matching in constant-memory mode (no graph kept).

    python benchmarks/memory.py --json

Rows: constant memory against full unrolling at 50 steps; constant memory against keeping all graphs; an iteration of
100 steps in constant memory against ten iterations of 10 steps, which are as much work. On a GPU also CIFAR-100 with
1,000 pictures a minibatch, whole and in slices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, matching


def published(**arguments):
    return matching.published(**arguments)


def constant(**arguments):
    return matching.project(**arguments, kept_steps=0)


def in_slices(**arguments):
    return matching.project(**arguments, kept_steps=0, slice_size=250)


def all_kept(**arguments):
    return matching.project(**arguments)


def ten_times_ten_steps(**arguments):
    iteration = matching.project(**{**arguments, "steps": 10}, kept_steps=0)

    def work():
        for _ in range(10):
            iteration()

    return work


def main():
    options = harness.parser(__doc__).parse_args()
    cases = [
        (f"{model}, {label}", first, second, {"model": model, "steps": steps})
        for model in ("ConvNet", "ConvNetW32")
        for label, first, second, steps in (
            ("50 steps: unrolling -> constant memory", "published", "constant", 50),
            ("50 steps: all graphs kept -> constant memory", "all_kept", "constant", 50),
            ("constant memory: 10 times 10 steps -> 100 steps", "ten_times_ten_steps", "constant", 100),
        )
    ]
    if options.device != "cpu":
        large = {"model": "ConvNet", "steps": 20, "batch": 1000, "total": 1000, "classes": 100}
        label = "CIFAR-100, 1,000 pictures a minibatch, 20 steps: constant memory -> in slices of 250"
        cases.append((label, "constant", "in_slices", large))
    rows = [
        harness.pair(
            label,
            "benchmarks.memory",
            first,
            second,
            {**case, "device": options.device},
            options.pairs,
            options.threads,
        )
        for label, first, second, case in cases
    ]
    harness.show("memory of trajectory matching", rows, options)


if __name__ == "__main__":
    main()

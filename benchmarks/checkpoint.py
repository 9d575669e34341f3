"""What saving the state costs a Digits run of distill_mtt.py (the quickstart's sizes, fewer iterations).

    python benchmarks/checkpoint.py --json

Rows: the default schedule, and one with many saves, each against a run that never saves. A short run saves nothing by
the default schedule, so the cost of one save (state to file, fsync) is measured, too; divided by the ten minutes
between two saves it is the share of a long run.
"""

import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import buffer_mtt
import distill_mtt
from benchmarks import harness
from utils import files

EXPERTS = shlex.split("--dataset Digits --model ConvNetW32 --lr_teacher 0.03 --batch_train 64")
STAGES = shlex.split(
    "--ipc 1 --num_intervals 3 --max_start_epoch 5 --expert_epochs 2 --syn_steps 20 --lr_img 100 --lr_lr 1e-05 "
    "--eval_it 50 --num_eval 2 --override_epoch_eval_train 100"
)
DEFAULT, NEVER = 10.0, 1e6  # minutes


def call(main, *words):
    """Run a script's `main` with `words` on its command line, quietly, with signal handlers of its own."""
    sys.argv = [main.__module__, *map(str, words)]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def distil(buffers, iterations, minutes, device):
    """Run a whole distillation in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        call(distill_mtt.main, *EXPERTS, *STAGES, "--Iteration", iterations, "--buffer_path", buffers,
             "--root_log_dir", folder, "--checkpoint_minutes", minutes, "--device", device)  # fmt: skip


def never(buffers, iterations, minutes, device="cpu"):
    return lambda: distil(buffers, iterations, NEVER, device)


def scheduled(buffers, iterations, minutes, device="cpu"):
    return lambda: distil(buffers, iterations, minutes, device)


def saves(buffers, iterations, device):
    """Return the seconds of each save of a run that saves at every step, and the bytes of the largest file."""
    seconds, sizes, tick = [], [0], files.Checkpoint.tick

    def timed(self):
        before, start = self.last, time.perf_counter()
        tick(self)
        if self.last != before:
            seconds.append(time.perf_counter() - start)
            sizes.append(self.path.stat().st_size)

    files.Checkpoint.tick = timed
    try:
        distil(buffers, iterations, 0, device)
    finally:
        files.Checkpoint.tick = tick
    return seconds, max(sizes)


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--iterations", type=int, default=20, help="matching iterations of each stage")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two saves in the row with many of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as buffers:
        call(buffer_mtt.main, *EXPERTS, "--num_experts", 5, "--train_epochs", 8, "--buffer_path", buffers,
             "--device", options.device)  # fmt: skip
        rows = [
            harness.pair(
                label,
                "benchmarks.checkpoint",
                "never",
                "scheduled",
                {
                    "buffers": buffers,
                    "iterations": options.iterations,
                    "minutes": minutes,
                    "device": options.device,
                },
                options.pairs,
                options.threads,
            )
            for label, minutes in (
                (f"every {DEFAULT:g} minutes, the default", DEFAULT),
                (f"every {options.seconds:g} seconds", options.seconds / 60),
            )
        ]
        seconds, size = saves(buffers, min(options.iterations, 5), options.device)
    harness.show(f"distill_mtt.py on Digits, 3 stages of {options.iterations} iterations", rows, options)
    median, worst = statistics.median(seconds), max(seconds)
    print(
        f"one save: median {1000 * median:.1f} ms, longest {1000 * worst:.1f} ms ({len(seconds)} saves, the largest "
        f"of {size / 1e6:.2f} MB); every {DEFAULT:g} minutes: {100 * median / (60 * DEFAULT):.4f} % of the time, "
        f"{100 * worst / (60 * DEFAULT):.4f} % at most"
    )
    if options.json:
        print(json.dumps({"saves": len(seconds), "median_s": median, "max_s": worst, "bytes": size}))


if __name__ == "__main__":
    main()

"""What saving the state costs a Digits run of distill_mtt.py (the quickstart's sizes, fewer iterations).

    python benchmarks/checkpoint.py --json

Rows: the default schedule, and one with many saves, each against a run that never saves. A short run saves nothing by
the default schedule, so the cost of one save (state to file, fsync) is measured, too; divided by the ten minutes
between two saves it is the share of a long run.
"""

import contextlib
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import buffer_mtt
import distill_mtt
from benchmarks import harness
from utils.run.checkpoint import Checkpoint

COMMON = shlex.split("--dataset Digits --model ConvNetW32 --lr_teacher 0.03 --batch_train 64")
EXPERTS = shlex.split("--num_experts 5 --train_epochs 8")
STAGES = shlex.split(
    "--ipc 1 --num_intervals 3 --max_start_epoch 5 --expert_epochs 2 --syn_steps 20 --lr_img 100 --lr_lr 1e-05 "
    "--eval_it 50 --num_eval 2 --override_epoch_eval_train 100"
)
SMALLEST_EXPERTS = shlex.split("--num_experts 1 --train_epochs 2")
SMALLEST_STAGES = shlex.split(
    "--num_intervals 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --num_eval 1 --override_epoch_eval_train 1"
)
DEFAULT, NEVER = 10.0, 1e6  # minutes


def call(main, *words):
    """Run a script's `main` with `words` on its command line, quietly."""
    sys.argv = [main.__module__, *map(str, words)]
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        main()


def scheduled(folder, words, minutes, device):
    """Whole distillations, each in a new folder below `folder`, which is removed after the processes' end."""

    def work():
        with tempfile.TemporaryDirectory(dir=folder) as results:
            call(distill_mtt.main, *words, "--root_log_dir", results, "--checkpoint_minutes", minutes,
                 "--device", device)  # fmt: skip

    return work


def never(minutes, **arguments):
    return scheduled(**arguments, minutes=NEVER)


def time_saves(**arguments):
    """Return the seconds of each save of a run that saves at every iteration, and the bytes of the largest file."""
    seconds, sizes, save = [], [], Checkpoint.save

    def timed(self):
        start = time.perf_counter()
        save(self)
        seconds.append(time.perf_counter() - start)
        sizes.append(self.path.stat().st_size)

    Checkpoint.save = timed
    try:
        scheduled(**arguments, minutes=0)()
    finally:
        Checkpoint.save = save
    return seconds, max(sizes)


def main():
    options = harness.parse(
        __doc__,
        ("--iterations", int, 20, "matching iterations of each stage"),
        ("--seconds", float, 2.0, "between two saves in the row with many of them"),
    )
    torch.set_num_threads(options.threads)
    experts, stages, iterations = EXPERTS, STAGES, options.iterations
    if options.smallest:
        experts, stages, iterations = SMALLEST_EXPERTS, STAGES + SMALLEST_STAGES, 1
    with tempfile.TemporaryDirectory() as folder:
        buffers = [*COMMON, "--buffer_path", Path(folder) / "buffers"]
        call(buffer_mtt.main, *buffers, *experts, "--device", options.device)
        shared = {"folder": folder, "words": [*buffers, *stages, "--Iteration", iterations]}
        schedules = {
            f"every {DEFAULT:g} minutes, the default": DEFAULT,
            f"every {options.seconds:g} seconds": options.seconds / 60,
        }
        rows = [
            harness.pair(label, never, scheduled, options, minutes=minutes, **shared)
            for label, minutes in schedules.items()
        ]
        seconds, size = time_saves(**shared, device=options.device)
    harness.show_pairs(f"distill_mtt.py on Digits, stages of {iterations} iterations", rows, options)
    found = {"saves": len(seconds), "median_s": statistics.median(seconds), "max_s": max(seconds), "bytes": size}
    head = ("saves", "median (ms)", "longest (ms)", "largest file (MB)", "share of the time, median", "at most")
    shares = [100 * found[name] / (60 * DEFAULT) for name in ("median_s", "max_s")]
    line = (len(seconds), f"{1000 * found['median_s']:.1f}", f"{1000 * found['max_s']:.1f}", f"{size / 1e6:.2f}",
            *(f"{share:.4f} %" for share in shares))  # fmt: skip
    harness.show("one save", f"share at one save every {DEFAULT:g} minutes", head, [line], [found], options)


if __name__ == "__main__":
    harness.run(main)

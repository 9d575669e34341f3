"""Pairs of timings: the published way and this project, in turn, on the same work, each in a process of its own.

Both processes start before the first timing and stay until the last; while one works the other waits. So allocator
settings and peak memory of one do not touch the other, and a machine whose speed drifts slows both alike.
"""

import argparse
import contextlib
import json
import multiprocessing
import platform
import resource
import signal
import statistics
import sys
import time

import torch
from tabulate import tabulate

from utils.run import errors

SECONDS_TO_END = 10  # that a process has before it is killed


PRECISION = ("--precision", str, "fp32", "of the project's side: fp32 or bf16")


def run(main):
    """Run a benchmark's `main`; SIGTERM and SIGINT end it with its processes and temporary folders."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    errors.run(main)


def parse(description, *own, pairs=True):
    """Parse the command line.

    Args:
        description: for --help.
        own: options of this benchmark alone: (name, type, default, help); those of type bool take no value.
        pairs: add the options of `pair`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, text in own:
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(name, default=default, help=text, **how)
    if pairs:
        parser.add_argument("--pairs", type=int, default=5, help="counted pairs of each row")
        parser.add_argument("--threads", type=int, default=2, help="CPU threads")
        parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--smallest", action="store_true", help="run all of the code in seconds; times mean nothing")
    parser.add_argument("--json", action="store_true", help="print each table as a JSON line below it, too")
    options = parser.parse_args()
    if options.smallest:
        options.pairs = options.threads = 1
    return options


def pair(label, baseline, project, options, **arguments):
    """Time two makers of work in turn.

    Args:
        label: of the row.
        baseline, project: functions of `arguments` and device that return a function without arguments, the work.
        options: what `parse` returned.

    Returns:
        Dict of the row: medians in seconds, the ratio project / baseline (min, median, max over pairs), peak memory
        above the idle process in bytes.
    """
    times, own = [[], []], arguments
    if hasattr(options, "precision"):  # the baseline is published in full precision
        own = arguments | {"precision": options.precision}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_Worker(label, baseline, options, arguments)),
            stack.enter_context(_Worker(label, project, options, own)),
        ]
        print(f"timing: {label}", file=sys.stderr, flush=True)
        for turn in range(options.pairs + 1):  # the first one warms up
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds = workers[which].ask("go")
                if turn:
                    times[which].append(seconds)
        peaks = [worker.ask("stop") for worker in workers]
    ratios = [project_s / baseline_s for baseline_s, project_s in zip(*times, strict=True)]
    return {
        "label": label,
        "baseline_s": statistics.median(times[0]),
        "project_s": statistics.median(times[1]),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "baseline_peak": peaks[0],
        "project_peak": peaks[1],
        "pairs": options.pairs,
    }


class _Worker:
    """A process that makes its work and does it when asked to; leaving the context ends it.

    It is no daemon, for those may not start processes, and reading a data set does.
    """

    def __init__(self, label, maker, options, arguments):
        # Forked from a server that has imported what takes seconds and has started no threads and no GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torchvision.ops"])
        self.label, self.maker = label, maker
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, maker, options, arguments))
        self.process.start()
        there.close()  # so that an end of the process shows here

    def __enter__(self):
        try:
            self._receive()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, error, *_):
        self.pipe.close()
        if error:
            self.process.terminate()
        self.process.join(SECONDS_TO_END)
        self.process.kill()
        self.process.join()

    def ask(self, word):
        self.pipe.send(word)
        return self._receive()

    def _receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
        if self.process.exitcode == 2:  # it has said why in one line
            raise SystemExit(2)
        raise SystemExit(
            f"error: {self.label}: the process of {self.maker.__name__} ended early; its message stands above"
        )


def _serve(pipe, maker, options, arguments):
    """Make the work, then answer `go` with the seconds that it takes and anything else with the peak memory."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with its temporary files and its own processes
    torch.set_num_threads(options.threads)
    cuda = options.device != "cpu"

    def serve():
        work = maker(**arguments, device=options.device)
        idle = torch.cuda.memory_allocated() if cuda else resident()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        pipe.send("ready")
        while pipe.recv() == "go":
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            pipe.send(time.perf_counter() - start)
            if cuda:
                torch.cuda.empty_cache()  # the other process's turn
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(max(0, peak - idle))  # the kernel's counters are inexact by some pages

    with contextlib.suppress(EOFError, ConnectionError):  # the benchmark has ended
        errors.run(serve)


def resident():
    """Return the resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def show_pairs(title, rows, options):
    """Print a table of rows of `pair`."""
    machine = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} threads"
    precision = f", {options.precision}" if hasattr(options, "precision") else ""
    about = f"{machine}{precision}; torch {torch.__version__}, Python {platform.python_version()}"
    head = ("row", "baseline (s)", "project (s)", "ratio min / median / max", "peak memory above idle (MB)")
    lines = [
        (
            row["label"],
            f"{row['baseline_s']:.4g}",
            f"{row['project_s']:.4g}",
            f"{row['ratio_min']:.2f} / {row['ratio_median']:.2f} / {row['ratio_max']:.2f}",
            f"{row['baseline_peak'] / 1e6:.0f} -> {row['project_peak'] / 1e6:.0f}",
        )
        for row in rows
    ]
    show(title, about, head, lines, rows, options)


def show(title, about, head, lines, rows, options):
    """Print a table and, if asked for, its rows (dicts) as one JSON line."""
    print(f"{title} ({about})")
    print(tabulate(lines, head, tablefmt="plain", disable_numparse=True))
    if options.json:
        print(json.dumps({"title": title, "machine": about, "rows": rows}))

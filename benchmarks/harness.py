"""Pairs of timings: the published way and this project, in turn, on the same work, each in a process of its own.

Both processes start before the first timing and stay until the last; while one works the other waits. So allocator
settings and peak memory of one do not touch the other, and a machine whose speed drifts slows both alike.
"""

import argparse
import importlib
import json
import multiprocessing
import platform
import resource
import statistics
import time

import torch


def _worker(pipe, module, function, arguments, threads):
    torch.set_num_threads(threads)
    cuda = arguments.get("device", "cpu") != "cpu"
    work = getattr(importlib.import_module(module), function)(**arguments)
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
    pipe.send((idle, peak))


def _receive(pipe, label, function):
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"error: {label}: the process of {function} ended early; its message stands above") from None


def resident():
    """Return the resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def pair(label, module, baseline, project, arguments, pairs, threads, warm_up=1):
    """Time two makers of work in turn.

    Args:
        label: of the row.
        module: that holds both.
        baseline, project: names of functions that take `arguments` and return a function without arguments.
        arguments: dict.
        pairs: counted pairs, after `warm_up` others.
        threads: CPU threads of each process.

    Returns:
        Dict of the row: medians in seconds, the ratio project / baseline (min, median, max over pairs), peak memory
        above the idle process in bytes.
    """
    context = multiprocessing.get_context("spawn")
    ends = []
    for function in (baseline, project):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there, module, function, arguments, threads), daemon=True)
        process.start()
        there.close()  # so that an end of the process shows here
        _receive(here, label, function)
        ends.append((here, process, function))
    times = [[], []]
    for turn in range(pairs + warm_up):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for which in order:
            here, _, function = ends[which]
            here.send("go")
            seconds = _receive(here, label, function)
            if turn >= warm_up:
                times[which].append(seconds)
    memory = []
    for here, process, function in ends:
        here.send("stop")
        memory.append(_receive(here, label, function))
        process.join()
    ratios = [project_s / baseline_s for baseline_s, project_s in zip(*times, strict=True)]
    return {
        "label": label,
        "baseline_s": statistics.median(times[0]),
        "project_s": statistics.median(times[1]),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "baseline_peak": memory[0][1] - memory[0][0],
        "project_peak": memory[1][1] - memory[1][0],
        "pairs": pairs,
    }


def parser(description):
    """Return the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=int, default=5, help="counted pairs of each row")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--json", action="store_true", help="print the table as one JSON line at the end")
    return made


def show(title, rows, options):
    """Print a table of rows of `pair`, then, where asked for, the same as one JSON line."""
    machine = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} threads"
    about = f"{machine}; torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{title} ({about})")
    head = ("row", "baseline (s)", "project (s)", "ratio min / median / max", "peak memory above idle (MB)")
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["label"],
                f"{row['baseline_s']:.4g}",
                f"{row['project_s']:.4g}",
                f"{row['ratio_min']:.2f} / {row['ratio_median']:.2f} / {row['ratio_max']:.2f}",
                f"{row['baseline_peak'] / 1e6:.0f} -> {row['project_peak'] / 1e6:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if options.json:
        print(json.dumps({"title": title, "machine": about, "rows": rows}))

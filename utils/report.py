"""What a person sees: progress, tables, report files, curves and grids of pictures."""

import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils.options as o
from utils import distributed, errors, files

SELECTED = {"test": "the test set", "val": "held-out training pictures", "unknown": "unknown (nothing says it)"}


class Progress:
    """A progress bar on a terminal; plain one-line logs every few seconds elsewhere. Both go to stderr, of rank 0.

    Args:
        total: turns in all.
        label: what is counted.
        start: turns done already.
        every: seconds between two lines of the plain log.
    """

    def __init__(self, total, label, start=0, every=15.0):
        self.total, self.label, self.done, self.every = total, label, start, every
        self.first, self.begun = start, time.monotonic()
        self.printed = self.begun
        terminal = sys.stderr.isatty() and distributed.is_first()
        self.bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True) if terminal else None

    def update(self, turns=1, **shown):
        """Count `turns` more and show values (numbers) beside the count."""
        self.done += turns
        # Formatting waits for the device: only when something is shown.
        if self.bar is not None:
            self.bar.update(turns)
            if shown and time.monotonic() - self.printed > 0.5:
                self.printed = time.monotonic()
                self.bar.set_postfix({key: _short(value) for key, value in shown.items()})
        elif time.monotonic() - self.printed > self.every or self.done == self.total:
            self.printed = time.monotonic()
            if not distributed.is_first():
                return
            values = "".join(f"  {key} {_short(value)}" for key, value in shown.items())
            pace = (self.printed - self.begun) / max(self.done - self.first, 1)
            left = _duration(pace * (self.total - self.done))
            print(f"{self.label} {self.done}/{self.total}{values}  {left} left", file=sys.stderr, flush=True)

    def say(self, text):
        """Print one line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            say(text)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def say(text):
    """Print one line of the log to stderr, on rank 0."""
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


def show(text):
    """Print a result to stdout, on rank 0."""
    if distributed.is_first():
        print(text, flush=True)


def _short(value):
    return value if isinstance(value, str) else f"{float(value):.4g}"


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def dry_run(options, inputs, output, steps, disk):
    """Print what a run would do.

    Args:
        options: namespace of the resolved options.
        inputs: {what: path} that the run reads.
        output: folder it writes.
        steps: what it counts, in words or as a number of optimiser steps.
        disk: bytes it writes.
    """
    lines = [f"option  {name} = {value}" for name, value in vars(options).items()]
    lines += [f"input   {what}: {path}" for what, path in inputs.items()]
    show("\n".join([*lines, f"output  {output}", f"steps   {steps}", f"disk    {disk / 1e9:.2f} GB"]))


def mean_std(values):
    """Return mean and (population) standard deviation of a list of numbers, as MTT reports them."""
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def summary(values):
    """Return {"accuracy_mean", "accuracy_std"} of a list of accuracies in percent."""
    mean, std = mean_std(values)
    return {"accuracy_mean": mean, "accuracy_std": std}


def stage_rows(ipc_totals, runs):
    """Return the `stages` of a report.

    Args:
        ipc_totals: pictures of each class after each stage.
        runs: for each network the list of its accuracies after each stage, in percent.
    """
    return [
        {"stage": stage + 1, "ipc_total": total, **summary([run[stage] for run in runs])}
        for stage, total in enumerate(ipc_totals)
    ]


def table(report):
    """Return the text table of a report (the dict of report.json)."""

    def cell(row):
        return f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}"

    rows = [("network", "trained on", "images per class", "accuracy (%)")]
    for name, result in report["models"].items():
        for stage in result["stages"]:
            rows.append((name, f"stage 1-{stage['stage']}", str(stage["ipc_total"]), cell(stage)))
        total = str(result["stages"][-1]["ipc_total"])
        if result.get("random"):
            rows.append((name, "random real", total, cell(result["random"])))
        if result.get("full"):
            rows.append((name, "full training set", "all", cell(result["full"])))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if "select_on" in report:
        pictures = ", ".join(SELECTED.get(name, name) for name in report["select_on"].split(", "))
        how = "kept: the last iteration; watched" if report.get("keeps") == "last" else "selected"
        lines.append(f"{how} on: {pictures}")
    return "\n".join(lines)


def write_report(folder, report):
    """Write report.json and accuracy.png into `folder`; returns the path of the picture."""
    files.write_json(Path(folder) / "report.json", report)
    path = Path(folder) / "accuracy.png"
    draw_accuracy(path, report)
    return path


def draw_accuracy(path, report):
    """Draw accuracy against stage (total images per class), one curve for each network of `report`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    levels = {"random": (":", "random real pictures"), "full": ("--", "full training set")}
    for number, (name, result) in enumerate(report["models"].items()):
        stages = result["stages"]
        axes.errorbar(
            [stage["stage"] for stage in stages],
            [stage["accuracy_mean"] for stage in stages],
            yerr=[stage["accuracy_std"] for stage in stages],
            marker="o",
            capsize=3,
            color=f"C{number}",
            label=name,
        )
        for kind, (style, _) in levels.items():
            if result.get(kind):
                axes.axhline(result[kind]["accuracy_mean"], color=f"C{number}", linestyle=style, linewidth=1)
    for kind, (style, words) in levels.items():
        if any(result.get(kind) for result in report["models"].values()):
            axes.plot([], [], color="grey", linestyle=style, linewidth=1, label=words)
    stages = next(iter(report["models"].values()))["stages"]
    axes.set_xticks([stage["stage"] for stage in stages])
    axes.set_xticklabels([f"{stage['stage']}\n({stage['ipc_total']})" for stage in stages])
    axes.set_xlabel("stage (total images per class)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{report['dataset']}: networks trained on the unions in order", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    figure.tight_layout()
    save_figure(path, figure)


def save_figure(path, figure):
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def save_grid(path, pixels, labels, upscale_to=64):
    """Write a grid of pictures as PNG: one row for each class, at most 50 columns.

    Args:
        path: of the PNG.
        pixels: (N, C, H, W) in [0, 1]; values outside are clipped.
        labels: (N,) int64.
        upscale_to: pictures smaller than this many pixels are enlarged by a whole factor.
    """
    from torchvision.utils import make_grid

    pixels, labels = pixels.detach().float().cpu().clamp(0, 1), labels.cpu()
    order = torch.argsort(labels, stable=True)
    per_class = int(torch.bincount(labels).max())
    factor = max(1, upscale_to // pixels.shape[2])
    pixels = pixels[order].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(pixels, nrow=min(per_class, 50), padding=2)
    array = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    from PIL import Image

    with files.atomic(path) as file:
        Image.fromarray(array).save(file, format="PNG")


class Log:
    """Measurements of a run: JSON lines beside the results, and Weights & Biases where it was asked for.

    Rank 0 alone writes them.

    Args:
        path: of the JSON lines.
        rows: rows of an interrupted run to keep.
        wandb: disabled, online or offline.
        config: options of the run.
        run_id: of the run to continue on Weights & Biases, None for a new one.
    """

    def __init__(self, path, rows=0, wandb="disabled", config=None, run_id=None):
        self.metrics = files.Metrics(path, rows) if distributed.is_first() else None
        self.run = None
        if not self.metrics:
            return
        if wandb != "disabled":
            import wandb as library

            self.run = library.init(
                project="Progressive-Dataset-Distillation",
                mode=wandb,
                config=config,
                id=run_id,
                resume="allow",
                dir=str(Path(path).parent),
            )

    @property
    def rows(self):
        return self.metrics.rows if self.metrics else 0

    @property
    def run_id(self):
        return self.run.id if self.run else None

    def write(self, **row):
        """Append one row of numbers."""
        if self.metrics:
            self.metrics.write(**row)
        if self.run:
            self.run.log(row)

    def close(self):
        if self.metrics:
            self.metrics.close()
        if self.run:
            self.run.finish()


def main():
    """Print the reports of several results as one table, and draw them side by side."""
    from utils import collect, figures  # which use the functions above

    parser = o.Parser(
        "Collect results: one table of their reports (Markdown), and with --out also report.md, report.csv and figures "
        "of\naccuracies, matching losses, synthetic learning rates and the images of every stage.\n\n"
        "    python -m utils.report logged_files/CIFAR10/* results/cifar10/* --out comparison"
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="RESULT_FOLDER",
        help="that evaluate_mtt.py or evaluate_idc.py wrote a report into",
    )
    parser.add_argument(
        "--out", help="folder for report.md, report.csv and the figures (default: print the table only)"
    )
    options = parser.parse_args()
    results = [collect.read(folder) for folder in options.folders]
    print(collect.markdown(results))
    if not options.out:
        return
    out = Path(options.out)
    for name, text in (("report.md", collect.markdown(results) + "\n"), ("report.csv", collect.table(results))):
        with files.atomic(out / name, "w") as file:
            file.write(text)
        say(f"written: {out / name}")
    for path in figures.draw_all(results, out):
        say(f"written: {path}")


if __name__ == "__main__":
    errors.run(main)

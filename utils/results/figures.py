"""Figures of evaluated results: one report's accuracies, and several results side by side.

matplotlib is imported where a figure is drawn: it takes seconds.
"""

import itertools
import math

from ..run import files
from .report import headline_stages


def draw_accuracy(path, report):
    """Draw accuracy against stage, a curve for each network of `report` (the dict of report.json); returns `path`."""
    figure = accuracy_by_stage(list(report["models"].items()))
    figure.axes[0].set_title(f"{report['dataset']}: networks trained on the unions in order", fontsize=9)
    return save_figure(path, figure)


def draw_all(results, out):
    """Draw the accuracies of `results` (list of `compare.EvaluatedResult`) into the folder `out`; returns the paths."""
    own = [(f"{number}: {result.label}", result.report) for number, result in enumerate(results, 1)]
    made = {"accuracy_stage": accuracy_by_stage(own), "accuracy_ipc": accuracy_by_ipc(results)}
    return [save_figure(out / f"{name}.png", figure) for name, figure in made.items()]


def save_figure(path, figure):
    """Write a matplotlib figure as PNG, atomically; returns `path`."""
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return path


def panels(count, width, height):
    """Return (figure, list of `count` axes), at most three in a row, each of `width` × `height` inches."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, number) for number in range(1, count + 1)]


def finish(axis, across, up, **legend):
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, **legend)


def points(axis, across, rows, **style):
    means, spread = ([row[key] for row in rows] for key in ("accuracy_mean", "accuracy_std"))
    axis.errorbar(across, means, yerr=spread, capsize=3, **style)


def accuracy_by_stage(entries):
    """A curve for each of `entries`, pairs of a label and the stages and reference rows of one network.

    A result of one stage is a level; random real images are a cross at the last stage, the full training set is a
    thin level.
    """
    figure, (axis,) = panels(1, 7.0, 5.0)
    for number, (label, rows) in enumerate(entries):
        stages, colour = headline_stages(rows), f"C{number % 10}"
        if len(stages) > 1:
            points(axis, [row["stage"] for row in stages], stages, fmt="o-", color=colour, label=label)
        else:
            mean, std = stages[-1]["accuracy_mean"], stages[-1]["accuracy_std"]
            axis.axhline(mean, color=colour, linestyle="--", label=label)
            axis.axhspan(mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
        if rows.get("random"):
            points(axis, [stages[-1]["stage"]], [rows["random"]], fmt="x", color=colour)
        if rows.get("full"):
            axis.axhline(rows["full"]["accuracy_mean"], color=colour, linestyle="-.", linewidth=1)
    if any(rows.get("random") for _, rows in entries):
        axis.plot([], [], "x", color="grey", label="as many random real images")
    if any(rows.get("full") for _, rows in entries):
        axis.plot([], [], "-.", color="grey", linewidth=1, label="full training set")
    totals = sorted({(row["stage"], row["ipc_total"]) for _, rows in entries for row in rows["stages"]})
    stages = sorted({stage for stage, _ in totals})
    alike = len(totals) == len(stages)  # in every stage
    axis.set_xticks(stages, [f"{stage}\n({total})" for stage, total in totals] if alike else stages)
    across = "stage (images per class in all)" if alike else "stage"
    finish(axis, across, "test accuracy (%)", loc="upper left", bbox_to_anchor=(0, -0.15))
    return figure


def accuracy_by_ipc(results):
    """The paper's first figure: a panel for each data set, a colour for each base method and network."""
    sets = sorted({result.report["dataset"] for result in results})
    groups = sorted({result.group for result in results})
    figure, axes = panels(len(sets), 6.4, 5.6)
    for axis, dataset in zip(axes, sets, strict=True):
        for number, group in enumerate(groups):
            chosen = [r for r in results if (r.report["dataset"], r.group) == (dataset, group)]
            draw_group(axis, sorted(chosen, key=lambda r: r.total), group, f"C{number % 10}")
        axis.set_title(dataset, fontsize=10)
        finish(
            axis, "images per class in all", "test accuracy (%)", loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2
        )
    return figure


def draw_group(axis, results, group, colour):
    """Draw the results of one base method and network: PDD's stages, one-shot, random real images, the full set."""
    for marker, result in zip(itertools.cycle("o^vD"), [r for r in results if r.staged], strict=False):
        stages, style = headline_stages(result.report), {"marker": marker, "color": colour}
        label = f"{result.method}, {result.report['model']}, {result.sizes}"
        points(axis, [row["ipc_total"] for row in stages], stages, label=label, **style)
    oneshot = [(r.total, headline_stages(r.report)[-1]) for r in results if not r.staged]
    random = [(r.total, r.report["random"]) for r in results if r.report.get("random")]
    for found, style, label in ((oneshot, "s--", f"{group}, one-shot"), (random, "x:", f"{group}, random real")):
        if found:
            points(axis, *zip(*found, strict=True), fmt=style, color=colour, alpha=0.8, label=label)
    levels = {r.report["full"]["accuracy_mean"] for r in results if r.report.get("full")}
    for number, level in enumerate(sorted(levels)):
        label = None if number else f"{group}, full training set"
        axis.axhline(level, color=colour, linestyle="-.", linewidth=1, label=label)

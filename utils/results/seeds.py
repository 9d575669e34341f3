"""Results of several seeds of the whole pipeline as one line of a study: accuracy and hours."""

import statistics
from pathlib import Path

from scipy import stats
from tabulate import tabulate

from ..run import files
from . import figures, hours, report

PARTS = {"experts": "buffer", "distillation": "distill", "evaluation": "evaluate"}  # first words of their scripts
NOTE = "accuracy: mean over seeds of distillations; std of them as a sample; 95 % interval of the mean by Student's t"


def summary(label, folders):
    """Return {column: number or text} of one setting.

    Args:
        label: its name.
        folders: of its results, one for each seed, with report.json and hours.json.

    Returns:
        Among others accuracy (mean over seeds of the headline, `report.headline`), std (of the sample of seeds), half
        (the 95 % interval of the mean by Student's t is accuracy ± half; both None with one seed), over random (points
        over random real images), matched starts (accuracy of networks that start as the matched experts), last union
        alone (of training on nothing else; each None without its row), hours of each of `PARTS` (mean over seeds).
    """
    reports = [files.read_json(Path(folder) / "report.json") for folder in folders]
    last, count = [report.headline(of_seed) for of_seed in reports], len(folders)
    accuracies = [row["accuracy_mean"] for row in last]
    found = {"setting": label, "images per class": last[0]["ipc_total"], "seeds": count, "accuracies": accuracies}
    found |= {"accuracy": statistics.mean(accuracies), "std": None, "half": None}
    if count > 1:
        found["std"] = statistics.stdev(accuracies)
        found["half"] = float(stats.t.ppf(0.975, count - 1)) * found["std"] / count**0.5
    others = {
        "over random": [row["over_random"] for row in last],
        "matched starts": [r["stages"][-1]["accuracy_mean"] if r.get("fresh") else None for r in reports],
        "last union alone": [r["last_union"]["accuracy_mean"] if r.get("last_union") else None for r in reports],
    }
    found |= {name: None if None in values else statistics.mean(values) for name, values in others.items()}
    measured = [hours.read(folder) for folder in folders]
    for name, begin in PARTS.items():
        parts = [part for of_seed in measured for script, part in of_seed.items() if script.startswith(begin)]
        found[name] = sum(part["hours"] for part in parts) / count
    found["unit"] = "/".join(sorted({part["unit"] for of_seed in measured for part in of_seed.values()}))
    return found


def cost(row):
    """Return the hours that made the images of a `summary`: experts and distillation."""
    return row["experts"] + row["distillation"]


def table(rows):
    """Return the Markdown table of `summary`s, accuracy against hours: the cheapest first."""
    headers = ["setting", "images per class", "seeds", "accuracy (%)", "std", "95 % interval", "over random"]
    headers += ["matched starts", "last union alone"]
    headers += [f"{name} (h)" for name in PARTS] + ["hours of"]
    number = lambda value, form="{:.2f}": "" if value is None else form.format(value)  # noqa: E731
    lines = []
    for row in sorted(rows, key=cost):
        mean, half = row["accuracy"], row["half"]
        interval = "" if half is None else f"{mean - half:.2f} to {mean + half:.2f}"
        cells = [row["setting"], row["images per class"], row["seeds"], number(mean), number(row["std"]), interval]
        spent = [number(row[name], "{:.3g}") for name in PARTS]
        others = [number(row["over random"], "{:+.2f}"), number(row["matched starts"]), number(row["last union alone"])]
        lines.append([*cells, *others, *spent, row["unit"]])
    return tabulate(lines, headers, "github", disable_numparse=True) + f"\n\n{NOTE}"


def draw(rows, path):
    """Draw accuracy against the hours of experts and distillation into the PNG `path`, with the 95 % intervals."""
    figure, (axis,) = figures.panels(1, 8.6, 4.4)
    for row in rows:
        axis.errorbar(cost(row), row["accuracy"], yerr=row["half"], fmt="o", capsize=3, label=row["setting"])
    across = f"{rows[0]['unit']} hours of experts and distillation, mean over seeds"
    figures.finish(axis, across, "test accuracy (%), 95 % interval", loc="upper left", bbox_to_anchor=(1.01, 1))
    figures.save_figure(path, figure)

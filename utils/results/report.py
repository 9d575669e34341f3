"""The report of an evaluation: its rows, table, files and curves, and grids of images."""

import sys
from pathlib import Path

import torch
from tabulate import tabulate

from ..run import files

SELECTED = {"test": "the test set", "val": "held-out training images", "unknown": "unknown (nothing says it)"}
GRID_COLUMNS = 50


def mean_std(values):
    """Return mean and (population) standard deviation of a list of numbers, as MTT reports them."""
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def summary(runs):
    """Return the row of a report.

    Args:
        runs: for each network the list of its accuracies in percent during the stage, the last one at its end. From
            several, the mean of the networks' best ones is reported, too: it has been chosen on the test set.
    """
    mean, std = mean_std([run[-1] for run in runs])
    row = {"accuracy_mean": mean, "accuracy_std": std, "networks": len(runs)}
    checks = min(len(run) for run in runs)
    if checks > 1:
        best_mean, best_std = mean_std([max(run) for run in runs])
        row |= {"best_mean": best_mean, "best_std": best_std, "checks": checks}
    return row


def stage_rows(ipc_totals, runs):
    """Return the `stages` of a report.

    Args:
        ipc_totals: images of each class after each stage.
        runs: for each network a list of stages, each the list of its accuracies in percent during the stage.
    """
    return [
        {"stage": stage, "ipc_total": total, **summary([run[stage - 1] for run in runs])}
        for stage, total in enumerate(ipc_totals, 1)
    ]


def table_rows(report):
    """Return the rows of a report (the dict of report.json): the stages and the reference rows of each network.

    Returns:
        List of dicts: kind (stages, hard, random, random_soft, full), network, trained_on, ipc, mean, std, networks;
        best: mean, std and number of checks of the best accuracies, or three times None.
    """
    rows = []
    for name, result in report["models"].items():
        total = result["stages"][-1]["ipc_total"]
        found = [("stages", f"stage 1-{row['stage']}", row["ipc_total"], row) for row in result["stages"]]
        found += [("hard", "the same, hard labels", total, result.get("hard"))]
        found += [("random", "random real", total, result.get("random"))]
        found += [("random_soft", "random real, soft labels", total, result.get("random_soft"))]
        found += [("full", "full training set", "all", result.get("full"))]
        rows += [
            {
                "kind": kind,
                "network": name,
                "trained_on": words,
                "ipc": ipc,
                "mean": row["accuracy_mean"],
                "std": row["accuracy_std"],
                "best": [row.get(key) for key in ("best_mean", "best_std", "checks")],
                "networks": row.get("networks") or _networks(report["config"], name, kind),
            }
            for kind, words, ipc, row in found
            if row
        ]
    return rows


def _networks(config, model, kind):
    """Return how many networks a row is the mean of, for reports of earlier versions, which do not say it."""
    if kind == "full":
        return config["full_networks"]
    if "factor" in config:  # PDD+IDC
        return config["repeat"]
    return config["num_experts" if kind == "stages" and model == config["model"] else "num_eval"]


def plus_minus():
    """Return "±", or "+/-" if stdout cannot encode it."""
    try:
        "±".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "+/-"
    return "±"


def table(report):
    """Return the text table of a report (the dict of report.json)."""
    found, sign = table_rows(report), plus_minus()
    checks = max((row["best"][2] or 0 for row in found), default=0)
    best = [f"best of {checks} (%)"] if checks else []
    headers = ["network", "trained on", "images per class", "accuracy (%)", *best, "networks"]
    rows = []
    for row in found:
        cells = [row["network"], row["trained_on"], row["ipc"], f"{row['mean']:.2f} {sign} {row['std']:.2f}"]
        if checks:
            mean, std, known = row["best"]
            cells.append(f"{mean:.2f} {sign} {std:.2f}" if known else "")
        rows.append([*cells, row["networks"]])
    text = tabulate(rows, headers, disable_numparse=True)
    if "select_on" in report:
        images = ", ".join(SELECTED.get(name, name) for name in report["select_on"].split(", "))
        how = "kept: the last iteration; watched" if report.get("keeps") == "last" else "selected"
        text += f"\n{how} on: {images}"
    return text


def write_report(folder, report):
    """Write report.json and accuracy.png into `folder`; returns the path of the latter."""
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
    levels = {"random": (":", "random real images"), "full": ("--", "full training set")}
    for number, (name, result) in enumerate(report["models"].items()):
        stages = result["stages"]
        across, means, spread = ([row[key] for row in stages] for key in ("stage", "accuracy_mean", "accuracy_std"))
        axes.errorbar(across, means, yerr=spread, marker="o", capsize=3, color=f"C{number}", label=name)
        for kind, (style, _) in levels.items():
            if result.get(kind):
                axes.axhline(result[kind]["accuracy_mean"], color=f"C{number}", linestyle=style, linewidth=1)
    for kind, (style, words) in levels.items():
        if any(result.get(kind) for result in report["models"].values()):
            axes.plot([], [], color="grey", linestyle=style, linewidth=1, label=words)
    axes.set_xticks(across)
    axes.set_xticklabels([f"{row['stage']}\n({row['ipc_total']})" for row in stages])
    axes.set_xlabel("stage (total images per class)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{report['dataset']}: networks trained on the unions in order", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    figure.tight_layout()
    save_figure(path, figure)


def save_figure(path, figure):
    """Write a matplotlib figure as PNG, atomically, and close it."""
    from matplotlib import pyplot

    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def save_grid(path, pixels, labels, upscale_to=64):
    """Write a grid of images as PNG: one row for each class, at most `GRID_COLUMNS` columns.

    Args:
        path: of the PNG.
        pixels: (N, C, H, W) in [0, 1]; values outside are clipped.
        labels: (N,) int64.
        upscale_to: images smaller than this many pixels are enlarged by a whole factor.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    pixels, labels = pixels.detach().float().cpu().clamp(0, 1), labels.cpu()
    order = torch.argsort(labels, stable=True)
    per_class = int(torch.bincount(labels).max())
    factor = max(1, upscale_to // pixels.shape[2])
    pixels = pixels[order].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(pixels, nrow=min(per_class, GRID_COLUMNS), padding=2)
    array = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    with files.atomic(path) as file:
        Image.fromarray(array).save(file, format="PNG")

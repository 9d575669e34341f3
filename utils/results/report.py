"""The report of an evaluation: its rows and table, and what is kept of an earlier one; grids of images."""

import json
import math
from pathlib import Path

import torch
from tabulate import tabulate

from ..run import files
from ..run.log import log0

SELECTED = {"test": "the test set", "val": "held-out training images", "unknown": "unknown (nothing says it)"}
GRID_COLUMNS = 50
# Options of an evaluation that choose networks and rows: the accuracies of one network do not depend on them.
NETWORK_CHOICE = (
    *("eval_models", "eval_mode", "num_experts", "num_eval", "repeat", "skip_random", "skip_full", "full_networks"),
    *("skip_fresh", "eval_epochs"),
    *("save_model", "save_model_prefix", "save_ckpt", "versions"),
)


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


def stage_rows(stages, ipc_totals, runs):
    """Return the `stages` of a report.

    Args:
        stages: their numbers.
        ipc_totals: images of each class after each of them.
        runs: for each network a list of stages, each the list of its accuracies in percent during the stage.
    """
    return [
        {"stage": stage, "ipc_total": total, **summary([run[index] for run in runs])}
        for index, (stage, total) in enumerate(zip(stages, ipc_totals, strict=True))
    ]


def headline_stages(result):
    """Return the stage rows that stand for one network's result: those of fresh starts if they were evaluated.

    Args:
        result: of one network (an entry of "models" in report.json), or a whole report for its first network.
    """
    return result.get("fresh") or result["stages"]


def headline(result):
    """Return the headline of a report: the last stage's row, its kind, points over random real, and share of full."""
    last = headline_stages(result)[-1]
    return {"row": "fresh" if result.get("fresh") else "stages", **last, **_derived(last, result)}


def _derived(row, result):
    """Return a row's points over as many random real images, and its percent of the full training set's accuracy."""
    random, full = result.get("random"), result.get("full")
    as_many = row.get("ipc_total", result["stages"][-1]["ipc_total"]) == result["stages"][-1]["ipc_total"]
    over = random and as_many and row is not random and row is not full
    share = full and full["accuracy_mean"] > 0 and row is not full
    return {
        "over_random": row["accuracy_mean"] - random["accuracy_mean"] if over else None,
        "share_of_full": 100 * row["accuracy_mean"] / full["accuracy_mean"] if share else None,
    }


def table_rows(report):
    """Return the rows of a report (the dict of report.json): the stages and the reference rows of each network.

    Returns:
        List of dicts: kind (stages, hard, fresh, last_union, lengths, random, random_soft, full), network, trained_on,
        ipc, mean, std, networks; best: mean, std and number of checks of the best accuracies, or three times None;
        over_random: points over as many random real images, share_of_full: percent of the full training set's accuracy,
        or None.
    """
    rows = []
    for name, result in report["models"].items():
        total = result["stages"][-1]["ipc_total"]
        first = "" if report["config"].get("new_only") else "1-"
        found = [("stages", f"stage {first}{row['stage']}", row["ipc_total"], row) for row in result["stages"]]
        found += [("hard", "the same, hard labels", total, result.get("hard"))]
        last, fresh = f"stage 1-{result['stages'][-1]['stage']}", result.get("fresh") or ()
        found += [("fresh", f"stage 1-{row['stage']}, fresh start", row["ipc_total"], row) for row in fresh]
        found += [("last_union", "last union alone, fresh start", total, result.get("last_union"))]
        for row in result.get("lengths", ()):
            found.append(("lengths", f"{last}, {row['epochs']} epochs, fresh start", total, row))
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
                **_derived(row, result),
            }
            for kind, words, ipc, row in found
            if row
        ]
    return rows


def network_count(row):
    """Return how many networks a row of a report is the mean of: `stages`, or a reference row."""
    return (row[-1] if isinstance(row, list) else row).get("networks")


def _networks(config, model, kind):
    """Return the `networks` of a row in reports of earlier versions, which do not say it."""
    if kind == "full":
        return config["full_networks"]
    if "factor" in config:  # PDD+IDC, PDD+DM
        return config["repeat"]
    return config["num_experts" if kind == "stages" and model == config["model"] else "num_eval"]


def comparable(config):
    """Return the options of an evaluation that one network's accuracies depend on."""
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in NETWORK_CHOICE}))


def earlier(path, key):
    """Return the report of an earlier evaluation that can be completed; {} without one.

    Args:
        path: of report.json.
        key: dict of the options (`comparable`) and of the digest "images".

    Raises:
        UserError: the report is damaged.
    """
    if not Path(path).is_file():
        return {}
    found = files.read_json(path, "the report of an evaluation", {"models": dict, "config": dict})
    if changed := files.differing(found["config"] | {"images": found.get("images")}, key):
        log0(f"note: {path}: replaced, its accuracies are of other images or options ({changed})")
        return {}
    return found


def accuracy_text(mean, std, networks):
    """Return "mean ± std" in percent; of a single network, which has no spread, the mean alone."""
    return f"{mean:.2f} ± {std:.2f}" if networks > 1 else f"{mean:.2f}"


def table(report):
    """Return the text table of a report (the dict of report.json)."""
    found = table_rows(report)
    columns = {"network": "network", "trained on": "trained_on", "images per class": "ipc"}
    columns = {name: [row[key] for row in found] for name, key in columns.items()}
    columns["accuracy (%)"] = [accuracy_text(row["mean"], row["std"], row["networks"]) for row in found]
    if checks := max((row["best"][2] or 0 for row in found), default=0):
        best = [accuracy_text(*row["best"][:2], row["networks"]) if row["best"][2] else "" for row in found]
        columns[f"best of {checks} (%)"] = best
    for name, key, form in (("over random", "over_random", "{:+z.2f}"), ("of full (%)", "share_of_full", "{:.1f}")):
        if any(row[key] is not None for row in found):
            columns[name] = ["" if row[key] is None else form.format(row[key]) for row in found]
    columns["networks"] = [row["networks"] for row in found]
    text = tabulate(columns, "keys", disable_numparse=True)
    if any(row["kind"] == "fresh" for row in found):
        text += "\nnetworks start as the experts that were matched; fresh start: from random initialisations (headline)"
    if "select_on" in report:
        images = ", ".join(SELECTED.get(name, name) for name in report["select_on"].split(", "))
        how = "kept: the last iteration; watched" if report.get("keeps") == "last" else "selected"
        text += f"\n{how} on: {images}"
    return text


def save_grid(path, pixels, labels, upscale_to=64):
    """Write a grid of images as PNG: a row for each class, or several of at most `GRID_COLUMNS` columns.

    Args:
        path: of the PNG.
        pixels: (N, C, H, W) in [0, 1]; values outside are clipped.
        labels: (N,) int64.
        upscale_to: images smaller than this many pixels are enlarged by a whole factor.
    """
    from torchvision.utils import save_image

    pixels, labels = pixels.detach().float().cpu(), labels.cpu()
    classes = [pixels[labels == label] for label in labels.unique()]
    most = max(map(len, classes))
    rows = math.ceil(most / GRID_COLUMNS)  # of each class: as few as there can be
    columns = math.ceil(most / rows)
    sheet = torch.zeros(len(classes), rows * columns, *pixels.shape[1:])
    for cells, images in zip(sheet, classes, strict=True):
        cells[: len(images)] = images
    factor = max(1, upscale_to // pixels.shape[2])
    sheet = sheet.flatten(0, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    with files.atomic(path) as file:
        save_image(sheet, file, format="png", nrow=columns, padding=2)

"""Results of several distillations: what was measured, and one table of it."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np

from utils import files
from utils.errors import UserError

WHAT = "the report of evaluate_mtt.py or evaluate_idc.py"
COLUMNS = ("result", "data set", "method", "network", "trained on", "images per class", "accuracy", "std", "networks")
MOST_COLUMNS = 50  # of utils.report.save_grid: wider grids are wrapped


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluated distillation.

    Attributes:
        folder: Path.
        report: contents of report.json.
        logs: {stage from 1: rows of its metrics}.
        pictures: {stage from 1: (H, W, 3) uint8, its subset, a row for each class}.
    """

    folder: Path
    report: dict
    logs: dict
    pictures: dict

    @property
    def base(self):
        """The base method."""
        return "IDC" if "factor" in self.report["config"] else "MTT"

    @property
    def staged(self):
        return self.report["config"]["num_intervals"] > 1

    @property
    def method(self):
        """PDD over the base method, or the base method alone where all images are learned in one stage."""
        return f"PDD+{self.base}" if self.staged else f"{self.base} one-shot"

    @property
    def group(self):
        """What results must share to be compared: base method and network."""
        return f"{self.base}, {self.report['model']}"

    @property
    def sizes(self):
        """Stages × images of each class that each of them learned."""
        return f"{self.report['config']['num_intervals']} × {self.report['config']['ipc']}"

    @property
    def total(self):
        """Images of each class in the last union."""
        return self.report["stages"][-1]["ipc_total"]

    def measured(self, key):
        """True where the distillation logged `key` (loss, syn_lr)."""
        return any(key in row for log in self.logs.values() for row in log)

    def networks(self, model, kind):
        """Return how many networks of `model` a row of `kind` (stages, random or full) is the mean of."""
        config = self.report["config"]
        if kind == "full":
            return config["full_networks"]
        if self.base == "IDC":
            return config["repeat"]
        return config["num_experts" if kind == "stages" and model == config["model"] else "num_eval"]


def read(folder):
    """Return the `Result` in `folder`.

    Raises:
        UserError: there is no report.json, or it is damaged.
    """
    folder = Path(folder)
    path = folder / "report.json"
    if not path.exists():
        raise UserError(f"{folder}: expected {WHAT} (report.json), found none; evaluate the result first")
    result = Result(folder, files.read_json(path, WHAT), {}, {})
    try:
        rows([result])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: expected {WHAT}, found something else; evaluate the result again") from None
    read_stage = read_idc_stage if result.base == "IDC" else read_mtt_stage
    for stage in range(1, result.report["config"]["num_intervals"] + 1):
        read_stage(result, stage)
    return result


def read_mtt_stage(result, stage):
    config = result.report["config"]
    names = config["override_interval_names"]
    found = [result.folder / names.split(".")[stage - 1]] if names else result.folder.glob(f"interval{stage}_epoch*")
    folder = next(iter(found), result.folder)  # one stage lies in the experiment's own folder
    read_log(result, stage, folder / "metrics.jsonl")
    total = config["ipc"] * stage
    path = folder / "images_best.png"
    if path.exists() and total <= MOST_COLUMNS:
        union = read_picture(path)  # its newest images stand on the right
        result.pictures[stage] = union[:, (union.shape[1] - 2) * (total - config["ipc"]) // total :]


def read_idc_stage(result, stage):
    read_log(result, stage, result.folder / f"interval_{stage - 1}_metrics.jsonl")
    paths = result.folder.glob(f"interval_{stage - 1}_img*.png")
    last = max(paths, key=lambda path: int(re.search(r"img(\d+)", path.name)[1]), default=None)
    if last:
        result.pictures[stage] = read_picture(last)


def read_log(result, stage, path):
    if path.exists():
        try:
            result.logs[stage] = [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError:
            raise UserError(f"{path}: expected one JSON object in each line, found something else") from None


def read_picture(path):
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"{path}: expected a picture, found a damaged file") from None


def rows(results):
    """Return the table's rows (lists as `COLUMNS`): stages, random real pictures and the full training set of each."""
    found = []
    for number, result in enumerate(results, 1):
        for model, part in result.report["models"].items():
            total = part["stages"][-1]["ipc_total"]
            lines = [
                ("stages", result.method, f"stage 1-{row['stage']}", row["ipc_total"], row) for row in part["stages"]
            ]
            lines.append(("random", "none", "random real", total, part.get("random")))
            lines.append(("full", "none", "full training set", "all", part.get("full")))
            found += [
                [number, result.report["dataset"], method, model, words, ipc, row["accuracy_mean"], row["accuracy_std"],
                 result.networks(model, kind)]
                for kind, method, words, ipc, row in lines
                if row
            ]  # fmt: skip
    return found


def markdown(results):
    """Return the table as Markdown, and below it the folders by the numbers of the results."""
    lines = [[*COLUMNS[:6], "accuracy (%)", "networks"], ["---"] * 8]
    for *words, mean, std, count in rows(results):
        lines.append([*map(str, words), f"{mean:.2f} ± {std:.2f}", str(count)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "\n\n" + "\n".join(f"{number}. {result.folder}" for number, result in enumerate(results, 1))


def table(results):
    """Return the table as comma-separated values, with full precision and the folders."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "folder"])
    writer.writerows([*row, results[row[0] - 1].folder] for row in rows(results))
    return text.getvalue()

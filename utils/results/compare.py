"""Evaluated results side by side: what was measured, and one table of it."""

import csv
import dataclasses
import io
from pathlib import Path

from tabulate import tabulate

from ..run import files
from ..run.errors import UserError
from ..run.log import log0, read_rows
from . import names
from .report import accuracy_text, table_rows

REPORT = "report.json"
WHAT = "the report of evaluate_mtt.py or evaluate_idc.py"
REAL = ("random", "random_soft", "full")  # kinds of rows that no method made
COLUMNS = ("result", "data set", "method", "network", "trained on", "images per class", "accuracy", "std", "networks")


@dataclasses.dataclass(frozen=True)
class EvaluatedResult:
    """One evaluated distillation.

    Attributes:
        folder: Path.
        report: contents of report.json.
        logs: {stage from 1: rows of its metrics}.
    """

    folder: Path
    report: dict
    logs: dict

    @property
    def base(self):
        """The base method."""
        return names.base_method(self.report["config"])

    @property
    def staged(self):
        return self.report["config"]["num_intervals"] > 1

    @property
    def method(self):
        """PDD over the base method, or the base method alone if all images are learned in one stage."""
        if self.base not in names.LEARNED_HERE:
            return self.base
        return f"PDD+{self.base}" if self.staged else f"{self.base} one-shot"

    @property
    def group(self):
        """What results must share to be compared: base method and network."""
        return f"{self.base}, {self.report['model']}"

    @property
    def label(self):
        """Data set, method, network, stages × images per class."""
        return f"{self.report['dataset']}, {self.method}, {self.report['model']}, {self.sizes}"

    @property
    def sizes(self):
        """Stages × images of each class that each of them learned."""
        stages, ipc = (self.report["config"][name] for name in ("num_intervals", "ipc"))
        return "-".join(map(str, ipc)) if isinstance(ipc, list) else f"{stages} × {ipc}"

    @property
    def total(self):
        """Images of each class in the last union."""
        return self.report["stages"][-1]["ipc_total"]


def find(paths):
    """Return the `EvaluatedResult`s in `paths`: folders of results, or folders that hold such, at any depth.

    Raises:
        UserError: there is none, or a report is damaged.
    """
    found = []
    for path in map(Path, paths):
        path = path.parent if path.name == REPORT else path
        reports = [path / REPORT] if (path / REPORT).exists() else sorted(path.rglob(REPORT))
        if not path.is_dir() and len(paths) == 1:
            raise UserError(f"{path}: expected a folder of results, found {'a file' if path.exists() else 'none'}")
        if not reports and len(paths) > 1:
            why = "it holds no report; evaluate the result first" if path.is_dir() else "there is no such folder"
            log0(f"note: {path}: left out, {why}")
        found += [report.parent for report in reports]
    return [read(folder) for folder in dict.fromkeys(found or map(Path, paths))]


def read(folder):
    """Return the `EvaluatedResult` in `folder`.

    Raises:
        UserError: there is no report.json, or it is damaged.
    """
    folder = Path(folder)
    path = folder / REPORT
    if not path.exists():
        raise UserError(f"{folder}: expected {WHAT} (report.json), found none; evaluate the result first")
    result = EvaluatedResult(folder, files.read_json(path, WHAT), {})
    try:
        rows([result])
        logs = [_log_path(result, stage) for stage in range(1, result.report["config"]["num_intervals"] + 1)]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: expected {WHAT}, found something else; evaluate the result again") from None
    result.logs.update({stage: read_rows(log) for stage, log in enumerate(logs, 1) if log.exists()})
    return result


def _log_path(result, stage):
    if result.base != "MTT":
        return result.folder / f"interval_{stage - 1}_metrics.jsonl"
    given = result.report["config"]["override_interval_names"]
    found = [result.folder / given.split(".")[stage - 1]] if given else names.mtt_stages(result.folder).get(stage)
    return (found[0] if found else result.folder) / "metrics.jsonl"  # one stage lies in the experiment's own folder


def rows(results):
    """Return the table's rows (lists as `COLUMNS`): the stages and the reference rows of each result."""
    return [
        [number, result.report["dataset"], "none" if row["kind"] in REAL else result.method,
         *(row[key] for key in ("network", "trained_on", "ipc", "mean", "std", "networks"))]
        for number, result in enumerate(results, 1)
        for row in table_rows(result.report)
    ]  # fmt: skip


def as_markdown(results):
    """Return the table as Markdown, and below it the folders by the numbers of the results."""
    headers = [*COLUMNS[:6], "accuracy (%)", "networks"]
    lines = [[*words, accuracy_text(mean, std, count), count] for *words, mean, std, count in rows(results)]
    table = tabulate(lines, headers, "github", disable_numparse=True)
    return table + "\n\n" + "\n".join(f"{number}. {result.folder}" for number, result in enumerate(results, 1))


def as_csv(results):
    """Return the table as comma-separated values, with full precision and the folders."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "folder"])
    writer.writerows([*row, results[row[0] - 1].folder] for row in rows(results))
    return text.getvalue()

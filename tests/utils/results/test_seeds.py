"""Several seeds as one line: statistics against plain formulas."""

import json
import math

import pytest

from utils.results import hours, seeds

T_OF_TWO = 4.302652729749462  # 97.5 % quantile of Student's t with 2 degrees of freedom, from tables (4.303)


def write(folder, accuracy, random, spent, models="net"):
    folder.mkdir()
    row = lambda mean: {"accuracy_mean": mean, "accuracy_std": 0.5, "networks": 2}  # noqa: E731
    stages = [{"stage": 1, "ipc_total": 1, **row(accuracy - 5)}, {"stage": 2, "ipc_total": 2, **row(accuracy)}]
    report = {"model": models, "models": {models: {"stages": stages, "random": random and row(random), "full": None}}}
    (folder / "report.json").write_text(json.dumps({**report, **report["models"][models], "config": {}}))
    for script, value in spent.items():
        hours.add(folder, script, value, "CPU")
    return folder


@pytest.fixture
def folders(tmp_path):
    spent = [{"buffer_mtt.py": 1.0, "distill_mtt.py": 2.0 * k, "evaluate_mtt.py": 0.5} for k in (1, 2, 3)]
    values = zip((50.0, 52.0, 57.0), (30.0, 31.0, 32.0), spent, strict=True)
    return [write(tmp_path / str(k), *value) for k, value in enumerate(values)]


def test_mean_std_and_interval_over_seeds(folders):
    row = seeds.summary("setting", folders)
    mean = (50 + 52 + 57) / 3
    std = math.sqrt(sum((value - mean) ** 2 for value in (50, 52, 57)) / 2)
    assert row["accuracy"] == pytest.approx(mean) and row["std"] == pytest.approx(std)
    assert row["half"] == pytest.approx(T_OF_TWO * std / math.sqrt(3))
    assert row["over random"] == pytest.approx(mean - 31)
    assert (row["experts"], row["distillation"], row["evaluation"]) == pytest.approx((1.0, 4.0, 0.5))
    assert row["images per class"] == 2 and row["seeds"] == 3 and row["unit"] == "CPU"


def test_one_seed_has_no_spread_and_rows_may_be_missing(tmp_path):
    row = seeds.summary("setting", [write(tmp_path / "a", 50.0, None, {"distill_idc.py": 1.0})])
    assert row["std"] is None and row["half"] is None and row["over random"] is None and row["experts"] == 0
    (line,) = (line for line in seeds.table([row]).splitlines() if "setting" in line and "50.00" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][4:7] == ["", "", ""]


def test_fresh_starts_are_the_headline_and_matched_ones_stand_beside_them(folders):
    for folder in folders:
        found = json.loads((folder / "report.json").read_text())
        rows = [{**row, "accuracy_mean": row["accuracy_mean"] - 3} for row in found["stages"]]
        last_union = {"accuracy_mean": 40.0, "accuracy_std": 1.0, "networks": 2}
        (folder / "report.json").write_text(json.dumps({**found, "fresh": rows, "last_union": last_union}))
    row = seeds.summary("setting", folders)
    assert row["accuracy"] == pytest.approx(50) and row["matched starts"] == pytest.approx(53)
    assert row["last union alone"] == 40 and row["over random"] == pytest.approx(50 - 31)


def test_the_table_begins_with_the_cheapest(folders, tmp_path):
    dear, cheap = seeds.summary("dear", folders), seeds.summary("cheap", folders[:2])
    lines = seeds.table([dear, cheap]).splitlines()
    assert "cheap" in lines[2] and "dear" in lines[3]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["dear", "2", "3", "53.00", "3.61", "44.04 to 61.96", "+22.00", "", "", "1", "4", "0.5", "CPU"]
    seeds.draw([dear, cheap], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

"""The page of results: its numbers, its images, and what a browser shows of it."""

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import compare as script
from tests.conftest import PROJECT
from tests.support import browser
from utils.results import compare, hours, page
from utils.run import errors

OLD = PROJECT / "tests" / "old_results"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A result of each method on Digits: PDD+MTT with measurements and hours, PDD+IDC without."""
    root = tmp_path_factory.mktemp("results")
    shutil.copytree(OLD, root / "old")
    folders = [next((root / "old" / name).iterdir()) for name in ("logged_files/Digits", "results/digits")]
    for stage in (1, 2):
        (inside,) = folders[0].glob(f"interval{stage}_*")
        lines = [{"iteration": k, "loss": stage + 1 / (k + 1), "syn_lr": 0.01 * stage} for k in range(200)]
        (inside / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, spent in (("buffer_mtt.py", 0.25), ("distill_mtt.py", 1.0), ("distill_mtt.py", 0.5)):
        hours.add(folders[0], name, spent, "CPU")
    hours.add(folders[0], "evaluate_mtt.py", 9.0, "CPU")
    return [compare.read(folder) for folder in folders]


@pytest.fixture(scope="module")
def rendered(results):
    return page.render(results)


def table(rendered, name):
    """Return the cells of a table: {row: [text]} without tags."""
    inside = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', rendered, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", inside, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in cells]


def test_the_numbers_are_those_of_the_reports(results, rendered):
    expected, summary = [], []

    def both(row):  # a single network, that of the full set, has no spread
        spread = f" ± {row['accuracy_std']:.2f}" if row and row["accuracy_std"] else ""
        return f"{row['accuracy_mean']:.2f}{spread}" if row else ""

    for number, result in enumerate(results, 1):
        found = json.loads((result.folder / "report.json").read_text())
        for row in found["stages"]:
            best = f"{row['best_mean']:.2f} ± {row['best_std']:.2f}" if "best_mean" in row else ""
            expected.append([str(number), f"stage 1-{row['stage']}", str(row["ipc_total"]), both(row), best])
        for kind, words in (("random", "random real"), ("full", "full training set")):
            if found[kind]:
                ipc = str(found["stages"][-1]["ipc_total"]) if kind == "random" else "all"
                expected.append([str(number), words, ipc, both(found[kind])])
        summary.append([str(number), both(found["stages"][-1]), both(found["random"]), both(found["full"])])
    shown = [[row[0], row[1], row[2], row[3], row[6]] for row in table(rendered, "rows")]
    assert [row[: len(wanted)] for row, wanted in zip(shown, expected, strict=True)] == expected
    assert [[row[0], row[2], row[6], row[8]] for row in table(rendered, "summary")] == summary
    for row, result in zip(table(rendered, "summary"), results, strict=True):
        last, random, full = (result.report[key] for key in ("stages", "random", "full"))
        mean = last[-1]["accuracy_mean"]
        assert row[7] == (f"{mean - random['accuracy_mean']:+.2f}" if random else "")
        assert row[9] == (f"{100 * mean / full['accuracy_mean']:.1f}" if full else "")


def test_fresh_starts_are_the_headline(results, tmp_path):
    shutil.copytree(results[0].folder, tmp_path / "copy")
    found = json.loads((tmp_path / "copy" / "report.json").read_text())
    fresh = [{**row, "accuracy_mean": 12.34 + row["stage"]} for row in found["stages"]]
    for place in (found, found["models"][found["model"]]):
        place["fresh"] = fresh
    (tmp_path / "copy" / "report.json").write_text(json.dumps(found))
    text = page.render([compare.read(tmp_path / "copy")])
    (row,) = table(text, "summary")
    assert row[2].startswith("14.34 ") and row[5] == "fresh"
    for starts, shown in (("random", "fresh"), ("0123456789ab", "matched"), (None, "")):
        found.pop("fresh", None), found["models"][found["model"]].pop("fresh", None)
        found["config"] = {**found["config"], "starts": starts}
        (tmp_path / "copy" / "report.json").write_text(json.dumps(found))
        assert table(page.render([compare.read(tmp_path / "copy")]), "summary")[0][5] == shown
    labels = [row[1] for row in table(text, "rows")]
    assert "stage 1-2" in labels and "stage 1-2, fresh start" in labels


def test_hours_are_added_up_and_leave_evaluations_out(results, rendered):
    assert [row[10] for row in table(rendered, "summary")] == ["1.75 CPU", ""]
    assert "distill_mtt.py 1.50 CPU hours" in rendered and "evaluate_mtt.py 9.00 CPU hours" in rendered
    last = results[0].report["stages"][-1]
    assert f"{last['accuracy_mean']:.2f} ± {last['accuracy_std']:.2f} at 1.75</title>" in rendered
    assert hours.of_distillation({"evaluate_idc.py": {"hours": 1.0, "unit": "CPU"}}) is None


def test_damaged_hours_are_one_line(tmp_path):
    (tmp_path / hours.FILE).write_text("{")
    with pytest.raises(errors.UserError, match=r"hours\.json: expected hours of a result's scripts"):
        hours.read(tmp_path)


def test_a_chart_puts_points_between_its_ticks():
    points = page._series("a", 0, [(2, 10.0, 1.0), (10, 30.0, 0.0)], "line")
    chart = page._chart("title", [points, page._series("b", 1, [(None, 20.0, 0.0)], "level")], "x", "y")
    marks = chart["series"][0]["marks"]
    for axis, ticks, values in (("x", chart["x_ticks"], (2, 10)), ("y", chart["y_ticks"], (10.0, 30.0))):
        (at, low), (to, high) = [(place, float(words)) for place, words in (ticks[0], ticks[-1])]
        for mark, value in zip(marks, values, strict=True):  # a straight line through two ticks
            assert mark[axis] == pytest.approx(at + (value - low) / (high - low) * (to - at))
    middle = (marks[0]["y"] + marks[1]["y"]) / 2
    assert chart["series"][1]["marks"][0]["y"] == pytest.approx(middle)
    upper, lower = marks[0]["ends"]
    assert lower - upper == pytest.approx((marks[0]["y"] - marks[1]["y"]) / 10) and marks[1]["ends"] is None
    assert marks[0]["words"] == "a: 10.00 ± 1.00 at 2"


def test_curves_are_means_of_neighbours():
    found = [(k, float(k % 2)) for k in range(1000)]
    thinned = page._thinned(found)
    assert len(thinned) == page.CURVE_POINTS and {y for _, y, _ in thinned} == {0.5}
    assert thinned[0][0] == pytest.approx(np.mean(range(20)))
    assert page._thinned([(1, 2.0), (2, 4.0)]) == [(1.0, 2.0, 0.0), (2.0, 4.0, 0.0)]


def test_the_images_are_those_that_each_stage_learned(results, rendered):
    tags = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', rendered)
    found = {html.unescape(words): url for url, words in tags}
    assert len(found) == 2 * 10 * 2  # results, classes, stages
    images, labels = torch.load(results[1].folder / "interval_1_data.pt", weights_only=True)
    for stage in (1, 2):
        words = f"3, learned in stage {stage} by 2: Digits, PDD+IDC, conv2in_w0.25, 2 × 1"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[words]))))
        expected = images[labels == 3][stage - 1 :: 2] * 255
        assert np.array_equal(shown, expected.round().byte()[0, 0].numpy())


def test_nothing_is_fetched_and_nothing_runs(rendered):
    assert "<script" not in rendered and "http" not in rendered and "url(" not in rendered and "@import" not in rendered
    assert set(re.findall(r'(?:src|href)="([^"]{10})', rendered)) == {"data:image"}


def test_a_report_alone_makes_a_page(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "<i>alone").mkdir()
    shutil.copy(results[0].folder / "report.json", tmp_path / "<i>alone")
    monkeypatch.setattr("sys.argv", ["compare.py", str(tmp_path / "<i>alone"), "--out", str(tmp_path / "out")])
    script.main()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "no images:" in text and "<img" not in text and "<i>" not in text and "&lt;i&gt;alone" in text
    assert "Matching loss" not in text and "none were measured here" in text


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_whole(width, rendered, tmp_path):
    seen = {dark: browser.look(rendered, width, dark, tmp_path) for dark in (False, True)}
    for found in seen.values():
        assert found["scroll_width"] <= width and found["outside"] == []
        assert len(found["images"]) == 40 and all(w > 0 and h > 0 and at >= 40 for w, h, at in found["images"])
        # Accuracy against images and hours, loss and syn_lr of the result that has them.
        assert len(found["charts"]) == 4 and all(200 < chart < width for chart in found["charts"])
    light, dark = ([sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("background", "ink")]
                   for found in (seen[False], seen[True]))  # fmt: skip
    assert light[0] > light[1] + 300 and dark[1] > dark[0] + 300

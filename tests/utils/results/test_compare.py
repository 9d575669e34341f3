"""Several results in one table and in figures: python scripts/compare.py."""

import csv
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from scripts import compare as script
from tests.conftest import EXPERIMENT, PROJECT, STAGES, files_of, run_script
from utils.results import compare, figures, report
from utils.run import errors

IDC = shlex.split("-d digits --ipc 2 --niter 0.04 --inner_loop 2 --epochs 5 --net_epoch 1 --n_data 64")
QUICK = ["--num_eval", 2, "--epoch_eval_train", 2, "--full_epochs", 1, "--skip_fresh"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that runs the command in this process: (exit status, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            errors.run(script.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory, distilled, buffers):
    """PDD+MTT of three stages, one-shot MTT and PDD+IDC of two stages, all on Digits and evaluated."""
    root = tmp_path_factory.mktemp("results")
    shutil.copytree(distilled, root / "Digits" / EXPERIMENT)
    paths = ["--buffer_path", buffers, "--root_log_dir", root]
    oneshot = [*STAGES, "--num_intervals", 1, "--ipc", 3, "--tag", "oneshot"]
    run_script("distill_mtt.py", *oneshot, *paths, "--Iteration", 8, "--eval_it", 8, "--num_eval", 1,
               "--override_epoch_eval_train", 1)  # fmt: skip
    for words in ([*STAGES, "--num_experts", 3], [*oneshot, "--num_experts", 2]):
        run_script("evaluate_mtt.py", *words, *QUICK, "--buffer_path", buffers, "--save_path", root)
    idc = [*IDC, "--num-intervals", 2, "--batch_real", 8, "--results", root]
    run_script("distill_idc.py", *idc, "--print-freq", 1)
    run_script("evaluate_idc.py", *idc, "--epochs", 1, "--full_epochs", 1, "--repeat", 2, "--skip_random")
    (of_idc,) = (root / "digits").iterdir()
    return [root / "Digits" / EXPERIMENT, root / "Digits" / (EXPERIMENT.replace("ipc1", "ipc3") + "_oneshot"), of_idc]


def test_the_table_holds_every_number_of_the_reports(folders, tmp_path):
    words = [sys.executable, "scripts/compare.py", *folders, "--out", tmp_path / "out"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = []
    for number, (found, method, counts) in enumerate(
        zip(reports, ("PDD+MTT", "MTT one-shot", "PDD+IDC"), ((3, 3), (2, 2), (2, 2)), strict=True), 1
    ):
        last = str(found["stages"][-1]["ipc_total"])
        for row in found["stages"]:
            expected.append(
                (number, method, str(row["ipc_total"]), row["accuracy_mean"], row["accuracy_std"], counts[0])
            )
        for kind, ipc, count in (("random", last, counts[1]), ("full", "all", 1)):
            if found[kind]:
                expected.append((number, "none", ipc, found[kind]["accuracy_mean"], found[kind]["accuracy_std"], count))
    keys = ("result", "method", "images per class", "accuracy", "std", "networks")
    kinds = (int, str, str, float, float, int)
    assert [tuple(kind(row[key]) for kind, key in zip(kinds, keys, strict=True)) for row in rows] == expected
    assert {row["folder"] for row in rows} == set(map(str, folders)) and {row["data set"] for row in rows} == {"Digits"}
    assert reports[2]["random"] is None

    assert (tmp_path / "out" / "report.md").read_text() == done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(rows) + 1 + len(folders)
    first = reports[0]["stages"][0]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    accuracy = f"{first['accuracy_mean']:.2f} ± {first['accuracy_std']:.2f}"
    assert cells == ["1", "Digits", "PDD+MTT", "ConvNetW32", "stage 1-1", "1", accuracy, "3"]
    assert lines[-1] == f"3. {folders[2]}"
    figures_made = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures_made == {"accuracy_stage.png", "accuracy_ipc.png"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_reports_of_earlier_versions_do_not_count_their_networks(number, folders, tmp_path):
    expected = compare.rows([compare.read(folders[number])])
    found = json.loads((folders[number] / "report.json").read_text())
    for result in (found, *found["models"].values()):
        for row in (*result["stages"], result["random"], result["full"]):
            if row:
                del row["networks"]
    found["config"]["num_eval"] = expected[-2][-1]  # which they trained on random real images
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert compare.rows([compare.read(tmp_path)]) == expected and all(row[-1] >= 1 for row in expected)
    columns = [line.split() for line in report.table(found).splitlines()]
    assert [line[-1] for line in columns[2 : 2 + len(expected)]] == [str(row[-1]) for row in expected]


def test_a_root_holds_results_at_any_depth(folders, tmp_path, command):
    (tmp_path / "results" / "folder" / "pets" / "32").mkdir(parents=True)
    own = tmp_path / "results" / "folder" / "pets" / "32" / "experiment"
    shutil.copytree(folders[0], own)
    content = json.loads((own / "report.json").read_text()) | {"dataset": "pets"}
    (own / "report.json").write_text(json.dumps(content))
    status, printed, _ = command(tmp_path / "results", folders[1].parent, folders[1])
    assert status == 0 and printed.splitlines()[2].split("|")[2].strip() == "pets"
    assert printed.splitlines()[-3:] == [f"1. {own}", f"2. {folders[0]}", f"3. {folders[1]}"]
    figure = figures.accuracy_by_ipc([compare.read(own)])
    assert figure.axes[0].get_title() == "pets"


def test_one_figure_shows_all_networks_of_a_report(folders):
    found = json.loads((folders[0] / "report.json").read_text())
    (own,) = found["models"].values()
    axis = figures.accuracy_by_stage([("ConvNetW32", own), ("VGG11", own | {"random": None, "full": None})]).axes[0]
    assert {"ConvNetW32", "VGG11"} <= series(axis).keys()
    assert [x.get_text() for x in axis.get_xticklabels()] == ["1\n(1)", "2\n(2)", "3\n(3)"]
    levels = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "-." and len(line.get_ydata())]
    assert levels == [own["full"]["accuracy_mean"]]


def test_random_real_images_in_stages_are_not_called_pdd(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "copy")
    found = json.loads((tmp_path / "copy" / "report.json").read_text())
    found["config"] |= {"slct_type": "random", "factor": 1}
    (tmp_path / "copy" / "report.json").write_text(json.dumps(found))
    axis = figures.accuracy_by_ipc([compare.read(tmp_path / "copy")]).axes[0]
    assert any(label.startswith("random real, ") for label in series(axis))
    assert not any(label.startswith("PDD+") for label in series(axis))


def series(axis):
    """Return {label: [(x, mean, lower end, upper end), …]} of the points with bars."""
    found = {}
    for container in axis.containers:
        line, _, (bars,) = container
        ends = [segment[:, 1] for segment in bars.get_segments()]
        found[container.get_label()] = [(x, y, *end) for (x, y), end in zip(line.get_xydata(), ends, strict=True)]
    return found


def test_accuracies_are_drawn_where_they_were_measured(folders):
    results = [compare.read(folder) for folder in folders]
    axis = figures.accuracy_by_ipc(results).axes[0]
    drawn = series(axis)
    for label, result, rows in (
        ("PDD+MTT, ConvNetW32, 3 × 1", results[0], results[0].report["stages"]),
        ("MTT, ConvNetW32, one-shot", results[1], results[1].report["stages"]),
        ("PDD+IDC, conv2in_w0.25, 2 × 2", results[2], results[2].report["stages"]),
    ):
        assert [point[0] for point in drawn[label]] == [row["ipc_total"] for row in result.report["stages"]]
        for (_, y, low, high), row in zip(drawn[label], rows, strict=True):
            mean, std = row["accuracy_mean"], row["accuracy_std"]
            assert (y, low, high) == pytest.approx((mean, mean - std, mean + std))
    random = [(x, y) for x, y, *_ in drawn["MTT, ConvNetW32, random real"]]
    assert random == [(3, result.report["random"]["accuracy_mean"]) for result in results[:2]]
    assert not any("IDC" in label and "random" in label for label in drawn)
    levels = {line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "-."}
    assert levels == {result.report["full"]["accuracy_mean"] for result in results}

    axis = figures.accuracy_by_stage([(result.label, result.report) for result in results]).axes[0]
    drawn = series(axis)
    assert [x for x, *_ in drawn["Digits, PDD+MTT, ConvNetW32, 3 × 1"]] == [1, 2, 3]
    (level,) = (line for line in axis.lines if line.get_label() == "Digits, MTT one-shot, ConvNetW32, 1 × 3")
    assert level.get_ydata()[0] == results[1].report["stages"][0]["accuracy_mean"]


def test_fresh_starts_are_rows_of_the_table_and_what_is_drawn(folders, tmp_path):
    found = json.loads((folders[0] / "report.json").read_text())
    fresh = [{**row, "accuracy_mean": 7.0 * row["stage"], "networks": 5} for row in found["stages"]]
    for place in (found, found["models"][found["model"]]):
        place |= {"fresh": fresh, "last_union": {**fresh[-1], "accuracy_mean": 22.5}}
    (tmp_path / "report.json").write_text(json.dumps(found))
    result = compare.read(tmp_path)
    shown = [(row[4], row[6]) for row in compare.rows([result]) if row[2] == "PDD+MTT" and "fresh" in row[4]]
    assert shown == [*((f"stage 1-{n}, fresh start", 7.0 * n) for n in (1, 2, 3)),
                     ("last union alone, fresh start", 22.5)]  # fmt: skip
    for figure in (figures.accuracy_by_ipc([result]), figures.accuracy_by_stage([("it", result.report)])):
        drawn = {label: points for label, points in series(figure.axes[0]).items() if len(points) == 3}
        assert [[y for _, y, *_ in points] for points in drawn.values()] == [[7.0, 14.0, 21.0]]


def test_a_report_alone_is_enough_for_the_table(folders, tmp_path, command):
    (tmp_path / "alone").mkdir()
    shutil.copy(folders[0] / "report.json", tmp_path / "alone")
    status, printed, _ = command(tmp_path / "alone", "--out", tmp_path / "out")
    assert status == 0 and "stage 1-3" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"accuracy_stage.png", "accuracy_ipc.png"}


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "expected the report of evaluate_mtt.py or evaluate_idc.py (report.json), found none; evaluate"),
        ("{}", "found something else; evaluate the result again"),
        ("[1]", "holding one object, found list"),
        ('{"models": {', "expected the report of evaluate_mtt.py or evaluate_idc.py, found something else"),
        ('{"models": {"a": {"stages": []}}, "config": {}}', "found something else; evaluate the result again"),
    ],
)
def test_a_folder_without_a_report_is_one_line(content, words, folders, tmp_path, command):
    (tmp_path / "bad").mkdir()
    if content:
        (tmp_path / "bad" / "report.json").write_text(content)
    before = files_of(tmp_path)
    beside = [folders[0]] if content else []  # a folder without a report is left out beside others
    status, printed, said = command(*beside, tmp_path / "bad", "--out", tmp_path / "out")
    assert status == 2 and printed == ""
    assert len(said.splitlines()) == 1 and words in said and str(tmp_path / "bad") in said
    assert files_of(tmp_path) == before


def test_a_report_names_its_folder_and_what_is_missing_is_said(folders, tmp_path, capsys):
    assert compare.find([folders[0] / "report.json"])[0].folder == compare.find([folders[0]])[0].folder
    with pytest.raises(errors.UserError, match="nowhere: expected a folder of results, found none"):
        compare.find([tmp_path / "nowhere"])
    assert len(compare.find([tmp_path / "nowhere", folders[0]])) == 1
    assert f"{tmp_path / 'nowhere'}: left out, there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [{}, {"override_interval_names": "one"}])
def test_a_report_that_does_not_say_where_its_stages_lie_is_one_line(damage, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "copy")
    report = json.loads((tmp_path / "copy" / "report.json").read_text())
    report["config"].pop("override_interval_names")
    (tmp_path / "copy" / "report.json").write_text(json.dumps(report | {"config": report["config"] | damage}))
    with pytest.raises(errors.UserError, match="found something else; evaluate the result again"):
        compare.find([tmp_path / "copy"])


def test_damaged_files_beside_the_report_are_one_line(folders, tmp_path, command):
    shutil.copytree(folders[2], tmp_path / "copy")
    (tmp_path / "copy" / "interval_0_metrics.jsonl").write_text('{"stage": 0, "ite')
    status, _, said = command(tmp_path / "copy")
    assert status == 2 and "expected rows of measurements, found something else" in said


def test_folders_without_a_report_are_left_out_with_a_note(folders, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    alone = run_script("scripts/compare.py", folders[0])
    beside = run_script("scripts/compare.py", unfinished, folders[0])
    assert beside.stdout == alone.stdout and f"{unfinished}: left out" in beside.stderr
    refused = run_script("scripts/compare.py", unfinished, check=False)
    assert refused.returncode == 2 and "found none; evaluate the result first" in refused.stderr

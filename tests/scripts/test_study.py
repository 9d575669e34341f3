"""python scripts/study.py: rows over seeds of the whole pipeline."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from scripts import reproduce, study
from tests.conftest import PROJECT
from utils.results import hours
from utils.run import errors

SHORT = shlex.split(
    "--num_experts 2 --train_epochs 4 --batch_train 32 --Iteration 2 --eval_it 1 --lr_lr 0 "
    "--syn_steps 2 --num_eval 1 --override_epoch_eval_train 1 --epoch_eval_train 1 --full_epochs 1"
)
SMALLEST = ([10], [(1, 2)], [None])  # in place of base-methods


def shapes(name, *words):
    """Return {label: steps of seed 0} of a study."""
    args = study.parse([name, "--seeds", "1", *words])
    return {label: steps for row in study.shapes_of(args) for label, (steps,) in [study.setting(*row, args, {})]}


@pytest.mark.parametrize("scale", ["small", "full"])
def test_settings_of_the_studies(scale):
    found = shapes("stages", "--scale", scale)
    known = [method for method in ("mtt", "idc", "dm") if f"cifar10-{method}-ipc10" in reproduce.PRESETS]
    assert len(found) == 4 * len(known)
    iterations, folders = {}, set()
    for label, steps in found.items():
        args = vars(steps[-2].args)
        assert args["ipc"] * args["num_intervals"] == 10 and vars(steps[-1].args)["ipc"] == args["ipc"]
        total = args.get("Iteration", args.get("niter")) * args["num_intervals"]
        evaluation = vars(steps[-1].args)
        epochs = evaluation.get("epoch_eval_train", evaluation.get("epochs")) * args["num_intervals"]
        iterations.setdefault(label.split(",")[0], set()).add((total, epochs))
        folders.add(study.folder_of(steps[-1]))
    assert all(len(totals) == 1 for totals in iterations.values()) and len(folders) == len(found)

    base = shapes("base-methods", "--scale", scale)
    shared = {study.folder_of(steps[-1]) for steps in base.values()} & folders
    assert len(base) == 3 * len(known) and len(shared) == 2 * len(known)  # 5 stages, and one with all iterations
    first = vars(next(iter(base.values()))[-2].args)
    places = study.places(study.parse(["stages", "--scale", scale]), 0)
    preset = vars(reproduce.steps_of("cifar10-mtt-ipc10", places, {})[-2].args)
    differing = {name for name in first if first[name] != preset[name]}
    assert differing <= {"buffer_path", "root_log_dir", "tag", "num_experts"}

    experts = list(shapes("experts", "--scale", scale).values())
    assert [steps[0].args.num_experts for steps in experts] == [3, 6, 12, 24]
    assert len({steps[1].args.buffer_path for steps in experts}) == 4
    assert len({steps[2].args.num_experts for steps in experts}) == 1
    larger = shapes("larger", "--scale", scale)
    assert len({study.folder_of(steps[-1]) for steps in larger.values()}) == len(larger)


def test_what_settings_share_is_run_once():
    commands = study.commands_of(list(shapes("base-methods", "--methods", "mtt").values()))
    assert [words[0] for words in commands] == ["buffer_mtt.py", *["distill_mtt.py", "evaluate_mtt.py"] * 3]
    assert [after and after[0] for *_, after in commands.values()] == [
        None, *["buffer_mtt.py", "distill_mtt.py"] * 3,
    ]  # fmt: skip


def arguments(tree, out):
    words = ["base-methods", "--methods", "mtt", "--scale", "small", "--seeds", 2, "--data_path", tree, "--out", out]
    return list(map(str, [*words, "--", *SHORT]))


@pytest.fixture(scope="module")
def studied(tmp_path_factory, cifar_tree):
    """A study that was stopped by SIGTERM at its first distillation, and then continued.

    Returns:
        (folder, the experts' hours before the continuation, what it printed).
    """
    out = tmp_path_factory.mktemp("study")
    code = f"from scripts import study; study.STUDIES['base-methods'] = {SMALLEST!r}; study.errors.run(study.main)"
    command = [sys.executable, "-c", code, *arguments(cifar_tree, out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            if "distill_mtt.py" in line:
                process.send_signal(signal.SIGTERM)
                break
        said = process.stderr.read()
    assert process.returncode == 143 and "run the same command again to continue" in said, said
    (experts,) = out.rglob("buffers_mtt2/**/hours.json")
    before = json.loads(experts.read_text())
    assert before["buffer_mtt.py"]["hours"] > 0
    done = subprocess.run(command, cwd=PROJECT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return out / "small", before, done.stdout


@pytest.mark.long
def test_the_table_is_that_of_the_reports(studied, cifar_tree):
    out, before, printed = studied
    rows = json.loads((out / "base-methods.json").read_text())["rows"]
    (row,) = rows
    assert row["setting"] == "MTT, 1 × 10, Iteration 4, 2 experts"
    folders = [next((out / f"seed{seed}" / "results" / "CIFAR10").iterdir()) for seed in (0, 1)]
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert row["accuracies"] == [found["headline"]["accuracy_mean"] for found in reports]
    assert [found["config"]["seed"] for found in reports] == [0, 1]
    spent = [hours.read(folder) for folder in folders]
    assert all(set(found) == {"buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py"} for found in spent)
    assert row["distillation"] == pytest.approx(sum(found["distill_mtt.py"]["hours"] for found in spent) / 2)
    assert spent[0]["buffer_mtt.py"]["hours"] > before["buffer_mtt.py"]["hours"]  # of both runs
    assert (out / "base-methods.md").read_text().strip() in printed
    assert "MTT, 1 × 10" in printed and "<!DOCTYPE html>" in (out / "base-methods.html").read_text()


@pytest.mark.long
def test_a_finished_study_runs_nothing(studied, cifar_tree, monkeypatch, capsys):
    monkeypatch.setitem(study.STUDIES, "base-methods", SMALLEST)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments(cifar_tree, studied[0].parent)])
    monkeypatch.setattr(study.signals, "listen", lambda: None)
    study.main()
    printed = capsys.readouterr()
    assert printed.out == studied[2] and "$ " not in printed.err


@pytest.mark.parametrize("method", ["mtt", "idc", "dm"])
def test_the_table_of_every_method(method, tmp_path, monkeypatch, capsys):
    """The end of a study whose runs are replaced by one finished report for each setting."""
    monkeypatch.setattr(
        sys, "argv", ["study.py", "stages", "--methods", method, "--seeds", "1", "--out", str(tmp_path)]
    )
    monkeypatch.setattr(study.signals, "listen", lambda: None)
    monkeypatch.setattr(study.page, "render", lambda results: f"{len(results)} results")
    monkeypatch.setattr(study.compare, "read", lambda folder: folder)

    def run_all(commands, jobs, log):
        for step, folder, _ in commands.values():
            folder.mkdir(parents=True, exist_ok=True)
            hours.add(folder, step.script, 1, "CPU")
            stage = {"stage": 1, "ipc_total": 10, "accuracy_mean": 50.0, "accuracy_std": 0.0, "networks": 1}
            (folder / "report.json").write_text(json.dumps({"config": {}, "stages": [stage]}))

    monkeypatch.setattr(study, "run_all", run_all)
    study.main()
    rows = json.loads((tmp_path / "full" / "stages.json").read_text())["rows"]
    assert [row["experts"] for row in rows] == [0 if method == "idc" else 1] * 4
    assert [row["distillation"] for row in rows] == [1] * 4
    assert "4 results" in (tmp_path / "full" / "stages.html").read_text()


def test_a_table_of_other_settings_is_kept(tmp_path):
    path = tmp_path / "stages.json"
    path.write_text(json.dumps({"options": {"zca": []}, "rows": [{"setting": "a"}, {"setting": "b"}]}))
    study.refuse_to_replace(path, dict.fromkeys("abc"), {"zca": []})
    study.refuse_to_replace(tmp_path / "none.json", {}, {})
    assert study.settings_of({"num-experts": ["3"], "device": ["cuda:1"], "checkpoint_minutes": ["5"]}) == {
        "num_experts": ["3"]
    }
    for labels, extra in (("ac", {"zca": []}), ("ab", {})):
        with pytest.raises(errors.UserError, match="found that of others; give another --out"):
            study.refuse_to_replace(path, dict.fromkeys(labels), extra)


def test_a_step_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    words = ["base-methods", "--methods", "idc", "--scale", "small", "--data_path", "/nowhere", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study.py", *words])
    monkeypatch.setattr(study.signals, "listen", lambda: None)
    with pytest.raises(SystemExit) as end:
        errors.run(study.main)
    *_, said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said.startswith("error: distill_idc.py ended with status 2: ")
    assert "/nowhere" in (tmp_path / "small" / "log.txt").read_text()
    assert not list(tmp_path.rglob(hours.FILE))


def test_unknown_methods_are_one_line(monkeypatch, capsys):
    for words, message in (
        (["--methods", "mtt,icd"], "--methods: expected names out of mtt, idc, dm, found 'icd'"),
        (["--", "--num-intervals", "3"], "--num_intervals after --: the study gives its runs this option"),
        (["--", "--seed", "3"], "--seed after --: the study gives its runs this option"),
        (["--methods", "idc", "--", "--num_experts", "4"], "no script of stages knows --num_experts"),
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", "stages", *words])
        with pytest.raises(SystemExit) as end:
            errors.run(study.main)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_study_of_experts_has_one_method():
    assert study.parse(["experts"]).methods == "mtt" and study.parse(["stages"]).methods == "mtt,idc,dm"
    with pytest.raises(errors.UserError, match="--methods idc: expected mtt, the only one of the study experts"):
        study.parse(["experts", "--methods", "idc"])


def test_options_go_to_the_scripts_that_know_them():
    args = study.parse(["base-methods", "--seeds", "1"])
    settings = [study.setting(*shape, args, {"num_experts": ["4"]}) for shape in study.shapes_of(args)]
    steps = {step.script: step.args for _, (of_seed,) in settings for step in of_seed}
    assert steps["buffer_mtt.py"].num_experts == 4 and "num_experts" not in steps["distill_idc.py"]
    folders = {str(of_seed[0].args.buffer_path) for _, (of_seed,) in settings if "buffer" in of_seed[0].script}
    assert len(folders) == 2  # of MTT and of DM


def test_scripts_that_run_together_take_turns_on_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study.reproduce, "PROJECT", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    shows = "import os, sys; int(sys.argv[1]) % 2 or print(os.environ['CUDA_VISIBLE_DEVICES'])"
    (tmp_path / "show.py").write_text(shows)
    commands = {}
    for number in range(4):  # every second one waits for the one before, as the scripts of one run do
        step = study.reproduce.Step("show.py", [str(number)], argparse.Namespace(device="cuda"))
        after = ("show.py", str(number - 1)) if number % 2 else None
        commands["show.py", str(number)] = step, tmp_path / "nowhere", after
    study.run_all(commands, 2, tmp_path / "log.txt")
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["5", "7"]

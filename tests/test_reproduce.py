"""Rows of the paper's tables: the presets are the published commands, sizes are those of --dry_run, rows continue."""

import argparse
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate_mtt
import utils.options as o
from scripts import reproduce, sizes
from tests.conftest import PROJECT, files_of, run_script
from tests.killer import differing, run_killed
from tests.test_evaluate_mtt import SEED_COMMANDS
from tests.test_idc import ROWS as SEED_IDC
from utils import datasets, errors, files, idc, matching, progressive
from utils.pictures import Pictures
from utils.reparam import FlatNetwork
from utils.trajectories import buffer_folder

SCRIPT = "scripts/reproduce.py"
PUBLISHED = [row for row in reproduce.ROWS if not row.endswith("-oneshot")]
SEED_EXPERTS = [
    *["--dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data"] * 2,
    *["--dataset=CIFAR100 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data"] * 2,
    *["--dataset Tiny --model=ConvNetD4 --train_epochs 24  --data_path data/tiny-imagenet-200"] * 2,
]


def steps_of(row, scale="full", **given):
    given = {"data_path": None, "buffer_path": None, "root_log_dir": None} | given
    return reproduce.steps_of(row, argparse.Namespace(scale=scale, **given), {})


def differences(step, words):
    """Return {option: (in the row, in the published command)} where they differ."""
    row, published = vars(step.options), vars(reproduce.options_of(step.script, words.split()))
    assert row.keys() == published.keys()
    return {key: (row[key], published[key]) for key in row if row[key] != published[key]}


@pytest.mark.parametrize("number", range(len(SEED_COMMANDS)))
def test_rows_of_mtt_are_the_published_commands(number):
    experts, distillation, evaluation = steps_of(PUBLISHED[number])
    published = SEED_COMMANDS[number]
    assert differences(experts, SEED_EXPERTS[number]) == {}
    assert differences(distillation, published[0]) == {}
    found = differences(evaluation, published[1])
    folder = found.pop("override_load_path")[1]
    # The published evaluation names the folder and leaves out, or misspells, options that only name it, too.
    assert found.keys() <= {"batch_syn", "syn_steps"}
    assert progressive.experiment_name(evaluation.options) == folder


@pytest.mark.parametrize("number", range(4))
def test_rows_of_idc_are_the_published_commands(number):
    words, folder = SEED_IDC[number]
    distillation, evaluation = steps_of(PUBLISHED[len(SEED_COMMANDS) + number])
    assert differences(distillation, words) == {}
    assert differences(evaluation, words.replace("--start-interval 0", "")) == {"repeat": (3, 1)}
    assert str(idc.save_folder(evaluation.options)) == f"results/{folder}"


@pytest.mark.parametrize("scale", ["full", "small"])
def test_a_baseline_learns_as_many_images_in_one_stage(scale):
    folders = set()
    for row in PUBLISHED:
        total = int(row.rpartition("ipc")[2])
        for name, stages in ((row, 5), (row + "-oneshot", 1)):
            distillation, evaluation = steps_of(name, scale)[-2:]
            options = distillation.options
            assert (options.ipc * options.num_intervals, options.num_intervals) == (total, stages)
            assert evaluation.options.ipc == options.ipc
            folders.add((options.dataset, options.tag, distillation.script, result_name(options)))
        pdd, oneshot = (vars(steps_of(name, scale)[-2].options) for name in (row, row + "-oneshot"))
        free = {"ipc", "num_intervals", "tag", "lr_img_scaled"}
        free |= {"Iteration", "eval_it"} if scale == "small" and "Iteration" in pdd else set()
        if scale == "small" and "factor" in pdd:  # an image moves as far in both
            free.add("lr_img")
            assert pdd["lr_img_scaled"] == pytest.approx(oneshot["lr_img_scaled"])
        assert {key for key in pdd if pdd[key] != oneshot[key]} <= free
    assert len(folders) == len(reproduce.ROWS)


def result_name(options):
    return idc.save_folder(options).name if "factor" in options else progressive.experiment_name(options)


def write_experts(options, network):
    """Write the replay buffers of a row, 10 experts in each; tensors share one number."""
    folder = buffer_folder(options.buffer_path, o.place(options), options.model, options.zca)
    folder.mkdir(parents=True, exist_ok=True)
    entry = [torch.zeros(1).expand(parameter.shape) for parameter in network.parameters()]
    for number in range(-(-options.num_experts // 10)):
        count = min(10, options.num_experts - 10 * number)
        torch.save([[entry] * (options.train_epochs + 1)] * count, folder / f"replay_buffer_{number}.pt")


def write_unions(options, kind):
    """Write the unions of all stages of a row; their pictures share one number."""
    for stage in range(1, options.num_intervals + 1):
        labels = torch.arange(kind.num_classes).repeat_interleave(options.ipc * stage)
        images = torch.zeros(1).expand(len(labels), kind.channel, kind.im_size, kind.im_size)
        if "factor" in options:
            files.save(idc.union_path(idc.save_folder(options), stage - 1), [images, labels])
            continue
        experiment = evaluate_mtt.experiment_folder(options)
        folder = progressive.stage_folder(experiment, stage, options.num_intervals, options.max_start_epoch)
        for name, value in (("images", images), ("labels", labels), ("syn_lr", torch.tensor(0.01))):
            files.save(folder / f"{name}_best.pt", value)


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("row", reproduce.ROWS)
def test_sizes_are_those_of_dry_run(row, scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps = steps_of(row, scale)
    options = steps[-1].options
    name = getattr(options, "data", options.dataset)
    kind = datasets.KINDS[name]
    # As many pictures as a stage starts from.
    count = kind.num_classes * options.ipc * getattr(options, "factor", 1) ** 2
    images = np.zeros((count, kind.channel, kind.im_size, kind.im_size), dtype=np.uint8)
    labels = np.arange(count) % kind.num_classes
    pictures = Pictures(images, labels, images[:1], labels[:1], [str(n) for n in range(kind.num_classes)])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: datasets.RealData(name, pictures, torch.device("cpu")))
    if len(steps) == 3:
        write_experts(steps[0].options, sizes.named_network(options.model, kind))
    write_unions(options, kind)
    capsys.readouterr()
    for step, size in zip(steps, sizes.of_row(steps, training=count), strict=True):
        with reproduce.command_line(step.script, [*step.words, "--dry_run"]) as module:
            module.main()
        printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-2:])
        assert printed == {"steps": size.steps, "disk": f"{size.disk / 1e9:.2f} GB"}
        assert 0 < size.memory[0] <= size.memory[-1]


def test_memory_of_a_graph_is_what_the_matching_counts():
    """On the device meta as with values, where the blocks are not fused."""
    network = sizes.named_network("ConvNetW32", datasets.KINDS["CIFAR10"])
    found = []
    for device in ("meta", "cpu"):
        student = FlatNetwork(network.to_empty(device=device))
        student.network.fuses = False
        with torch.device(device):
            step = matching.Step(torch.arange(20), lambda x: x)
            labels = torch.zeros(20, dtype=torch.int64)
            found.append(
                matching.graph_bytes(student, torch.zeros(student.numel), torch.zeros(20, 3, 32, 32), labels, step)
            )
    sizes.named_network.cache_clear()
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_list_shows_every_row():
    lines = run_script(SCRIPT, "--list").stdout.splitlines()
    shown = [line.split()[0] for line in lines[2:] if line and not line.startswith((" ", "memory", "where", "steps"))]
    assert shown == reproduce.ROWS
    (line,) = (line for line in lines if line.startswith("cifar10-mtt-ipc10 "))
    assert "980000 optimiser steps" in line and line.endswith("6.53")  # 100 experts of 50 epochs of 196 steps


def test_every_published_row_has_a_shell_file(tmp_path):
    names = {row.replace("-", "_") + ".sh": row for row in PUBLISHED}
    found = {path.name for path in (PROJECT / "scripts").glob("*_ipc*.sh")}
    assert found == names.keys()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for name, row in names.items():
        file = PROJECT / "scripts" / name
        assert f'reproduce.py" {row} ' in file.read_text()
    done = subprocess.run([file, "--dry_run", "--root_log_dir", "my results"], cwd=tmp_path,
                          env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.startswith(f"python {PROJECT}/distill_idc.py") and "--results 'my results'" in done.stdout


SHORT_MTT = shlex.split(
    "--num_intervals 2 --num_experts 2 --train_epochs 4 --batch_train 32 --Iteration 2 --eval_it 1 --lr_lr 0 "
    "--syn_steps 2 --num_eval 1 --override_epoch_eval_train 1 --epoch_eval_train 1 --full_epochs 1"
)
SHORT_IDC = shlex.split(
    "--num-intervals 2 --niter 0.02 --inner_loop 1 --n_data 32 --batch_real 4 --epochs 2 --full_epochs 1"
)
SHORT = {"cifar10-mtt-ipc10": SHORT_MTT, "cifar10-idc-ipc10": SHORT_IDC, "cifar10-mtt-ipc10-oneshot": SHORT_MTT[2:]}


def arguments(row, tree, root):
    return [row, "--scale", "small", "--data_path", tree, "--buffer_path", root / "buffers",
            "--root_log_dir", root / "results", "--", *SHORT[row]]  # fmt: skip


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, cifar_tree):
    """Folders with a row's files by {row: folder}, made by the commands that --dry_run prints."""
    made = {}
    for row in ("cifar10-mtt-ipc10", "cifar10-idc-ipc10"):
        root = made[row] = tmp_path_factory.mktemp(row)
        words = arguments(row, cifar_tree, root)
        printed = run_script(SCRIPT, *words[: words.index("--")], "--dry_run", *words[words.index("--") :]).stdout
        commands = [line for line in printed.splitlines() if "--" in line and ".py --" in line]
        for command in commands:
            subprocess.run(shlex.split(command), cwd=PROJECT, check=True, capture_output=True)
        assert len(commands) == (3 if "mtt" in row else 2)
    return made


@pytest.mark.parametrize("row,number", [("cifar10-mtt-ipc10", signal.SIGTERM), ("cifar10-idc-ipc10", signal.SIGKILL)])
def test_an_interrupted_row_continues(row, number, reproduced, cifar_tree, tmp_path):
    assert run_killed(SCRIPT, arguments(row, cifar_tree, tmp_path), 2, 3.0, number) > 0
    assert differing(tmp_path, reproduced[row]) == []
    (report,) = tmp_path.rglob("report.json")
    (expected,) = reproduced[row].rglob("report.json")
    assert files.read_json(report)["models"] == files.read_json(expected)["models"]


@pytest.mark.parametrize("row", ["cifar10-mtt-ipc10", "cifar10-idc-ipc10"])
def test_a_finished_row_says_so(row, reproduced, cifar_tree):
    before = files_of(reproduced[row])
    done = run_script(SCRIPT, *arguments(row, cifar_tree, reproduced[row]))
    scripts = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert scripts == [step.script for step in steps_of(row)]
    assert "stage 1-2" in done.stdout and done.stdout.rstrip().endswith("done already")
    assert files_of(reproduced[row]) == before


def test_another_evaluation_is_made_again(reproduced, cifar_tree):
    words = [*arguments("cifar10-idc-ipc10", cifar_tree, reproduced["cifar10-idc-ipc10"]), "--repeat", 1]
    done = run_script(SCRIPT, *words)
    assert "done already" not in done.stdout and "report:" in done.stdout


def test_a_baseline_runs_from_experts_to_report(reproduced, cifar_tree, tmp_path):
    words = arguments("cifar10-mtt-ipc10-oneshot", cifar_tree, tmp_path)
    done = run_script(SCRIPT, *words, "--buffer_path", reproduced["cifar10-mtt-ipc10"] / "buffers")
    assert "2 experts are there already" in done.stdout
    assert "stage 1-1" in done.stdout and "random real" in done.stdout


def test_a_failing_step_ends_the_row_with_its_exit_status(cifar_tree, tmp_path):
    words = arguments("cifar10-mtt-ipc10", cifar_tree, tmp_path)
    done = run_script(SCRIPT, *words, "--max_start_epoch", 20, check=False)
    assert done.returncode == 2
    assert "expected trajectories of 21 entries at least" in done.stderr.splitlines()[-1]
    assert "distill_mtt.py" in done.stdout and "evaluate_mtt.py" not in done.stdout


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "expected the name of a row, or --list"),
        (["cifar10-mtt-ipc20"], "invalid choice: 'cifar10-mtt-ipc20'"),
        (["cifar10-mtt-ipc10", "--scale", "tiny"], "invalid choice: 'tiny'"),
        (["cifar10-idc-ipc10", "--", "--lr_teacher", "1"], "no script of cifar10-idc-ipc10 knows --lr_teacher"),
        (["cifar10-mtt-ipc10", "--", "-x", "1"], "expected an option like --seed after --, found '-x'"),
        (["cifar10-mtt-ipc10", "--", "--ipc", "0"], "expected a whole number >= 1, found '0'; see distill_mtt.py"),
        (["cifar10-mtt-ipc10", "--data_path", "/nowhere/at/all"], "CIFAR10 is not in /nowhere/at/all"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    with pytest.raises(SystemExit) as end:
        errors.run(reproduce.main)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0]
    assert not list(tmp_path.iterdir())

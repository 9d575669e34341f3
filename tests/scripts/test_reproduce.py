"""Rows of the paper's tables: the presets are the published commands, sizes are those of --dry_run, rows continue."""

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate_idc
import evaluate_mtt
from scripts import reproduce
from tests.conftest import PROJECT, files_of, run_script
from tests.support import killer
from tests.support.published import SEED_COMMANDS
from utils.run import errors, files

SCRIPT = "scripts/reproduce.py"
PUBLISHED = [row for row in reproduce.PRESETS if not row.endswith(("ipc100", "ipc200"))]
SEED_EXPERTS = [
    *["--dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data"] * 2,
    *["--dataset=CIFAR100 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data"] * 2,
    *["--dataset Tiny --model=ConvNetD4 --train_epochs 24  --data_path data/tiny-imagenet-200"] * 2,
]
SEED_IDC = [  # (options, folder) of the published readme
    (f"-d {dataset} --ipc {ipc} -f 2 --niter {niter} --reproduce --data_dir data --tag progressive --start-interval 0",
     f"{dataset}/conv3in_progressive_grad_mse_nd2000_cut_niter{niter}_factor2_lr0.005_mix_ipc{ipc}")
    for dataset, ipc, niter in [("cifar10", 2, 2000), ("cifar10", 10, 2000),
                                ("cifar100", 2, 2000), ("cifar100", 10, 1000)]
]  # fmt: skip


def steps_of(row, scale="full", extra=(), **given):
    given = {"data_path": None, "buffer_path": None, "root_log_dir": None, "preset": None} | given
    return reproduce.steps_of(row, argparse.Namespace(scale=scale, **given), reproduce.named(extra))


def differences(step, words):
    """Return {option: (in the row, in the published command)} where they differ."""
    row, published = vars(step.args), vars(reproduce.options_of(step.script, words.split()))
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
    # Tiny ImageNet's published commands leave out the number of networks: the paper's tables have five in every row.
    assert found.pop("num_experts", None) == ((5, 100) if "Tiny" in published[1] else None)
    # The published evaluation names the folder and leaves out, or misspells, options that only name it, too.
    assert found.keys() <= {"batch_syn", "syn_steps"}
    assert evaluate_mtt.experiment_folder(evaluation.args).name == folder


@pytest.mark.parametrize("number", range(4))
def test_rows_of_idc_are_the_published_commands(number):
    words, folder = SEED_IDC[number]
    distillation, evaluation = steps_of(PUBLISHED[len(SEED_COMMANDS) + number])
    assert differences(distillation, words) == {}
    assert differences(evaluation, words.replace("--start-interval 0", "")) == {"repeat": (3, 1)}
    assert str(evaluate_idc.result_folder(evaluation.args)) == f"results/{folder}"


@pytest.mark.parametrize("scale", ["full", "small"])
def test_a_baseline_learns_as_many_images_in_one_stage(scale):
    folders = set()
    for row in PUBLISHED:
        total = int(row.rpartition("ipc")[2])
        for name, stages in ((row, 5), (row + "-oneshot", 1)):
            distillation, evaluation = steps_of(name, scale)[-2:]
            args = distillation.args
            assert (args.ipc * args.num_intervals, args.num_intervals) == (total, stages)
            assert evaluation.args.ipc == args.ipc
            folder_of = evaluate_mtt.experiment_folder if "mtt" in row else evaluate_idc.result_folder
            folders.add(folder_of(evaluation.args))
        pdd, oneshot = (vars(steps_of(name, scale)[-2].args) for name in (row, row + "-oneshot"))
        free = {"ipc", "num_intervals", "tag", "lr_img_scaled"}
        free |= {"Iteration", "eval_it"} if scale == "small" and "Iteration" in pdd else set()
        if scale == "small" and "lr_img_scaled" in pdd:  # an image moves as far in both
            free.add("lr_img")
            assert pdd["lr_img_scaled"] == pytest.approx(oneshot["lr_img_scaled"])
        assert {key for key in pdd if pdd[key] != oneshot[key]} <= free
    assert len(folders) == 2 * len(PUBLISHED)


def test_list_shows_every_row(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no speed that was measured here
    lines = run_script(SCRIPT, "--list").stdout.splitlines()
    end = lines.index("")
    assert [line.split()[0] for line in lines[2:end] if not line.startswith(" ")] == reproduce.ROWS
    row, found = None, {}
    for line in lines[2:end]:
        start, script, *cells = re.split(r"\s{2,}", line.rstrip())
        row = start or row
        found[row, script] = cells
    # 100 experts of 50 epochs of 196 steps
    assert found["cifar10-mtt-ipc10", "buffer_mtt.py"] == ["980000 optimiser steps", "2.4 GB", "6.5 GB"]
    assert found["cifar10-mtt-ipc50-oneshot", "distill_mtt.py"] == [
        "1 stages of 5000 iterations of 30 student steps", "3.1 GB to 35.8 GB", "190.5 MB",
    ]  # fmt: skip
    assert found["tiny-mtt-ipc50", "evaluate_mtt.py"] == [
        "5 stages of 500 epochs for 5 networks of ConvNetD4", "7.8 GB", "1.0 MB",
    ]  # fmt: skip
    assert found["cifar100-idc-ipc10", "distill_idc.py"] == [
        "5 stages of 2000 outer iterations of 100 sweeps over 100 classes", "1.8 GB", "44.2 MB",
    ]  # fmt: skip


def test_the_command_line_prints_the_commands_of_a_row(tmp_path):
    words = [sys.executable, PROJECT / "scripts/reproduce.py", "cifar100-idc-ipc50", "--dry_run"]
    done = subprocess.run([*words, "--root_log_dir", "my results"], cwd=tmp_path, capture_output=True, text=True,
                          check=True)  # fmt: skip
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
            run_script(*shlex.split(command)[1:])
        assert len(commands) == (3 if "mtt" in row else 2)
    return made


@pytest.mark.parametrize("row", ["cifar10-mtt-ipc10", "cifar10-idc-ipc10"])
def test_sizes_are_those_of_dry_run(row, reproduced, cifar_tree, monkeypatch, capsys):
    monkeypatch.setitem(reproduce.TRAIN_IMAGES, "CIFAR10", 120)
    root = reproduced[row]
    folders = {"data_path": cifar_tree, "buffer_path": root / "buffers", "root_log_dir": root / "results"}
    steps = steps_of(row, "small", SHORT[row], **folders)
    for step, size in zip(steps, reproduce.sizes_of(steps), strict=True):
        monkeypatch.setattr(sys, "argv", [step.script, *step.words, "--dry_run"])
        capsys.readouterr()
        importlib.import_module(step.script.removesuffix(".py")).main()
        printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-2:])
        assert printed == {"steps": size.steps, "disk": files.human_bytes(size.disk)}


def run_until(line, words, stop):
    """Run reproduce.py and call `stop(process)` when it prints `line` or more; returns (exit status, its lines)."""
    started, lines = killer.Start(SCRIPT, [*words, "--checkpoint_minutes", 0]), []
    with open(started.output.fileno(), closefd=False) as output:
        for printed in output:
            lines.append(printed.rstrip())
            if stop and re.match(line, printed):
                stop(started.process)
                stop = None
    assert stop is None, lines
    return started.wait().status, lines


def results_of(root):
    """Return {path: content} of a row's files but those that hold its folders' names; of report.json the accuracies."""
    found = {path: content for path, content in files_of(root).items()
             if not path.endswith(("config.json", "buffer.json", "args.txt"))}  # fmt: skip
    (report,) = (path for path in found if path.endswith("report.json"))
    return found | {report: json.loads(found[report])["models"]}


def terminate(process):
    process.terminate()


def kill_step(process):
    """Kill the step that `process` runs, or the next one if it has just ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        pass
    os.kill(int(found[0]), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    "row,stop,status,moments",
    [
        ("cifar10-mtt-ipc10", terminate, 143, ["stage 1, iteration 0"]),
        ("cifar10-mtt-ipc10", terminate, 143, ["expert 1/2: test", "ConvNetW32, distilled"]),
        ("cifar10-idc-ipc10", kill_step, 137, ["stage 1, outer iteration 2:", r"\$ .*evaluate_idc.py"]),
    ],
)
def test_an_interrupted_row_continues(row, stop, status, moments, reproduced, cifar_tree, tmp_path):
    words = arguments(row, cifar_tree, tmp_path)
    for line in moments:
        ended, lines = run_until(line, words, stop)
        assert ended == status, lines
    assert run_script(SCRIPT, *words).stdout.count("$ ") == len(steps_of(row))
    assert results_of(tmp_path) == results_of(reproduced[row])


@pytest.mark.parametrize("code,status", [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_of_a_step_is_that_of_the_row(code, status):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert reproduce.run([sys.executable, "-c", code]) == status
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_signal_is_passed_on_and_ends_the_row():
    """The step takes the signal and ends well; the row must not go on. A Ctrl-C reaches one process group only."""
    step = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); "
        "os.kill(os.getppid(), signal.SIGINT); signal.sigwait([signal.SIGINT]); "
        "print(os.getpgid(0) != os.getpgid(os.getppid()))"
    )
    row = f"import sys; from scripts import reproduce; sys.exit(reproduce.run([sys.executable, '-c', {step!r}]))"
    done = subprocess.run([sys.executable, "-c", row], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "True\n"), done.stderr


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


@pytest.mark.long
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


def test_missing_data_are_one_line(tmp_path):
    words = ["cifar10-idc-ipc10", "--data_path", "/nowhere/at/all", "--root_log_dir", tmp_path]
    done = run_script(SCRIPT, *words, check=False)
    assert done.returncode == 2 and "/nowhere/at/all" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "expected the name of a row, or --list"),
        (["cifar10-mtt-ipc20"], "invalid choice: 'cifar10-mtt-ipc20'"),
        (["cifar10-mtt-ipc10", "--scale", "tiny"], "invalid choice: 'tiny'"),
        (["cifar10-idc-ipc10", "--", "--lr_teacher", "1"], "no script of cifar10-idc-ipc10 knows --lr_teacher"),
        (
            ["cifar10-idc-ipc10", "--preset", "datm"],
            "--preset datm: expected a row of PDD+MTT, found cifar10-idc-ipc10",
        ),
        (["cifar10-mtt-ipc10", "--preset", "mtt"], "invalid choice: 'mtt'"),
        (["cifar10-mtt-ipc10", "--", "-x", "1"], "expected an option like --seed after --, found '-x'"),
        (["cifar10-mtt-ipc10", "--", "--ipc", "0"], "expected a whole number >= 1, found '0'; see distill_mtt.py"),
        (["cifar10-mtt-ipc10", "--dry_run", "--", "--dataset", "SVHN"], "--dataset SVHN: sizes are known for CIFAR10"),
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


@pytest.mark.parametrize(
    "row,scale,widening,moving",
    [
        ("cifar10-mtt-ipc10", "full", "0:1,0:2,0:3,0:4,0:5", "0:1,1:2,2:3,3:4,4:5"),
        ("cifar100-mtt-ipc50", "full", "0:4,0:8,0:12,0:16,0:20", "0:4,4:8,8:12,12:16,16:20"),
        ("cifar10-mtt-ipc10", "small", "0:1,0:1,0:2,0:2,0:2", "0:1,0:1,0:2,1:2,1:2"),
        ("cifar10-mtt-ipc10-oneshot", "full", "0:5", "0:5"),
    ],
)
def test_presets_of_the_methods_that_followed(row, scale, widening, moving):
    plain, folders = steps_of(row, scale), set()
    for preset, windows in (("datm", widening), ("seqmatch", moving)):
        experts, distillation, evaluation = steps_of(row, scale, preset=preset)
        assert experts.args == plain[0].args
        begins_and_ends = [tuple(map(int, window.split(":"))) for window in windows.split(",")]
        assert list(distillation.args.start_epochs) == begins_and_ends
        soft = preset == "datm"
        assert distillation.args.soft_labels == soft and bool(distillation.args.grow_start_epoch) == soft
        stages = distillation.args.num_intervals
        expected = None if soft else pytest.approx([1 - stage / stages for stage in range(stages)])
        assert evaluation.args.stage_lr == expected
        free = {"soft_labels", "grow_start_epoch", "start_epochs", "stage_lr", "tag"}
        for step, before in zip((distillation, evaluation), plain[1:], strict=True):
            assert {key for key, value in vars(step.args).items() if value != vars(before.args)[key]} <= free
        folders.add(evaluate_mtt.experiment_folder(evaluation.args))
    assert len(folders | {evaluate_mtt.experiment_folder(plain[-1].args)}) == 3


def test_larger_sets_keep_no_graphs_and_every_row_has_other_architectures():
    for row in ("cifar10-mtt-ipc100", "cifar100-mtt-ipc200"):
        _, distillation, evaluation = steps_of(row)
        assert distillation.args.kept_steps == 0 and distillation.args.num_intervals == 5
        assert distillation.args.ipc * 5 == int(row.rpartition("ipc")[2])
        assert evaluation.args.eval_models is None
    for row in reproduce.PRESETS:
        evaluation = steps_of(f"{row}-cross")[-1]
        assert evaluation.args.eval_models == ["self", "AlexNet", "VGG11", "ResNet18"]
        plain = vars(steps_of(row)[-1].args) | {"eval_models": evaluation.args.eval_models}
        assert vars(evaluation.args) == plain  # the same result, evaluated with more networks

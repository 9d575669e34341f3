"""Every mistake of a user: one line on stderr, exit status 2, nothing on disk changed."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import EXPERIMENT, EXPERTS, PROJECT, SHORT, STAGES, call, files_of, run_script

B, D, E = "buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py"


@pytest.fixture
def place(tmp_path, buffers, distilled):
    """A copy of experts and results that a test may damage."""
    shutil.copytree(buffers, tmp_path / "buffers")
    shutil.copytree(distilled.parent.parent, tmp_path / "logs")
    return tmp_path


def refused(script, arguments, place, words, capsys, monkeypatch):
    before = files_of(place)
    status, message = call(script, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    lines = [line for line in message.splitlines() if line.startswith("error:")]
    assert status == 2, message
    assert len(lines) == 1 and message.splitlines()[-1] == lines[0] and "Traceback" not in message
    assert re.search(words, lines[0]), lines[0]
    assert files_of(place) == before


CASES = [
    (B, ["--dataset", "Foo"], "invalid choice: 'Foo'"),
    (B, [*EXPERTS, "--model", "Foo"], "unknown network 'Foo'"),
    (B, [*EXPERTS, "--model", "VGG11"], "at least 32 pixels"),
    (B, [*EXPERTS, "--num_experts", "0"], "expected a whole number >= 1"),
    (B, [*EXPERTS, "--lr_teacher", "nan"], "expected a number"),
    (B, [*EXPERTS, "--dsa_strategy", "color_blur"], "expected names out of"),
    (B, [*EXPERTS, "--dsa", "maybe"], "expected True or False"),
    (B, [*EXPERTS, "--device", "cuda:7"], "not usable here"),
    (B, [*EXPERTS, "--train_epochs", "9", "--save_interval", "2", "--num_experts", "3"], "train_epochs 4 there, 9 now"),
    (B, ["--dataset", "CIFAR10", "--data_path", "/nowhere/at/all"], "CIFAR10 is not in"),
    (B, ["--dataset", "Tiny", "--data_path", "/nowhere/at/all"], "expected train/<class>/… and test/<class>/… of Tiny"),
    (D, [*STAGES, "--ipc", "0"], "expected a whole number >= 1"),
    (D, [*STAGES, "--ipc", "-3"], "expected a whole number >= 1"),
    (D, [*STAGES, "--ipc", "2000"], "class '0' of Digits: expected at least 2000 training images"),
    (D, [*STAGES, "--zca", "--texture"], "--zca together with --texture"),
    (D, [*STAGES, "--start_interval", "4"], "beyond --num_intervals 3"),
    (D, [*STAGES, "--pix_init", "zeros"], "invalid choice"),
    (D, [*STAGES, "--eval_mode", "X"], "invalid choice"),
    (D, [*STAGES, "--eval_mode", "M"], "at least"),
    (D, [*STAGES, "--kept_steps", "-1"], "expected a whole number >= 0"),
    (D, [*STAGES, "--max_start_epoch", "20"], "expected trajectories of 22 entries at least .* found 5"),
    (D, [*STAGES, "--lr_imgs", "1"], r"unrecognized arguments: --lr_imgs 1 \(did you mean --lr_img\?\); see"),
    (D, [*STAGES, "--nonsense", "1"], "unrecognized arguments: --nonsense 1; see"),
    (D, [*STAGES, "--size", "32"], r"unrecognized arguments: --size 32 \(did you mean --res\?\)"),
    (E, [*STAGES, "--root-log-dir", "x"], r"unrecognized arguments: --root-log-dir x \(did you mean --save_path\?\)"),
    (D, [*STAGES, "--num_interv", "3"], r"\(did you mean --num_intervals\?\)"),  # no option is guessed
    (D, [*STAGES, "--model", "ConvNetW64"], "expected replay_buffer_0.pt"),
    (D, [*STAGES, "--Iteration", "7", "--lr_img", "100", "--num_eval", "3"], "Iteration 5 there, 7 now; num_eval 2 th"),
    (D, [*STAGES, "--soft_labels", "--texture"], "--soft_labels together with --texture"),
    (D, [*STAGES, "--soft_init", "teacher"], "invalid choice: 'teacher'"),
    (D, [*STAGES, "--soft_temperature", "0"], "expected a number > 0.0, found '0'"),
    (D, [*STAGES, "--lr_label", "1"], "--lr_label: changes nothing without --soft_labels; leave it out"),
    (D, [*STAGES, "--lr_label", "-1"], "expected a number >= 0.0, found '-1'"),
    (D, [*STAGES, "--soft_labels"], "soft_labels False there, True now"),
    (D, [*STAGES, "--ema", "1"], "expected a number >= 0.0 <= 0.9999, found '1'"),
    (D, [*STAGES, "--clip_grad", "0"], "expected a number > 0.0, found '0'"),
    (D, [*STAGES, "--syn_lr_form", "log"], "invalid choice: 'log'"),
    (D, [*STAGES, "--ema", "0.9", "--clip_grad", "2"], "ema 0.0 there, 0.9 now|clip_grad None there, 2.0 now; ema"),
    (D, [*STAGES, "--ipc", "2,x,1"], "argument --ipc: expected a whole number >= 1, found 'x' in '2,x,1'"),
    (D, [*STAGES, "--ipc", "1,1,2000"], "class '0' of Digits: expected at least 2000 training images"),
    (D, [*STAGES, "--ipc", "2,1"], "--ipc: expected 3 values .--num_intervals., found 2"),
    (D, [*STAGES, "--start_epochs", "1"], "expected windows a:b with a < b joined by commas, found '1'"),
    (D, [*STAGES, "--start_epochs", "2:2"], "expected windows a:b with a < b joined by commas, found '2:2'"),
    (D, [*STAGES, "--start_epochs", "0:1,0:2"], "--start_epochs: expected 3 values .--num_intervals., found 2"),
    (D, [*STAGES, "--start_epochs", "0:9"], "expected trajectories of 11 entries at least .* found 5"),
    (D, [*STAGES, "--grow_start_epoch", "-1"], "expected a whole number >= 0"),
    (E, [*STAGES, "--stage_lr", "1,0.5"], "--stage_lr: expected 3 values .--num_intervals., found 2"),
    (E, [*STAGES, "--stage_lr", "1,0.5,0"], "expected a number > 0.0, found '0' in '1,0.5,0'"),
    (E, [*STAGES, "--num_intervals", "4"], "expected 4 finished stages, found stages 1 to 3"),
    (
        D,
        [*STAGES, "--model", "ConvNetBN", "--slice_size", "2"],
        "--slice_size with ConvNetBN: expected a network without",
    ),
    (E, [*STAGES, "--zca", "--override_load_path", EXPERIMENT], "made without --zca; leave --zca out"),
    (E, [*STAGES, "--override_load_path", EXPERIMENT, "--ipc", "2"], "made with --ipc 1, found --ipc 2; give --ipc 1"),
    (E, [*STAGES, "--model", "ConvNet", "--override_load_path", EXPERIMENT], "made with --model ConvNetW32, found"),
    (E, [*STAGES, "--override_load_path", "no/such/folder/"], "expected the folder of a distillation"),
    (E, [*STAGES, "--override_load_path", "nothing"], "expected the folder of a distillation"),
    (E, [*STAGES, "--dataset", "CIFAR10", "--data_path", "/nowhere"], "expected the folder of a distillation"),
]


@pytest.mark.parametrize("script,arguments,words", CASES, ids=[f"{s[0]}-{w[:30]}" for s, _, w in CASES])
def test_mistakes_on_the_command_line(script, arguments, words, place, capsys, monkeypatch):
    paths = ["--buffer_path", place / "buffers"]
    paths += {B: [], D: ["--root_log_dir", place / "logs"], E: ["--save_path", place / "logs"]}[script]
    refused(script, [*(SHORT if script == D else []), *arguments, *paths], place, words, capsys, monkeypatch)
    assert not Path("/nowhere").exists()


def test_a_later_stage_without_the_one_before(place, capsys, monkeypatch):
    folder = place / "logs" / "Digits" / EXPERIMENT / "interval2_epoch3-4"
    arguments = [*STAGES, *SHORT, "--start_interval", "3", "--buffer_path", place / "buffers", "--root_log_dir",
                 place / "logs"]  # fmt: skip
    summary = (folder / "stage.json").read_text()
    (folder / "stage.json").write_text(summary.replace('"complete": true', '"complete": false'))
    refused(D, arguments, place, "expected a finished stage, found it interrupted", capsys, monkeypatch)
    (folder / "stage.json").write_text(summary)
    (folder / "images_best.pt").unlink()
    refused(D, arguments, place, "images_best.pt: expected images", capsys, monkeypatch)
    (folder / "replay_buffer_0.pt").unlink()
    refused(D, arguments, place, "expected replay_buffer_0.pt", capsys, monkeypatch)


@pytest.mark.parametrize("lr_img,words", [("1e30", "became NaN or infinite"), ("1e38", "became NaN or infinite")])
def test_values_that_become_infinite_stop_the_run_and_keep_the_last_good_files(lr_img, words, place, capsys,
                                                                               monkeypatch):  # fmt: skip
    arguments = [*STAGES, *SHORT, "--lr_img", lr_img, "--buffer_path", place / "buffers", "--root_log_dir",
                 place / "new"]  # fmt: skip
    status, message = call(D, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and re.search(rf"iteration \d+: .*{words}.*--lr_img", message.splitlines()[-1])
    (best,) = (place / "new").rglob("images_best.pt")
    assert bool(torch.load(best, weights_only=True).isfinite().all())


def test_a_negative_learning_rate_stops_the_run(place, capsys, monkeypatch):
    arguments = [*STAGES, *SHORT, "--lr_lr", "1e6", "--buffer_path", place / "buffers", "--root_log_dir", place / "new"]
    status, message = call(D, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and re.search("lower --lr_(lr|img)", message.splitlines()[-1])


def test_a_folder_in_use_is_left_alone(place):
    import fcntl

    with open(place / "buffers" / "Digits" / "ConvNetW32" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_script(B, *EXPERTS, "--num_experts", 5, "--save_interval", 2, "--train_epochs", 4, "--buffer_path",
                          place / "buffers", check=False)  # fmt: skip
    assert done.returncode == 2 and "another process is writing there" in done.stderr


def test_one_line_from_a_real_process():
    done = run_script(D, "--dataset", "Digits", "--buffer_path", "/nowhere", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: /nowhere/Digits/ConvNet: expected replay")
    assert not (PROJECT / "logged_files").exists()

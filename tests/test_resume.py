"""A killed run, started again, ends with the files of an uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal

import pytest

from tests.conftest import EXPERIMENT, EXPERTS, SHORT, STAGES, run_script
from tests.killer import differing, run_killed
from tests.test_idc import SHORT as IDC

KILLS = int(os.environ.get("PDD_KILLS", "2"))  # of each script and signal; the longer mode sets 100
SIGNALS = [signal.SIGKILL, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_buffer(number, buffers, tmp_path):
    arguments = [*EXPERTS, "--num_experts", 3, "--save_interval", 2, "--train_epochs", 4, "--buffer_path", tmp_path]
    assert run_killed("buffer_mtt.py", arguments, KILLS, 1.0, number) > 0
    assert differing(tmp_path, buffers) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_distill_mtt(number, buffers, distilled, tmp_path):
    arguments = [*STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    assert run_killed("distill_mtt.py", arguments, KILLS, 3.0, number) > 0
    reference = tmp_path / "reference"
    shutil.copytree(
        distilled, reference, ignore=lambda *_: ["accuracy.png", "net_ConvNetW32_0.pt", "net_ConvNetW32_1.pt"]
    )
    assert differing(tmp_path / "Digits" / EXPERIMENT, reference) == []


def test_evaluate_mtt(buffers, distilled, tmp_path):
    shutil.copytree(distilled.parent, tmp_path / "Digits")
    arguments = [*STAGES, "--num_experts", 2, "--num_eval", 2, "--epoch_eval_train", 20, "--full_epochs", 3,
                 "--buffer_path", buffers, "--save_path", tmp_path]  # fmt: skip
    report = tmp_path / "Digits" / EXPERIMENT / "report.json"
    run_script("evaluate_mtt.py", *arguments)
    expected = json.loads(report.read_text())
    report.unlink()
    assert run_killed("evaluate_mtt.py", arguments, KILLS, 2.0) > 0
    found = json.loads(report.read_text())
    assert found["models"] == expected["models"]


@pytest.fixture(scope="module")
def idc(tmp_path_factory):
    root = tmp_path_factory.mktemp("idc")
    run_script("distill_idc.py", *IDC, "--batch_real", 8, "--results", root)
    return root


@pytest.mark.parametrize("number", SIGNALS)
def test_distill_idc(number, idc, tmp_path):
    arguments = [*IDC, "--batch_real", 8, "--results", tmp_path]
    assert run_killed("distill_idc.py", arguments, KILLS, 2.0, number) > 0
    assert differing(tmp_path, idc) == []


def test_evaluate_idc(idc, tmp_path):
    shutil.copytree(idc, tmp_path / "r")
    arguments = [*IDC, "--batch_real", 8, "--results", tmp_path / "r", "--epochs", 20, "--full_epochs", 3]
    run_script("evaluate_idc.py", *arguments)
    (report,) = (tmp_path / "r").rglob("report.json")
    expected = json.loads(report.read_text())
    report.unlink()
    assert run_killed("evaluate_idc.py", arguments, KILLS, 2.0) > 0
    assert json.loads(report.read_text())["models"] == expected["models"]

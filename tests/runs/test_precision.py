"""--precision bf16 through the command line: results record it, and no run is continued in another one."""

import json

import pytest

from tests.conftest import run_script
from tests.support import small


def run(script, root, *more, check=True):
    return run_script(script, *small.arguments(script, root), *more, check=check)


def config_of(path):
    content = json.loads(path.read_text())
    return content.get("options") or content["config"]


def test_mtt_in_bfloat16(tmp_path):
    for script in (small.BUFFER, small.DISTILL, small.EVALUATE):
        run(script, tmp_path, "--precision", "bf16")
    experiment = tmp_path / small.EXPERIMENT
    for path in (
        tmp_path / small.EXPERT_FOLDER / "buffer.json",
        experiment / "config.json",
        experiment / "report.json",
    ):
        assert config_of(path)["precision"] == "bf16"
    for script in (small.BUFFER, small.DISTILL):
        done = run(script, tmp_path, check=False)
        assert done.returncode == 2 and "precision bf16 there, fp32 now" in done.stderr and done.stderr.count("\n") == 1
    assert "done" in run(small.DISTILL, tmp_path, "--bf16").stdout  # as earlier versions spelled it


def test_idc_in_bfloat16(tmp_path):
    for script in (small.DISTILL_IDC, small.EVALUATE_IDC):
        run(script, tmp_path, "--precision", "bf16")
    folder = tmp_path / small.IDC_FOLDER
    assert config_of(folder / "config.json")["precision"] == config_of(folder / "report.json")["precision"] == "bf16"
    done = run(small.DISTILL_IDC, tmp_path, check=False)
    assert done.returncode == 2 and "precision bf16 there, fp32 now" in done.stderr


@pytest.mark.parametrize("flags,noted", [("fpu avx512f", True), ("fpu avx512_bf16", False), ("amx_bf16", False)])
def test_a_processor_without_bfloat16_units_is_noted(flags, noted, monkeypatch, capsys):
    from utils.run import device

    monkeypatch.setattr(device.Path, "read_text", lambda _: f"flags : {flags}\n")
    device.setup_device("cpu", "bf16")
    assert ("it will not be quicker" in capsys.readouterr().err) == noted
    device.setup_device("cpu")
    assert capsys.readouterr().err == ""

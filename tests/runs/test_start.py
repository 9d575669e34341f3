"""What every run pays before it does anything."""

import subprocess
import sys

import pytest

from tests.conftest import PROJECT

SLOW = ("torchvision", "kornia", "matplotlib", "scipy", "sklearn", "wandb", "torch._dynamo")  # a second each, or so
SCRIPTS = ("buffer_mtt", "distill_mtt", "evaluate_mtt", "distill_idc", "distill_dm", "evaluate_idc")


def test_scripts_import_only_what_all_of_their_runs_need():
    code = f"import sys, {', '.join(SCRIPTS)}; print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["quickstart.sh", "quickstart_idc.sh", "quickstart_cifar10.sh"])
def test_a_quickstart_asked_for_help_begins_nothing(name, tmp_path):
    done = subprocess.run(["bash", PROJECT / "scripts" / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("PDD+") and done.stderr == ""
    assert not list(tmp_path.iterdir())

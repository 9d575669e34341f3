"""The quickstart on CIFAR-10, on a few images instead; some minutes."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tests.support.quickstart import STAMP


@pytest.mark.slow
def test_experts_stages_and_evaluation_end_in_a_table_and_a_picture(cifar_tree, tmp_path):
    if sys.prefix == sys.base_prefix or not (STAMP.exists() or STAMP.with_name(".pdd-requirements-dev.txt").exists()):
        pytest.skip("the scripts would install into another environment than this one")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", PROJECT / "scripts" / "quickstart_cifar10.sh", cifar_tree, tmp_path],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:4] == ["ConvNetW32", "stage", "1-5", "10"] for line in done.stdout.splitlines())
    (report,) = tmp_path.rglob("report.json")
    assert report.with_name("accuracy.png").exists()
    assert [stage["ipc_total"] for stage in json.loads(report.read_text())["stages"]] == [2, 4, 6, 8, 10]

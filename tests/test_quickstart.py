"""The README's first commands, run as they stand there; each takes about two minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

STAMP = Path(sys.prefix) / ".pdd-requirements.txt"


@pytest.mark.parametrize("script,network", [("quickstart.sh", "ConvNetW32"), ("quickstart_idc.sh", "conv2in_w0.25")])
def test_distilled_digits_teach_more_than_random_ones(script, network, tmp_path):
    if sys.prefix == sys.base_prefix or not (STAMP.exists() or STAMP.with_name(".pdd-requirements-dev.txt").exists()):
        pytest.skip("the scripts would install into another environment than this one")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", PROJECT / "scripts" / script, tmp_path],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{network}  stage 1-3          3" in done.stdout
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())["models"][network]
    last, random, full = (row["accuracy_mean"] for row in (found["stages"][-1], found["random"], found["full"]))
    assert random + 3 < last < full

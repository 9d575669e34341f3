"""Run a quickstart as the README says it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

STAMP = Path(sys.prefix) / ".pdd-requirements.txt"


def check(script, network, folder):
    """Run `script` and check that the distilled digits teach more than random ones."""
    if sys.prefix == sys.base_prefix or not (STAMP.exists() or STAMP.with_name(".pdd-requirements-dev.txt").exists()):
        pytest.skip("the scripts would install into another environment than this one")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", PROJECT / "scripts" / script, folder.name],
        cwd=folder.parent,
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:4] == [network, "stage", "1-3", "3"] for line in done.stdout.splitlines())
    (report,) = folder.rglob("report.json")
    found = json.loads(report.read_text())["models"][network]
    last, random, full = (row["accuracy_mean"] for row in (found["stages"][-1], found["random"], found["full"]))
    assert random + 3 < last < full

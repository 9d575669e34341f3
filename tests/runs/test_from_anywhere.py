"""README's examples from a folder outside the repository, beside a `utils` of the user's own."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import sysconfig

import pytest

from tests.conftest import PROJECT, make_tree

README = (PROJECT / "README.md").read_text()
# Added to the commands of README's own-images example, so that they end in seconds.
SHORTER = [
    ("buffer_mtt.py", "--num_experts 2 --train_epochs 12"),
    ("distill_mtt.py", "--Iteration 2 --num_eval 1 --override_epoch_eval_train 2"),
    ("evaluate_mtt.py", "--num_experts 1 --num_eval 1 --epoch_eval_train 2 --skip_full"),
    ("distill_idc.py", "--niter 0.1 --inner_loop 5 --epochs 5"),
    ("evaluate_idc.py", "--niter 0.1 --inner_loop 5 --epochs 5 --repeat 1 --skip_full"),
    ("distill_dm.py", "--Iteration 2 --epochs 5"),
    ("evaluate_idc.py", "--Iteration 2 --epochs 5 --repeat 1 --skip_full"),
]


def example(heading, language):
    """Return the first code block of a language below a heading of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A user's folder with a package called utils and images in class folders."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "utils").mkdir()
    (folder / "utils" / "__init__.py").write_text("raise ImportError('the utils of the user')\n")
    make_tree(folder / "pets", ["cat", "dog", "fox"], 12, 3, 32)
    return folder


@pytest.fixture(scope="module")
def own_results(elsewhere):
    """The user's folder after README's own-images commands, made short."""
    commands = [shlex.split(line) for line in example("Your own images", "bash").splitlines() if line]
    for words, (script, shorter) in zip(commands, SHORTER, strict=True):
        assert words[1] == script
        run = [sys.executable, PROJECT / script, *words[2:], *shorter.split()]
        done = subprocess.run(run, cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return elsewhere


@pytest.mark.long
def test_own_images_go_through_all_scripts(own_results):
    reports = [json.loads(path.read_text()) for path in own_results.glob("*/**/report.json")]
    assert [found["dataset"] for found in reports] == ["pets"] * 3


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="pip needs setuptools to install from here")
def test_a_network_is_trained_on_a_result_with_the_installed_package(own_results, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "-e", PROJECT]
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "torch_and_others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True, capture_output=True)
    (own_results / "train.py").write_text(example("Using the distilled data", "python"))
    check = (
        "import runpy, sys; found = runpy.run_path('train.py'); print(len(found['data']), 'networks' in sys.modules)"
    )
    done = subprocess.run([python, "-c", check], cwd=own_results, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy, loaded = done.stdout.splitlines()
    assert 0 <= float(re.fullmatch(r"test accuracy (.*) %", accuracy)[1]) <= 100 and loaded == "9 False"


def test_an_export_is_made_from_anywhere(elsewhere, distilled):
    command = [sys.executable, PROJECT / "scripts" / "export.py", distilled, "--format", "png", "--out", "pngs"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((elsewhere / "pngs").glob("*/*.png"))) == 30

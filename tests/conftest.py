"""Runs of the scripts that many tests look at, made once."""

import os
import shutil
import signal
import sys
from pathlib import Path

# Runs are compared bit for bit, which CPUs alone can promise; tests/runs/test_gpu.py is the exception.
if not os.environ.get("PDD_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from filelock import FileLock

PROJECT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # images of 8x8 pixels; tests often share a machine
os.environ["WANDB_MODE"] = "disabled"
os.fsync = lambda file: None  # the tests kill processes, not the machine; a busy disk takes seconds for each

EXPERTS = ["--dataset", "Digits", "--model", "ConvNetW32", "--lr_teacher", "0.03", "--batch_train", "128"]
STAGES = [
    *EXPERTS,
    "--ipc",
    "1",
    "--num_intervals",
    "3",
    "--max_start_epoch",
    "2",
    "--expert_epochs",
    "2",
    "--syn_steps",
    "4",
    "--lr_img",
    "100",
    "--lr_lr",
    "1e-05",
]
SHORT = ["--Iteration", "5", "--eval_it", "2", "--num_eval", "2", "--override_epoch_eval_train", "4"]
EXPERIMENT = "Digits_ConvNetW32_S_ipc1_max2_syn4_real2_img100.0_1e-05_0.03_increase"


def pytest_addoption(parser):
    parser.addoption("--damage_table", help="write what tests/faults/test_damage.py tried to this file, as Markdown")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process is left with one of them at the end."""
    longest = ("test_quickstart.py", "test_quickstart_idc.py", "test_reproduce.py", "test_distributed.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(autouse=True)
def own_handlers():
    """A script that ends inside a test leaves no signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_configure(config):
    config.damage_rows = []


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--damage_table"), session.config.damage_rows
    if path:
        lines = ["| script | input | damages | answer to the first |", "|---|---|---|---|"]
        for script, name in dict.fromkeys(row[:2] for row in rows):
            tried = [row[2:] for row in rows if row[:2] == (script, name)]
            cells = (script, name, f"{len(tried)}: {', '.join(damage for damage, _ in tried)}", tried[0][1])
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        Path(path).write_text("\n".join([*lines, "", f"{len(rows)} inputs in all."]) + "\n")


def run_script(script, *arguments, check=True):
    """Run a script of the project; returns the finished process. It begins as those of tests/support/killer.py do."""
    from tests.support import killer

    done = killer.run_plain(script, arguments)
    if check and done.returncode:
        raise AssertionError(f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def call(script, *arguments, capsys=None, monkeypatch=None):
    """Run a script's main in this process; returns (exit status, stderr). Quicker than a new process."""
    import importlib

    from utils.run import errors

    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    status = 0
    try:
        errors.run(module.main, getattr(module, "OOM_ADVICE", "fewer images"))
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def files_of(folder):
    """Return {relative path: bytes} of all files below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def make_tree(root, classes, train, test, size=32, part="test", seed=0, wrong=0.0):
    """Write class folders of small PNG images that a network can learn: a coarse pattern of each class, and noise.

    The share `wrong` of them shows the pattern of any class, so that experts go on moving however long they train.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    patterns = {name: rng.integers(40, 216, (4, 4, 3)) for name in classes}
    for folder, count in (("train", train), (part, test)):
        for name in classes:
            where = Path(root) / folder / name
            where.mkdir(parents=True)
            for number in range(count):
                shown = classes[rng.integers(len(classes))] if wrong and rng.random() < wrong else name
                pattern = np.kron(patterns[shown], np.ones((size // 4, size // 4, 1), dtype=int))
                pixels = (pattern + rng.integers(-40, 41, pattern.shape)).astype(np.uint8)
                Image.fromarray(pixels).save(where / f"{number:04d}.png")
    return Path(root)


@pytest.fixture(scope="session")
def cifar_tree(tmp_path_factory):
    """A small CIFAR-10 in class folders: 12 images of each class to train, 2 to test.

    One for all processes of pytest-xdist, so that one of them fits its ZCA transform.
    """
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    with FileLock(folder / "cifar10.lock"):
        return folder / "cifar10" if (folder / "cifar10").exists() else make_tree(folder / "cifar10", names, 12, 2)


@pytest.fixture(scope="session")
def buffers(tmp_path_factory):
    """Three experts on Digits, in two files."""
    root = tmp_path_factory.mktemp("buffers")
    run_script(
        "buffer_mtt.py", *EXPERTS, "--num_experts", 3, "--save_interval", 2, "--train_epochs", 4, "--buffer_path", root
    )
    return root


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, buffers):
    """Three stages on Digits; returns the experiment's folder."""
    root = tmp_path_factory.mktemp("logged_files")
    run_script("distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", root)
    return root / "Digits" / EXPERIMENT


@pytest.fixture(scope="session")
def whitened(tmp_path_factory, cifar_tree):
    """One stage on the small CIFAR-10 with --zca; returns the experiment's folder."""
    root = tmp_path_factory.mktemp("whitened")
    common = ["--dataset", "CIFAR10", "--data_path", cifar_tree, "--zca", "--model", "ConvNetW32", "--lr_teacher", 0.01]
    run_script("buffer_mtt.py", *common, "--num_experts", 1, "--train_epochs", 3, "--buffer_path", root / "b")
    assert (root / "b" / "CIFAR10" / "ConvNetW32" / "replay_buffer_0.pt").exists()
    stages = ["--ipc", 1, "--num_intervals", 1, "--max_start_epoch", 2, "--expert_epochs", 1, "--syn_steps", 2]
    stages += ["--lr_lr", 0]  # random pixels teach no learning rate
    run_script("distill_mtt.py", *common, *stages, *SHORT, "--buffer_path", root / "b", "--root_log_dir", root / "l")
    return root / "l" / "CIFAR10" / "CIFAR10_ConvNetW32_S_ipc1_max2_syn2_real1_img1000_0.0_0.01_increase_zca"


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The smallest runs of all scripts, uninterrupted (`tests.support.small.Reference`)."""
    from tests.support import killer, small

    root = tmp_path_factory.mktemp("reference")
    made = small.Reference(root)
    made.distilled.mkdir()
    for script in (*small.DISTILLATIONS, small.EVALUATE, small.EVALUATE_IDC):
        place = made.evaluated if script.startswith("evaluate") else made.distilled
        if place is made.evaluated and not place.exists():
            shutil.copytree(made.distilled, place)
        ended = made.runs[script] = killer.run(script, small.arguments(script, place))
        assert ended.status == 0, ended.lines
    return made


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

"""benchmarks/: what the harness measures and how it ends, and that every benchmark runs and prints its table."""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import harness
from scripts import reproduce
from tests.conftest import PROJECT, run_script
from utils.augment import OPERATIONS

OPTIONS = argparse.Namespace(pairs=2, threads=1, device="cpu")
GPUS = [(1, 1), (8, 1), (64, 1), (8, 8), (64, 8), (64, 64)]
TABLES = {
    "breakdown": [
        ["experts", "matching", "in-stage evaluation", "transitions", "final evaluation"],
        ["sweeps", "network updates", "earlier-union training", "in-stage evaluation", "final evaluation"],
    ],
    "checkpoint": [["every 10 minutes, the default", "every 2 seconds"], [None]],
    "dsa": [list(OPERATIONS)],
    "evaluation": [["2 x ConvNetW32, 4 images, 2 epochs"]],
    "experts": [["ConvNet, 16 images", "ConvNetW32, 16 images"]],
    "idc_sweep": [["10 classes, ConvNet"]],
    "launches": [
        [
            "student step with its adjoint, all graphs kept (ConvNetW32)",
            "student step with its adjoint, constant memory (ConvNetW32)",
            "training step (ConvNetW32)",
            "augmented batch of 4 images",
            "augmented batch of 2 images",
            "gradient matching of IDC's sweep, 10 classes (ConvNet)",
        ]
    ],
    "loading": [["10 classes of 32 pixels", "200 classes of 64 pixels"]],
    "matching": [["4 digits, 2 a step, 2 steps, ConvNetW32"]],
    "memory": [
        [
            "ConvNetW32, 2 steps: unrolling -> constant memory",
            "ConvNetW32, 2 steps: all graphs kept -> constant memory",
            "ConvNetW32, constant memory: 10 times 1 steps -> 10 steps",
            "Digits, 8 images a minibatch, 2 steps: constant memory -> in slices of 2",
        ]
    ],
    "scaling": [[None] * len(GPUS)],
}
LONG = ("breakdown", "checkpoint", "experts", "idc_sweep", "loading", "memory")


def works(device):
    return lambda: sum(range(1000))


def starts_a_process(device):
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    assert child.exitcode == 0
    return works(device)


def dies(device):
    raise ValueError("no data here")


def dies_at_work(device):
    def work():
        raise ValueError("no room here")

    return work


def test_a_pair_of_timings():
    row = harness.pair("a row", works, starts_a_process, OPTIONS)
    assert row["label"] == "a row" and row["pairs"] == 2 and row["baseline_s"] > 0
    assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert row["baseline_peak"] >= 0 and row["project_peak"] >= 0
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("broken", [dies, dies_at_work])
def test_a_process_that_ends_early_ends_the_benchmark(broken):
    with pytest.raises(SystemExit, match=f"error: a row: the process of {broken.__name__} ended early"):
        harness.pair("a row", works, broken, OPTIONS)
    assert not multiprocessing.active_children()


def test_data_that_are_not_there_end_a_benchmark_with_one_line(tmp_path):
    (tmp_path / "train").mkdir()
    done = run_script("benchmarks/experts.py", "--data_path", tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in TABLES]
)
def test_every_benchmark_prints_its_tables(name):
    done = run_script(f"benchmarks/{name}.py", "--smallest", "--json")
    tables = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [[row.get("label") for row in table["rows"]] for table in tables] == TABLES[name]
    for table in tables:
        lines = done.stdout.splitlines()
        title = lines.index(f"{table['title']} ({table['machine']})")
        assert len(lines[title:]) >= 2 + len(table["rows"])
        for row in table["rows"]:
            numbers = {key: value for key, value in row.items() if key not in ("label", "script")}
            assert numbers and all(math.isfinite(value) and value >= 0 for value in numbers.values())
            assert all(value > 0 for key, value in numbers.items() if key.endswith("_s") and key != "sums_s")
            assert row.get("label", "") in lines[title + 2 + table["rows"].index(row)]


@pytest.mark.parametrize("row", ["cifar10-dm-ipc10", "nothing"])
def test_rows_that_are_not_broken_down_are_refused(row):
    done = run_script("benchmarks/breakdown.py", "--smallest", "--rows", row, check=False)
    assert done.returncode == 2 and f"--rows {row}: expected rows of PDD+MTT or PDD+IDC" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_compiled_student_step_needs_few_kernels():
    done = run_script("benchmarks/launches.py", "--compile", "--json")
    *_, row = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert 0 < row["project"] <= 80, row


def test_measured_times_stand_in_the_list_of_rows(tmp_path, monkeypatch):
    options = argparse.Namespace(scale="full", data_path=None, buffer_path=None, root_log_dir=None, preset=None)
    rows = {row: reproduce.steps_of(row, options, {}) for row in ("cifar10-mtt-ipc10", "cifar10-mtt-ipc50")}
    monkeypatch.setattr(reproduce, "SPEED", tmp_path / "speed.json")
    assert "time" not in reproduce.table(rows, "full").splitlines()[0]
    times = {"buffer_mtt.py": 7200.0, "distill_mtt.py": 5400.0, "evaluate_mtt.py": 36.0}
    known = {"cifar10-mtt-ipc10 full": {"on": "an abacus", "seconds": times}}
    (tmp_path / "speed.json").write_text(json.dumps(known))
    head, _, *lines = reproduce.table(rows, "full").splitlines()
    assert "time" not in reproduce.table(rows, "full", timed=False).splitlines()[0]
    assert head.endswith("time") and [line.rstrip().endswith(" h") for line in lines[:6]] == [True] * 3 + [False] * 3
    assert [line.split()[-2] for line in lines[:3]] == ["2", "1.5", "0.01"] and "an abacus" in lines[-1]
    assert "time" not in reproduce.table(rows, "small").splitlines()[0]


def test_the_estimate_of_many_gpus_covers_all_shapes():
    from benchmarks import scaling

    rows = scaling.estimate(parameters=1e6, operations=15e12, images=1e6, batch=64, steps=2)
    assert [(row["gpus"], row["experts"]) for row in rows] == GPUS
    assert rows[0]["iteration_s"] == 2.0 and rows[0]["rate"] == 1.0  # 15 TFLOP a step at 15 TFLOP/s, nothing to sum
    assert rows[1]["compute_s"] == pytest.approx(rows[0]["compute_s"] / 8) and rows[1]["sums_s"] > 0


@pytest.mark.parametrize(
    "name, number, status",
    [
        pytest.param("checkpoint", signal.SIGTERM, 143, marks=pytest.mark.long),
        ("matching", signal.SIGTERM, 143),
        ("matching", signal.SIGKILL, -9),
    ],
)
def test_a_signal_ends_a_benchmark_with_its_processes(name, number, status, tmp_path):
    # Not below tmp_path: names of sockets in it would be too long for the system.
    temporary = Path(tempfile.mkdtemp())
    command = [sys.executable, str(PROJECT / f"benchmarks/{name}.py"), "--smallest"]
    # PyTorch makes a cache of its own among temporary files.
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | places
    ) as run:
        assert any(line.startswith("timing:") for line in run.stderr)
        run.send_signal(number)
        _, errors = run.communicate(timeout=120)  # the pipes close when the last of its processes has ended
    assert run.returncode == status and "Traceback" not in errors
    assert number == signal.SIGKILL or list(temporary.iterdir()) == []
    shutil.rmtree(temporary)


@pytest.mark.parametrize("script", ["check_gpu.sh", "check_distributed.sh"])
def test_the_checks_name_what_there_is(script):
    text = (PROJECT / "scripts" / script).read_text()
    paths = re.findall(r"tests/\S+\.py", text)
    for loop in re.findall(r"for benchmark in (.*); do", text):
        paths += [f"benchmarks/{name}.py" for name in loop.split()]
    assert paths and all((PROJECT / path).exists() for path in paths)

"""A write that fails half-way: the old file stays, one line says so, and the run continues to the same bits."""

import resource
import shutil
import subprocess

import pytest
import torch

from tests import small
from tests.conftest import make_tree
from tests.killer import Fault, differing, run
from utils import datasets

TOO_LARGE, KILLED = 2, -25  # exit statuses: the message, the signal SIGXFSZ
B, D, E, DI, EI = small.SCRIPTS
# For each script the files it writes, in the order in which a run comes to them: name, which of its writings fails,
# and whether the state is saved at every step.
FILES = {
    B: [("buffer.json", 1, False), ("checkpoint.pt", 1, True), ("checkpoint.pt", 2, True),
        ("expert_00000.pt", 1, True), ("expert_00001.pt", 1, True), ("replay_buffer_0.pt", 1, True)],
    D: [("config.json", 1, False), ("metrics.jsonl", 1, False), ("images_best.pt", 1, False),
        ("labels_best.pt", 1, False), ("syn_lr_best.pt", 1, False), ("images_best.png", 1, False),
        ("images_0.pt", 1, False), ("labels_0.pt", 1, False), ("syn_lr_0.pt", 1, False), ("images_0.png", 1, False),
        ("checkpoint.pt", 1, True), ("checkpoint.pt", 3, True), ("metrics.jsonl", 1, False), ("stage.json", 1, True),
        ("expert_00001.pt", 1, True), ("replay_buffer_0.pt", 1, True), ("stage.json", 1, True)],
    E: [("evaluation_checkpoint.pt", 1, True), ("model_ConvNetW32_0.pt", 1, True),
        ("evaluation_checkpoint.pt", 2, True), ("report.json", 1, True), ("accuracy.png", 1, True)],
    DI: [("config.json", 1, False), ("args.txt", 1, False), ("interval_0_init.png", 1, False),
         ("interval_0_checkpoint.pt", 1, True), ("interval_0_data.pt", 1, True), ("interval_0_img2.png", 1, True),
         ("interval_0_metrics.jsonl", 1, False), ("interval_0_checkpoint.pt", 2, True),
         ("interval_0_network_0.pt", 1, True), ("log.txt", 1, True), ("interval_0.json", 1, True),
         ("interval_1_data.pt", 1, True), ("interval_1_metrics.jsonl", 1, False)],
    EI: [("evaluation_checkpoint.pt", 1, True), ("evaluated_conv2in_w0.25_0.pt", 1, True), ("report.json", 1, True),
         ("accuracy.png", 1, True)],
}  # fmt: skip


def fault_in(name, turn, place, kill):
    """Return the `Fault` that breaks a file off some bytes after its start, or after the rows that are kept of it."""
    if name.endswith(".jsonl"):
        path = next(place.rglob(name), None)
        kept = path.stat().st_size if path and name == "metrics.jsonl" else 0
        return Fault(name, 20 + kept, kill, turn)
    return Fault(rf"\.{name}\.\d+\.tmp", 30 if name.endswith((".json", ".txt")) else 300, kill, turn)


@pytest.mark.parametrize("kill", [False, True], ids=["told", "killed"])
@pytest.mark.parametrize("script", small.SCRIPTS)
def test_every_file_of_a_script(script, kill, reference, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    reference.prepare(script, place)
    words = small.arguments(script, place)
    for name, turn, often in FILES[script]:
        before = {path: path.read_bytes() for path in place.rglob(name)}
        fault = fault_in(name, turn, place, kill)
        minutes = ["--checkpoint_minutes", 0 if often else 10]
        status, lines = run(script, [*words, *minutes], fault=fault)
        assert status == (KILLED if kill else TOO_LARGE), (name, turn, status, lines[-3:])
        torn = [path for path in place.rglob(name) if torn_from(path, before.get(path), turn)]
        assert (kill and name.endswith(".jsonl")) or not torn, (name, turn)
        if not kill:
            assert lines[-1].startswith("error: cannot write ") and f"/{name}: File too large; " in lines[-1], lines
            assert sum(line.startswith("error:") for line in lines) == 1 and "Traceback" not in "".join(lines)
            assert not list(place.rglob("*.tmp"))
    assert run(script, words)[0] == 0
    assert differing(place / small.WRITES[script], reference.expected(script)) == []
    assert not list(place.rglob("*.tmp"))


def torn_from(path, before, turn):
    """True where `path` is neither as it was nor one of the whole files that were written before the failing one."""
    now = path.read_bytes()
    if path.suffix == ".jsonl":
        return bool(now) and not now.endswith(b"\n")
    return now != before and (turn == 1 or len(now) <= 300)


def test_pretrained_networks(tmp_path):
    words = ["-d", "digits", "--ipc", 1, "--n_data", 64, "--pt_from", 1, "--pretrain"]
    fault = Fault(r"\.network_0_epoch1\.pt\.\d+\.tmp", 300)
    status, lines = run(DI, words, fault=fault, folder=tmp_path)
    assert status == TOO_LARGE and "network_0_epoch1.pt: File too large" in lines[-1]
    assert not list(tmp_path.rglob("network*"))


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", [f"class{n}" for n in range(10)], 2, 1)


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy", "about.json"])
def test_a_cache_that_cannot_be_written_is_left_out(name, tree, tmp_path):
    name = rf"\.{name}\.\d+\.tmp" if name.endswith("json") else name
    words = ["--data_path", tree, "--dry_run", "--buffer_path", tmp_path / "b"]
    status, lines = run(B, words, fault=Fault(name, 30))
    assert status == 0 and "note: nothing cached at" in lines[0] and "Traceback" not in "".join(lines)
    assert not list((tree / ".pdd_cache").iterdir())
    assert "note" not in run(B, words)[1][0]
    assert len(list((tree / ".pdd_cache").rglob("*.npy"))) == 4


def test_a_whitening_that_cannot_be_cached_is_used_all_the_same(tmp_path, capsys):
    images = datasets.read("Digits", "").train_images[:50]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        first = datasets._whitening(images, tmp_path, torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "nothing cached" in capsys.readouterr().err and not list(tmp_path.rglob("zca*"))
    second = datasets._whitening(images, tmp_path, torch.device("cpu"))
    assert torch.equal(first.transform_matrix, second.transform_matrix) and list(tmp_path.rglob("zca-*.pt"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the rights of an administrator")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk, reference, tmp_path):
    """Experts (some 50 kB for each entry) fill it; after a move to a larger disk the run goes on."""
    status, lines = run(B, small.arguments(B, small_disk))
    assert status == 2 and "GB are free; make room" in lines[-1]  # told before the work
    shutil.copytree(reference.distilled / "b", tmp_path / "place" / "b")
    words = small.arguments(D, tmp_path / "place")
    words[words.index("--root_log_dir") + 1] = small_disk / "l"
    one_stage = [*words, "--num_intervals", 1]
    (small_disk / "filler").write_bytes(bytes(180_000))
    status, lines = run(D, one_stage)
    assert status == 2 and "No space left on device; files written before are intact" in lines[-1]
    shutil.copytree(small_disk / "l", tmp_path / "place" / "l")
    assert run(D, [*one_stage, "--root_log_dir", tmp_path / "place" / "l"])[0] == 0


def test_a_disk_that_fills_while_a_cache_is_made(small_disk, tree, tmp_path):
    """Pictures are decoded into a memory map, where a full disk would kill the process instead of telling it."""
    shutil.copytree(tree, small_disk / "tree")
    left = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(left - 20_000))
    words = ["--data_path", small_disk / "tree", "--dry_run", "--buffer_path", tmp_path / "b"]
    status, lines = run(B, words)
    assert status == 0 and "No space left on device); the next start takes as long" in lines[0]

"""A write that fails half-way: the old file stays, one line says so, and the run continues to the same bits."""

import re
import resource
import shutil
import subprocess

import pytest
import torch

from tests.conftest import make_tree
from tests.support import small
from tests.support.killer import Fault, differing, run
from utils.data import datasets

TOO_LARGE, KILLED = 2, -25  # exit statuses: the message, the signal SIGXFSZ
B, D, E, DI, EI, DM = small.SCRIPTS
# For each script the files it writes, in the order in which a run comes to them: regular expression of the name, which
# of its writings fails, and whether the state is saved in every iteration.
FILES = {
    B: [("buffer.json", 1, False), ("epoch_0000.pt", 1, False), ("epoch_0001.pt", 1, False),
        ("expert_00000.pt", 1, False), ("epoch_0000.pt", 1, False), ("epoch_0001.pt", 1, False),
        ("expert_00001.pt", 1, False), ("replay_buffer_0.pt", 1, False)],
    D: [("config.json", 1, False), ("data.json", 1, False), ("evaluation-.*.pt", 1, False),
        ("metrics.jsonl", 1, False), ("images_best.pt", 1, False), ("labels_best.pt", 1, False),
        ("syn_lr_best.pt", 1, False), ("images_best.png", 1, False), ("images_0.pt", 1, False),
        ("labels_0.pt", 1, False), ("syn_lr_0.pt", 1, False), ("images_0.png", 1, False), ("checkpoint.pt", 1, True),
        ("checkpoint.pt", 3, True), ("metrics.jsonl", 1, False), ("stage.json", 1, True), ("expert_00001.pt", 1, True),
        ("replay_buffer_0.pt", 1, True), ("stage.json", 1, True)],
    E: [("model_ConvNetW32_0.pt", 1, False), ("distilled-.*.pt", 1, False), ("fresh-.*.pt", 1, False),
        ("last union-.*.pt", 1, False), ("random-.*.pt", 1, False), ("full-.*.pt", 1, False), ("report.json", 1, False),
        ("accuracy.png", 1, False)],
    DI: [("config.json", 1, False), ("data.json", 1, False), ("args.txt", 1, False), ("interval_0_init.png", 1, False),
         ("interval_0_checkpoint.pt", 1, True), ("interval_0_data.pt", 1, True), ("interval_0_img2.png", 1, True),
         ("interval_0_network_0.pt", 1, True), ("evaluation-.*.pt", 1, True), ("interval_0_metrics.jsonl", 1, False),
         ("interval_0_checkpoint.pt", 1, True), ("log.txt", 1, True), ("interval_0.json", 1, True),
         ("starts-.*.pt", 1, True), ("interval_1_data.pt", 1, True), ("interval_1_metrics.jsonl", 1, False)],
    EI: [("evaluated_conv2in_w0.25_0.pt", 1, False), ("distilled-.*.pt", 1, False), ("random-.*.pt", 1, False),
         ("full-.*.pt", 1, False), ("report.json", 1, False), ("accuracy.png", 1, False)],
    DM: [("config.json", 1, False), ("data.json", 1, False), ("args.txt", 1, False), ("interval_0_init.png", 1, False),
         ("interval_0_checkpoint.pt", 1, True), ("interval_0_data.pt", 1, True), ("interval_0_img3.png", 1, True),
         ("evaluation-.*.pt", 1, True), ("interval_0_metrics.jsonl", 1, False), ("interval_0_checkpoint.pt", 1, True),
         ("log.txt", 1, True), ("interval_0.json", 1, True), ("interval_1_data.pt", 1, True),
         ("interval_1_metrics.jsonl", 1, False)],
}  # fmt: skip


def fault_in(name, turn, place, kill):
    """Return the `Fault` that breaks a file off some bytes after its start, or after the rows that are kept of it."""
    if name.endswith(".jsonl"):
        rows = [row for path in matching(place, name) for row in path.read_bytes().splitlines(keepends=True)]
        return Fault(f"open {name}", 20 + sum(map(len, rows[:-1])), kill, turn)  # the last one is not in the checkpoint
    return Fault(f"write {name}", 30 if name.endswith((".json", ".txt")) else 300, kill, turn)


def matching(place, name):
    return [path for path in place.rglob("*") if re.fullmatch(name, path.name)]


@pytest.mark.parametrize("script", small.SCRIPTS)
def test_every_file_of_a_script(script, reference, tmp_path):
    """In turns the script is told that the file is too large, and killed; another script begins with the other."""
    place = tmp_path / "place"
    place.mkdir()
    reference.prepare(script, place)
    words = small.arguments(script, place)
    for number, (name, turn, often) in enumerate(FILES[script], small.SCRIPTS.index(script)):
        kill = number % 2 == 1
        before = {path: path.read_bytes() for path in matching(place, name)}
        minutes = ["--checkpoint_minutes", 0 if often else 10]
        ended = run(script, [*words, *minutes], fault_in(name, turn, place, kill))
        assert ended.status == (KILLED if kill else TOO_LARGE), (name, turn, ended.status, ended.lines[-3:])
        torn = [path for path in matching(place, name) if torn_from(path, before.get(path), turn)]
        assert (kill and name.endswith(".jsonl")) or not torn, (name, turn)
        if not kill:
            assert re.match(f"error: .*/{name}: cannot be used \\(File too large\\); ", ended.lines[-1]), ended.lines
            assert sum(line.startswith("error:") for line in ended.lines) == 1
            assert "Traceback" not in "".join(ended.lines) and not list(place.rglob("*.tmp"))
    assert run(script, words).status == 0
    assert differing(place / small.WRITES[script], reference.expected(script)) == []
    assert not list(place.rglob("*.tmp"))


@pytest.mark.parametrize("script", small.SCRIPTS)
def test_no_file_of_a_script_is_left_out(script, reference):
    """Those of a later stage or iteration are written by the same lines."""
    number = re.compile(r"interval_\d+|_\d+(?=\.)")
    written = {event.removeprefix("save ") for event in reference.runs[script].events if event.startswith("save ")}
    tried = {number.sub("N", name) for name, _, _ in FILES[script]}
    assert [name for name in written if not any(re.fullmatch(one, number.sub("N", name)) for one in tried)] == []


def torn_from(path, before, turn):
    """True if `path` is neither as it was nor one of the whole files that were written before the failing one."""
    now = path.read_bytes()
    if path.suffix == ".jsonl":
        return bool(now) and not now.endswith(b"\n")
    return now != before and (turn == 1 or len(now) <= 300)


def test_pretrained_networks(tmp_path):
    words = ["-d", "digits", "--ipc", 1, "--n_data", 64, "--pt_from", 1, "--pretrain"]
    ended = run(DI, words, Fault(r"write network_0_epoch1\.pt", 300), folder=tmp_path)
    assert ended.status == TOO_LARGE and "network_0_epoch1.pt: cannot be used (File too large)" in ended.lines[-1]
    assert not list(tmp_path.rglob("network*"))


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", [f"class{n}" for n in range(10)], 2, 1)


@pytest.mark.parametrize("name", ["train_images.npy", "test_images.npy", "about.json"])
def test_a_cache_that_cannot_be_written_is_left_out(name, tree, tmp_path):
    words = ["--data_path", tree, "--dry_run", "--buffer_path", tmp_path / "b"]
    ended = run(B, words, Fault(f"(write|open) {name}", 30))
    assert ended.status == 0 and "note: nothing cached at" in ended.lines[0]
    assert "Traceback" not in "".join(ended.lines)
    assert not list((tree / ".pdd_cache").iterdir())
    assert "note" not in run(B, words).lines[0]
    assert len(list((tree / ".pdd_cache").rglob("*.npy"))) == 2


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
    ended = run(B, small.arguments(B, small_disk))
    assert ended.status == 2 and "kB are free; make room" in ended.lines[-1]  # told before the work
    shutil.copytree(reference.distilled / "b", tmp_path / "place" / "b")
    words = small.arguments(D, tmp_path / "place")
    words[words.index("--root_log_dir") + 1] = small_disk / "l"
    one_stage = [*words, "--num_intervals", 1]
    (small_disk / "filler").write_bytes(bytes(180_000))
    ended = run(D, one_stage)
    assert ended.status == 2 and "No space left on device); files written before are intact" in ended.lines[-1]
    shutil.copytree(small_disk / "l", tmp_path / "place" / "l")
    assert run(D, [*one_stage, "--root_log_dir", tmp_path / "place" / "l"]).status == 0


def test_a_disk_that_fills_while_a_cache_is_made(small_disk, tree, tmp_path):
    shutil.copytree(tree, small_disk / "tree")
    left = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(left - 20_000))
    words = ["--data_path", small_disk / "tree", "--dry_run", "--buffer_path", tmp_path / "b"]
    ended = run(B, words)
    assert ended.status == 0 and "No space left on device); the next start takes as long" in ended.lines[0]

"""Damaged, foreign and malicious inputs of every script: one line and exit status 2, no file changed, no code run.

What is only a cache, or a piece of work that an interrupted run has finished, is made anew, and what is damaged only by
its looks is used. `python -m pytest tests/faults/test_damage.py --damage_table FILE` writes down what was tried and
what the scripts answered, a row for each file.
"""

import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import call, files_of, make_tree
from tests.support import small
from tests.support.killer import Kill, differing, run
from utils.data import datasets
from utils.run import files

B, D, E, DI, EI, DM = small.SCRIPTS
REFUSED, DONE = 2, 0
RAN = Path(tempfile.gettempdir()) / f"pdd-code-ran-{os.getpid()}"  # what malicious files would make


class Malice:
    def __reduce__(self):
        return (open, (str(RAN), "w"))


# Damages: functions of a path.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello")


def binary(path):
    path.write_bytes(b"\xff\xfe\x00\x80" * 9)


def missing(path):
    path.unlink()


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def loop(path):
    """A symbolic link to itself."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def code(path):
    torch.save([Malice()], path)


def old_code(path):
    torch.save(Malice(), path, _use_new_zipfile_serialization=False)


def bare_code(path):
    path.write_bytes(pickle.dumps(Malice()))


def huge(path):
    """A tensor that declares 4 TB and holds nothing."""
    torch.save(torch.zeros(1), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    one = b"K\x01"  # the storage's one element, then the shape (1,)
    assert one in content
    path.write_bytes(content.replace(one, b"\x8a\x06" + (10**12).to_bytes(6, "little")))


def nested(path):
    path.write_text("[" * 100_000)


def tensors(change):
    def damage(path):
        torch.save(change(torch.load(path, weights_only=True)), path)

    return damage


def saved(value):
    return lambda path: torch.save(value, path)


def values(change):
    """Change the object of a JSON file in place."""

    def damage(path):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def written(content):
    return lambda path: path.write_text(content)


def entries(change):
    """Change every entry (a list of tensors) of a replay buffer."""
    return tensors(lambda buffer: [[change(entry) for entry in trajectory] for trajectory in buffer])


def poison(entry):
    return [entry[0] * float("nan"), *entry[1:]]


def within(index, change):
    """Change one tensor of a union [images, labels]."""

    def damage(value):
        value[index] = change(value[index])
        return value

    return tensors(damage)


def signed(change):
    """Change a file of an interrupted run in place, and the digest that it holds of itself."""

    def damage(path):
        value = torch.load(path, weights_only=True)
        del value["digest"]
        change(value)
        torch.save(value | {"digest": files.digest(value)}, path)

    return damage


def resized(value):
    objects = value["objects"]
    name = next(name for name, state in objects.items() if isinstance(state, torch.Tensor) and state.dim() > 1)
    objects[name] = objects[name][1:]
    return value


STATE = "expected the state of an interrupted run, found "
TORCH = [
    ("cut off", cut, "damaged"),
    ("empty", empty, "damaged|something else"),
    ("text", text, "damaged|something else"),
    ("a folder", folder, "found a folder"),
    ("missing", missing, "found no file|expected replay_buffer"),
    ("a link to itself", loop, "found no file|expected replay_buffer"),
    ("a pickle that runs code", code, "asks to run code"),
    ("an old pickle that runs code", old_code, "asks to run code"),
    ("a bare pickle that runs code", bare_code, "asks to run code|damaged"),
    ("a tensor of 4 TB", huge, "damaged|expected"),
]
JSON = [
    ("cut off", cut, "found something else"),
    ("empty", empty, "found something else"),
    ("not UTF-8", binary, "found something else"),
    ("a list", written("[1, 2]"), "holding one object, found list"),
    ("100,000 brackets", nested, "found something else"),
    ("a folder", folder, "cannot be read"),
]
OPTIONS = [
    *JSON,
    ("without options", written("{}"), '"options", found None'),
    ("options of another run", values(lambda v: v["options"].update(seed=5)), "seed 5 there, 0 now"),
]
SUMMARY = [
    *JSON,
    ("without complete", values(lambda v: v.pop("complete")), '"complete", found None'),
    ("complete in words", values(lambda v: v.update(complete="yes")), "\"complete\", found 'yes'"),
]
CHECKPOINT = [
    *[row for row in TORCH if row[0] not in ("missing", "a link to itself")],
    ("a list", saved([1]), STATE + "something else"),
    ("an empty dict", saved({}), STATE + "something else"),
    ("without its digest", tensors(lambda v: v.pop("digest") and v), STATE + "something else"),
    ("of an earlier version", tensors(lambda v: {"options": v["config"], "slots": {}, "digest": v["digest"]}),
     "or one of an earlier version"),
    ("without its objects", tensors(lambda v: v.pop("objects") and v), "a changed file"),
    ("a state of another shape", tensors(resized), "a changed file"),
    ("another run's", signed(lambda v: v["config"].update(seed=7)), "that of another run .seed 7 there, 0 now"),
]  # fmt: skip
# Of finished epochs and units of work, which are made again.
PIECE = [
    *[row[:2] for row in TORCH if row[0] not in ("a folder", "missing")],
    ("a list", saved([1])),
    ("an empty dict", saved({})),
    ("without its digest", tensors(lambda v: v.pop("digest") and v)),
    ("a changed digest", tensors(lambda v: v | {"digest": v["digest"][::-1]})),
]
UNION = [
    *TORCH,
    ("other size", within(0, lambda x: x[:, :, :4, :4]), "expected images 1x8x8 for Digits, found 1x4x4"),
    ("NaN", within(0, lambda x: x * float("nan")), "expected finite pixels"),
    ("labels of another order", within(1, lambda y: y.flip(0)), "expected 10 classes of equal size"),
    ("half of the classes", within(1, lambda y: y % 5), "expected 10 classes of equal size"),
    ("one image less", within(0, lambda x: x[:-1]), r"expected \[images"),
    ("real labels", within(1, lambda y: y.float()), r"expected \[images"),
    ("one tensor", saved(torch.zeros(3)), r"expected \[images"),
    ("the union of another stage", within(0, lambda x: x) and tensors(lambda v: [torch.cat([t, t]) for t in v]),
     "expected"),
]  # fmt: skip
BUFFER = [
    *TORCH,
    ("a tensor", saved(torch.zeros(3)), "expected a replay buffer"),
    ("no experts", saved([]), "expected a replay buffer"),
    ("numbers", saved([[[1.0]]]), "expected a replay buffer"),
    ("whole numbers", entries(lambda e: [t.long() for t in e]), "expected a replay buffer"),
    ("short trajectories", tensors(lambda b: [t[:1] for t in b]), "expected trajectories of 2 entries at least"),
    ("another network", entries(lambda e: e[:-1]), "these experts are not of ConvNetW32"),
    ("another shape", entries(lambda e: [*e[:-1], torch.zeros(7)]), r"found \(7,\)"),
    ("NaN", entries(poison), "holds NaN or infinite parameters"),
]
IMAGES = [
    ("NaN", tensors(lambda x: x * float("nan")), "expected finite numbers"),
    ("other size", saved(torch.zeros(10, 1, 9, 9)), "expected images 1x8x8"),
    ("colour", saved(torch.zeros(10, 3, 8, 8)), "expected images 1x8x8"),
    ("flat", saved(torch.zeros(10, 64)), r"found shape \(10, 64\)"),
    ("a dict", saved({"x": 1}), "found dict"),
]
LABELS = [
    ("too few", saved(torch.zeros(3).long()), "expected 10 integer labels"),
    ("real numbers", saved(torch.zeros(10)), "expected 10 integer labels"),
    ("class 10", tensors(lambda y: y + 1), "expected labels below 10"),
    ("class -1", tensors(lambda y: y - 1), "expected 10 integer labels >= 0"),
]
RATES = [
    ("negative", saved(torch.tensor(-0.1)), "expected a learning rate > 0"),
    ("NaN", saved(torch.tensor(float("nan"))), "expected finite numbers"),
    ("two numbers", saved(torch.ones(2)), "expected one number"),
    ("a word", saved("fast"), "found str"),
]
METRICS = [
    ("fewer rows", empty, "expected [1-9] rows at least of measurements, found 0 rows"),
    ("not UTF-8", binary, "found something else"),
    ("words", written('{"loss": "small"}\n' * 9), "found something else"),
    ("a folder", folder, "cannot be read"),
]
_best = f"{small.STAGE}/{{}}_best.pt"
_second = ["--start_interval", 2]
# Script, its state before the damage (what it reads, a finished run, an interrupted one), the damaged file, more
# arguments, damages.
TABLE = [
    (B, "finished", f"{small.EXPERT_FOLDER}/buffer.json", ["--num_experts", 3], OPTIONS),
    (B, "finished", f"{small.EXPERT_FOLDER}/replay_buffer_0.pt", ["--num_experts", 3, "--save_interval", 2],
     [row for row in BUFFER if row[0] in ("cut off", "text", "a pickle that runs code", "a tensor", "whole numbers")]),
    (B, "interrupted", f"{small.EXPERT_FOLDER}/partial/expert_00000.pt", [], [
        TORCH[0], TORCH[6], *((what, make, "expected a recorded expert") for what, make, _ in BUFFER[-8:-5])]),
    (B, "finished", f"{small.EXPERT_FOLDER}/.lock", ["--num_experts", 3], [("a folder", folder, "cannot be used")]),
    (D, "inputs", f"{small.EXPERT_FOLDER}/replay_buffer_0.pt", [], BUFFER),
    (D, "inputs", f"{small.EXPERT_FOLDER}/buffer.json", ["--select_on", "val"], [
        *JSON, ("a share in words", values(lambda v: v["options"].update(val_fraction="all")), "expected a number")]),
    (D, "finished", f"{small.EXPERIMENT}/config.json", [], OPTIONS),
    (D, "finished", f"{small.STAGE}/stage.json", [], [
        *SUMMARY, ("accuracy in words", values(lambda v: v.update(best_accuracy="high")), '"best_accuracy", found')]),
    (D, "finished", _best.format("images"), [], TORCH),
    (D, "finished", _best.format("images"), _second, IMAGES),
    (D, "interrupted", f"{small.STAGE}/checkpoint.pt", [], CHECKPOINT),
    (D, "interrupted", f"{small.STAGE}/metrics.jsonl", [], METRICS),
    (E, "inputs", _best.format("images"), [], [*TORCH, *IMAGES]),
    (E, "inputs", _best.format("labels"), [], [*LABELS, TORCH[0], TORCH[6]]),
    (E, "inputs", _best.format("syn_lr"), [], [*RATES, TORCH[0], TORCH[7]]),
    (E, "inputs", f"{small.STAGE}/stage.json", [], SUMMARY),
    (E, "inputs", f"{small.EXPERT_FOLDER}/replay_buffer_0.pt", [], [
        row for row in BUFFER if row[0] in ("cut off", "a pickle that runs code", "another network", "NaN")]),
    (E, "inputs", f"{small.EXPERIMENT}/report.json", [], [("a folder", folder, "report.json: cannot be used")]),
    (DI, "finished", f"{small.IDC_FOLDER}/config.json", [], OPTIONS),
    (DI, "finished", f"{small.IDC_FOLDER}/interval_0.json", [], SUMMARY),
    (DI, "finished", f"{small.IDC_FOLDER}/interval_0_data.pt", [], UNION),
    (DI, "interrupted", f"{small.IDC_FOLDER}/interval_1_checkpoint.pt", [], CHECKPOINT),
    (DI, "interrupted", f"{small.IDC_FOLDER}/interval_0_metrics.jsonl", [], METRICS[1:]),
    (EI, "inputs", f"{small.IDC_FOLDER}/interval_1_data.pt", [], UNION),
    (EI, "inputs", f"{small.IDC_FOLDER}/interval_1.json", [], SUMMARY),
    (EI, "inputs", f"{small.IDC_FOLDER}/.lock", [], [("a folder", folder, "cannot be used")]),
    (DM, "inputs", f"{small.EXPERT_FOLDER}/replay_buffer_0.pt", [], BUFFER),
    (DM, "finished", f"{small.DM_FOLDER}/config.json", [], OPTIONS),
    (DM, "finished", f"{small.DM_FOLDER}/interval_0_data.pt", [], UNION),
    (DM, "interrupted", f"{small.DM_FOLDER}/interval_1_checkpoint.pt", [], CHECKPOINT),
]  # fmt: skip
CASES = [
    pytest.param(script, state, path, more, *row, id=f"{script[:-3]}-{Path(path).name}-{row[0]}".replace(" ", "_"))
    for script, state, path, more, rows in TABLE
    for row in rows
]
# Found after the work began: the parameters of experts are read when their turn comes, a report is written at the end.
LATE = [("replay_buffer_0.pt", "NaN"), ("report.json", "a folder")]
# Where runs are interrupted. They have finished an expert and an epoch; some iterations and an evaluation in a stage;
# all networks but the one on the full training set; a stage and a network of the next one.
KILLS = {
    B: Kill(r"write epoch_0001\.pt", 2),
    D: Kill("iteration", 3),
    E: Kill("write full-.*"),
    DI: Kill("iteration", 5),
    EI: Kill("write full-.*"),
    DM: Kill("iteration", 5),
}


@pytest.fixture(scope="module")
def interrupted(reference, tmp_path_factory):
    """For each script a folder in which it was killed."""
    places = {}
    for script in small.SCRIPTS:
        place = places[script] = tmp_path_factory.mktemp("interrupted")
        reference.prepare(script, place)
        words = [*small.arguments(script, place), "--checkpoint_minutes", 0]
        assert run(script, words, KILLS[script]).status == -9
        for leftover in place.rglob("*.tmp"):
            leftover.unlink()
    return places


@pytest.fixture
def table(request):
    """Takes the rows (script, input, damage, answer) of the table of what was tried."""
    return request.config.damage_rows


def try_it(script, words, status, answer, place, table, names, capsys, monkeypatch):
    """Call a script and check how it ends; `names` are the file and the damage in the table."""
    before = snapshot(place)
    found, message = call(script, *words, capsys=capsys, monkeypatch=monkeypatch)
    lines = message.splitlines()
    assert found == status, message
    if status == REFUSED:
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in message
        assert re.search(answer, shortened(lines[-1])), lines[-1]
        assert changed(place, before, may_add=names in LATE) == []
    else:
        assert not any(line.startswith("error: ") for line in lines)
    assert not RAN.exists()
    table.append((script, *names, shortened(lines[-1]) if status == REFUSED else answer))


def shortened(line):
    """Return an error without the folders of its path."""
    return re.sub(r"\S*/(?=\S)", "", line.removeprefix("error: "))


def snapshot(place):
    """Return {path: bytes of a file, target of a link, None for a folder} of everything below `place`."""
    others = {p: os.readlink(p) if p.is_symlink() else None for p in place.rglob("*") if not p.is_file()}
    return others | {place / name: content for name, content in files_of(place).items()}


def changed(place, before, may_add):
    """Return the paths below `place` that are not as they were; new ones count unless they may be added."""
    now = snapshot(place)
    paths = before.keys() if may_add else before.keys() | now.keys()
    return [path for path in paths if (path in before, before.get(path)) != (path in now, now.get(path))]


@pytest.mark.parametrize("script,state,path,more,damage,function,answer", CASES)
def test_a_damaged_file(script, state, path, more, damage, function, answer, reference, interrupted, tmp_path, table,
                        capsys, monkeypatch):  # fmt: skip
    place = tmp_path / "place"
    if state == "interrupted":
        shutil.copytree(interrupted[script], place)
    else:
        place.mkdir()
        reference.prepare(script, place)
        if state == "finished":
            shutil.copytree(reference.expected(script), place / small.WRITES[script], dirs_exist_ok=True)
    (place / path).unlink() if damage == "a folder" and (place / path).exists() else None
    function(place / path)
    words = [*small.arguments(script, place), *more]
    name = Path(path).name if state != "interrupted" else f"{Path(path).name} of an interrupted run"
    try_it(script, words, REFUSED, answer, place, table, (name, damage), capsys, monkeypatch)


def test_the_places_of_the_table_hold_the_files(reference, interrupted):
    """Else a damage would be a missing file."""
    for script, state, path, _, rows in TABLE:
        if rows and rows[0][1] is not folder:
            root = {"interrupted": interrupted[script]}.get(state, reference.distilled)
            assert (root / path).is_file(), (script, path)


def piece(name, damages):
    return [(name, *row) for row in PIECE if damages is None or row[0] in damages]


FEW = ("cut off", "a pickle that runs code", "a list", "a changed digest")
PIECES = [
    *((B, *row) for row in piece("epoch_0000.pt", None)),
    *((D, *row) for row in piece("evaluation-*.pt", FEW)),
    *((DI, *row) for row in piece("starts-*.pt", FEW)),
    *((E, *row) for row in piece("distilled-*.pt", FEW)),
    *((EI, *row) for row in piece("random-*.pt", FEW)),
]


@pytest.mark.parametrize("script,name,damage,function", PIECES, ids=[f"{s[:-3]}-{n}-{d}" for s, n, d, _ in PIECES])
def test_a_damaged_piece_of_work_is_made_again(script, name, damage, function, reference, interrupted, tmp_path, table):
    place = tmp_path / "place"
    shutil.copytree(interrupted[script], place)
    (path,) = place.rglob(name)
    function(path)
    ended = run(script, small.arguments(script, place))
    assert ended.status == DONE and ended.events.count(f"save {path.name}") == 1
    assert not any(line.startswith("error: ") for line in ended.lines) and not RAN.exists()
    assert differing(place / small.WRITES[script], reference.expected(script)) == []
    table.append((script, f"partial/{name}", damage, "made again"))


NETWORKS = [
    TORCH[0],
    TORCH[6],
    ("a list", saved([1]), "expected a network of this architecture, found another"),
    ("another network", saved({"x": torch.zeros(1)}), "expected a network of this architecture, found another"),
    ("NaN", tensors(lambda s: {k: v * float("nan") for k, v in s.items()}), "expected finite parameters"),
]


@pytest.mark.parametrize("damage,function,answer", NETWORKS, ids=[n[0] for n in NETWORKS])
def test_damaged_pretrained_networks(damage, function, answer, tmp_path, table, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["-d", "digits", "--ipc", 1, "--n_data", 64, "--pt_from", 1]
    assert call(DI, *words, "--pretrain", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    (path,) = tmp_path.rglob("network_0_epoch1.pt")
    function(path)
    names = ("network_0_epoch1.pt of --pretrain", damage)
    try_it(DI, words, REFUSED, answer, tmp_path, table, names, capsys, monkeypatch)


# Data sets, read by `buffer_mtt.py --dry_run`.


def bomb(path):
    """A PNG that declares 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    ends = b"".join(struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name)) for name in (b"IDAT", b"IEND"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + ends)


def array_of_code(path):
    np.save(path, np.array([Malice()], dtype=object), allow_pickle=True)


def array_without_end(path):
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 3, 32, 32)}
        np.lib.format.write_array_header_1_0(file, header)


def no_text(path):
    """The same file under a name that is not UTF-8."""
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.suffix)))


_image = "train/class3/0000.png"
_cache = ".pdd_cache/CIFAR10"
AGAIN = "decoded again"
DATA = [
    (_image, "cut off", lambda p: p.write_bytes(p.read_bytes()[:900]), REFUSED, "expected an image"),
    (_image, "empty", empty, REFUSED, "expected an image"),
    (_image, "text", text, REFUSED, "expected an image"),
    (_image, "60,000 x 60,000 pixels declared", bomb, REFUSED, "expected an image"),
    (_image, "a folder", folder, REFUSED, "expected an image"),
    (_image, "a link to itself", loop, REFUSED, "cannot be read"),
    (_image, "a name that is not UTF-8", no_text, DONE, "used"),
    ("train/class3", "a class whose name is not UTF-8", lambda p: (no_text(p), no_text(p.parents[1] / "test/class3")),
     DONE, "used"),
    ("train/class3", "a link to itself", loop, REFUSED, "expected the same classes as in"),
    ("train/class3", "a file", lambda p: (shutil.rmtree(p), text(p)), REFUSED, "expected the same classes as in"),
    ("test", "a link to itself", loop, REFUSED, "expected a folder test or val"),
    (f"{_cache}/about.json", "cut off", cut, DONE, AGAIN),
    (f"{_cache}/about.json", "not UTF-8", binary, DONE, AGAIN),
    (f"{_cache}/about.json", "100,000 brackets", nested, DONE, AGAIN),
    (f"{_cache}/about.json", "a folder", folder, DONE, AGAIN),
    (f"{_cache}/train_images.npy", "cut off", cut, DONE, AGAIN),
    (f"{_cache}/train_images.npy", "code", array_of_code, DONE, AGAIN),
    (f"{_cache}/train_images.npy", "3 TB declared", array_without_end, DONE, AGAIN),
    (f"{_cache}/train_images.npy", "real numbers", lambda p: np.save(p, np.zeros((20, 3, 32, 32))), DONE, AGAIN),
    (f"{_cache}/train_labels.npy", "too few", lambda p: np.save(p, np.zeros(3, dtype=np.int64)), DONE, AGAIN),
    (f"{_cache}/test_images.npy", "other size", lambda p: np.save(p, np.zeros((10, 3, 8, 8), np.uint8)), DONE, AGAIN),
    (".pdd_cache", "a file", lambda p: (shutil.rmtree(p), text(p)), DONE, "used without a cache"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A CIFAR-10 in class folders with its cache."""
    made = make_tree(tmp_path_factory.mktemp("tree") / "data", [f"class{n}" for n in range(10)], 2, 1)
    datasets.read("CIFAR10", made)
    return made


@pytest.mark.parametrize("path,damage,function,status,answer", DATA, ids=[f"{d[0]}-{d[1]}" for d in DATA])
def test_damaged_data(path, damage, function, status, answer, tree, tmp_path, table, capsys, monkeypatch):
    place = tmp_path / "data"
    shutil.copytree(tree, place)  # with the times of the files: its cache holds for the copy, too
    whole = sorted(map(bytes, datasets.read("CIFAR10", place).train_images))
    (place / path).unlink() if damage == "a folder" else None
    function(place / path)
    words = ["--data_path", place, "--buffer_path", tmp_path / "b", "--dry_run"]
    try_it(B, words, status, answer, place, table, (f"data: {path}", damage), capsys, monkeypatch)
    if status == DONE:
        assert sorted(map(bytes, datasets.read("CIFAR10", place).train_images)) == whole


WHITENING = [
    ("cut off", cut),
    ("code", code),
    ("NaN", tensors(lambda v: {k: t * float("nan") for k, t in v.items()})),
    ("of other images", tensors(lambda v: {k: t[..., :9] for k, t in v.items()})),
    ("a list", saved([1])),
]


@pytest.mark.parametrize("damage,function", WHITENING, ids=[w[0] for w in WHITENING])
def test_a_damaged_whitening_is_fitted_again(damage, function, tmp_path, table):
    images, device = datasets.read("Digits", "").train_images[:50], torch.device("cpu")
    expected = datasets._whitening(images, tmp_path, device).transform_matrix
    (path,) = tmp_path.rglob("zca-*.pt")
    content = path.read_bytes()
    function(path)
    assert torch.equal(datasets._whitening(images, tmp_path, device).transform_matrix, expected)
    assert path.read_bytes() == content and not RAN.exists()
    table.append(("all", "data: .pdd_cache/zca-….pt", damage, "fitted again"))


# Places.


@pytest.mark.parametrize(
    "what,make,status,answer",
    [
        ("a file", text, REFUSED, "cannot be used"),
        ("below a file", lambda p: text(p.parent), REFUSED, "cannot be used"),
        ("a link to itself", loop, REFUSED, "cannot be used"),
        ("a name of 300 letters", None, REFUSED, "cannot be used"),
        ("a name that is not UTF-8", None, DONE, "used"),
    ],
)
@pytest.mark.parametrize("script", [B, D, DI])
def test_places_of_results(script, what, make, status, answer, reference, tmp_path, table, capsys, monkeypatch):
    reference.prepare(script, tmp_path)
    name = {"a name of 300 letters": "x" * 300, "a name that is not UTF-8": os.fsdecode(b"\xff\xfe")}.get(what, "there")
    place = tmp_path / "new" / name
    if what != "below a file":
        place.parent.mkdir()
    if make:
        make(place)
    words = small.arguments(script, tmp_path)
    words[words.index({B: "--buffer_path", D: "--root_log_dir", DI: "--results"}[script]) + 1] = place
    try_it(script, words, status, answer, tmp_path, table, ("folder of results", what), capsys, monkeypatch)


@pytest.mark.parametrize("script", small.SCRIPTS)
def test_a_lock_of_a_dead_process_holds_nobody_up(script, reference, tmp_path, table, capsys, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    reference.prepare(script, place)
    folders = {B: small.EXPERT_FOLDER, DI: small.IDC_FOLDER, EI: small.IDC_FOLDER, DM: small.DM_FOLDER}
    where = place / folders.get(script, small.EXPERIMENT)
    where.mkdir(parents=True, exist_ok=True)
    (where / ".lock").write_text("12345 of a process that died")
    words = small.arguments(script, place)
    try_it(script, words, DONE, "used", place, table, (".lock", "of a dead process"), capsys, monkeypatch)


@pytest.mark.parametrize("part", ["train", "train/class3", "train/class3/0000.png"])
def test_data_that_may_not_be_read(part, tree, table):
    """As another user where the tests run as the administrator, whom no permission holds up."""
    root = Path(tempfile.mkdtemp())
    user = 65534 if os.geteuid() == 0 else None
    try:
        root.chmod(0o755)
        place = shutil.copytree(tree, root / "data", ignore=lambda *_: [".pdd_cache"])
        (place / part).chmod(0)
        ended = run(B, ["--data_path", place, "--buffer_path", root / "b", "--dry_run"], user=user)
        (place / part).chmod(0o755)
    finally:
        shutil.rmtree(root)
    line = ended.lines[-1]
    assert ended.status == REFUSED and line.startswith("error: ") and "Traceback" not in "".join(ended.lines)
    assert "ermission denied" in line
    table.append((B, f"data: {part}", "not readable", shortened(line)))


def test_at_least_forty_damages_for_the_table():
    assert len(CASES) + len(DATA) + len(WHITENING) >= 40

import errno
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import PROJECT
from utils.run import files
from utils.run.errors import UserError

# Atomic writes --------------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a" / "file"
    with files.atomic(path) as file:
        file.write(b"old")
        assert not path.exists()
    with files.atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_changes_nothing(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), files.atomic(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_names_the_file_and_changes_nothing(call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device") as error, files.atomic(path) as file:
        file.write(b"new")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_text_may_hold_names_that_are_no_text(tmp_path):
    with files.atomic(tmp_path / "file", "w") as file:
        file.write("folder \udcff ü")
    assert (tmp_path / "file").read_bytes() == b"folder \xff \xc3\xbc"


# Loading --------------------------------------------------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("load", [files.load, files.load_trusted])
def test_no_code_of_a_file_is_run(writer, load, tmp_path):
    path, made = tmp_path / "file.pt", tmp_path / "made"
    writer({"digest": Evil(made)}, path)
    if load is files.load:
        with pytest.raises(UserError, match=r"file\.pt: expected a union, found (a file that asks to run code|some)"):
            load(path, "a union")
    else:
        assert load(path) is None
    assert not made.exists()


def test_objects_other_than_tensors_are_refused(tmp_path):
    torch.save(np.random.default_rng(0), tmp_path / "file.pt")
    with pytest.raises(UserError, match="refused, since loading it is unsafe"):
        files.load(tmp_path / "file.pt")


VALUE = {"a": torch.arange(5), "b": [1, 2.5, "text", None, True], "c": {"d": (torch.zeros(2, 2),)}}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["file.pt", "file\udcff.pt"])
def test_what_is_saved_is_loaded(mmap, name, tmp_path):
    files.save(tmp_path / name, VALUE)
    found = files.load(tmp_path / name, mmap=mmap)
    assert files.digest(found) == files.digest(VALUE) and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "found a damaged or cut-off file"),
        (b"hello", "found a damaged or cut-off file"),
        (None, "found no file"),
        ("folder", "found a folder"),
    ],
)
def test_damaged_files_are_one_line(content, words, tmp_path):
    path = tmp_path / "file.pt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        files.load(path, "a union")
    assert str(error.value).startswith(f"{path}: expected a union, ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_cut_off_anywhere_is_refused(mmap, tmp_path):
    path = tmp_path / "file.pt"
    files.save(path, VALUE)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="expected a union, found "):
            files.load(path, "a union", mmap=mmap)


def test_trusted_files_are_those_with_their_digest(tmp_path):
    path = tmp_path / "file.pt"
    assert files.load_trusted(path) is None
    files.save(path, VALUE | {"digest": files.digest(VALUE)})
    assert files.digest(files.load_trusted(path)) == files.digest(VALUE)
    for wrong in (VALUE, VALUE | {"digest": "0"}, VALUE | {"x": 1, "digest": files.digest(VALUE)}, [1], 7):
        files.save(path, wrong)
        assert files.load_trusted(path) is None


def test_digests_tell_values_apart():
    values = [
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32), torch.zeros(3),
        torch.tensor([0.0, 1e-30]), torch.tensor([0.0, -0.0]), [0.0, 0.0], (0.0, 0.0), [0, 0], [[0], 0], [0, [0]],
        {"a": 0}, {"b": 0}, {"a": "0"}, {"a": None}, {}, [], "", None, 0, False,
    ]  # fmt: skip
    assert len({files.digest(value) for value in values}) == len(values)
    assert files.digest(torch.zeros(4, 4)[:, 1]) == files.digest(torch.zeros(4))
    assert files.digest(torch.zeros(3, dtype=torch.bfloat16)) != files.digest(torch.zeros(3, dtype=torch.float16))
    assert files.digest(torch.zeros((), requires_grad=True)) == files.digest(torch.zeros(()))


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1, "b": ["ü"]})
    assert files.read_json(path, holds={"a": int, "b": list}) == {"a": 1, "b": ["ü"]}
    for content, words in (
        ("{", "found something else"),
        ("[1]", "expected a report holding one object, found list"),
        ('{"a": 1, "b": 2}', 'expected a report with "b", found 2'),
        ('{"a": 1}', 'expected a report with "b", found None'),
        ("[" * 100000, "found something else"),
    ):
        path.write_text(content)
        with pytest.raises(UserError) as error:
            files.read_json(path, "a report", {"a": int, "b": list})
        assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="expected a report, but it cannot be read \\(No such file or directory\\)"):
        files.read_json(path, "a report")


# Folders that belong to one run ---------------------------------------------------------------------------------------

HOLD = """
import sys
from utils.run import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    folder = tmp_path / "results"
    for end in (lambda process: process.stdin.close(), lambda process: process.kill()):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=f"{folder}: another process is writing there; wait for it"):
                files.locked(folder).__enter__()
            end(process)
        with files.locked(folder) as held:
            assert held == folder


def test_what_killed_writes_left_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    for name in (".images.pt.123.tmp", "a/.labels.pt.4.tmp", "images.pt", "notes.tmp"):
        (tmp_path / name).write_text("")
    with files.locked(tmp_path):
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} >= {"images.pt", "notes.tmp"}
        assert not list(tmp_path.rglob(".*.tmp"))


OPTIONS = {"lr": 0.1, "ipc": 2, "tag": "x", "names": ("a", "b"), "device": "cpu"}


def test_a_folder_belongs_to_the_options_that_made_it(tmp_path):
    files.check_config(tmp_path, OPTIONS)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["options"] == OPTIONS | {"names": ["a", "b"]} and written["versions"]["torch"] == torch.__version__
    before = (tmp_path / "config.json").read_bytes()
    files.check_config(tmp_path, OPTIONS | {"device": "cuda"}, free=("device",))
    with pytest.raises(UserError) as error:
        files.check_config(tmp_path, OPTIONS | {"lr": 0.2, "tag": "y", "device": "cuda"}, free=("device",))
    assert str(error.value) == (
        f"{tmp_path} holds a run with other options (lr 0.1 there, 0.2 now; tag x there, y now); repeat its options to "
        "continue it, remove it, or choose another folder (distillations: or --tag)"
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_options_that_an_older_folder_does_not_name(tmp_path):
    files.check_config(tmp_path, OPTIONS)
    files.check_config(tmp_path, OPTIONS | {"new": 1})
    files.check_config(tmp_path, OPTIONS | {"new": 1}, defaults={"new": 1})
    with pytest.raises(UserError, match="new 0 there, 1 now"):
        files.check_config(tmp_path, OPTIONS | {"new": 1}, defaults={"new": 0})
    files.check_config(tmp_path, {name: OPTIONS[name] for name in ("lr", "ipc")})  # nor those that are gone


@pytest.mark.parametrize("content", ["{", "[]", '{"options": 3}'])
def test_damaged_options_are_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: expected the options of the run in this folder"):
        files.check_config(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    "count,words",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1549, "1.5 kB"),
        (20_000_000, "20.0 MB"),
        (3_210_000_000, "3.2 GB"),
        (4e12, "4000.0 GB"),
    ],
)
def test_bytes_in_words(count, words):
    assert files.human_bytes(count) == words


def test_disk_space_is_checked_at_the_folder_that_will_be_made(tmp_path, monkeypatch):
    place = []
    real = os.statvfs

    def statvfs(path):
        place.append(path)
        values = list(real(path))
        values[1], values[4] = 1000, 5  # bytes of a block, free blocks
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", statvfs)
    files.need_disk(tmp_path / "a" / "b", 5000, "the buffers")
    with pytest.raises(UserError) as error:
        files.need_disk(tmp_path / "a" / "b", 5001, "the buffers")
    assert str(error.value) == (
        f"{tmp_path / 'a' / 'b'}: the buffers need 5.0 kB, 5.0 kB are free; make room or choose another folder"
    )
    assert set(map(str, place)) == {str(tmp_path)}

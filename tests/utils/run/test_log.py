import errno
import json
import sys
import types

import pytest

from utils.run import log
from utils.run.errors import UserError
from utils.run.log import Log, Progress, log0, print0, read_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_are_json_lines_on_disk_at_once(path):
    measurements = Log(path)
    assert not path.exists()
    for number in range(3):
        measurements.write(iteration=number, loss=0.5 / (number + 1))
        assert len(path.read_text().splitlines()) == number + 1
    assert json.loads(path.read_text().splitlines()[2]) == {"iteration": 2, "loss": 0.5 / 3}
    assert read_rows(path) == [{"iteration": n, "loss": 0.5 / (n + 1)} for n in range(3)]
    assert read_rows(path, 2) == read_rows(path)[:2]
    measurements.close()


@pytest.mark.parametrize("saved_at", range(5))
def test_a_continued_log_has_no_row_twice_and_none_missing(saved_at, path):
    """Killed after five rows, and saved after `saved_at` of them."""
    first = Log(path)
    for number in range(5):
        if number == saved_at:
            state = first.state_dict()
        first.write(iteration=number)
    again = Log(path)
    again.load_state_dict(state)
    assert len(read_rows(path)) == 5  # nothing is lost before the first new row
    for number in range(saved_at, 7):
        again.write(iteration=number)
    assert read_rows(path) == [{"iteration": number} for number in range(7)]
    assert again.state_dict()["rows"] == 7


def test_a_log_that_is_begun_anew_replaces_the_old_one(path):
    path.write_text('{"iteration": 9}\n')
    Log(path).write(iteration=0)
    assert read_rows(path) == [{"iteration": 0}]


def test_a_log_is_there_before_its_first_row(path):
    """Images without a log are taken for published ones, which are finished."""
    Log(path.parent / "new" / "log.jsonl").begin()
    assert (path.parent / "new" / "log.jsonl").read_text() == ""


def test_a_log_saved_before_its_first_row_needs_no_file(path):
    again = Log(path)
    again.load_state_dict(Log(path).state_dict())
    again.write(iteration=0)
    assert read_rows(path) == [{"iteration": 0}]


def test_half_a_row_of_a_killed_run_goes(path):
    path.write_text('{"iteration": 0}\n{"iterat')
    again = Log(path)
    again.load_state_dict({"rows": 1, "run_id": None})
    again.write(iteration=1)
    assert read_rows(path) == [{"iteration": 0}, {"iteration": 1}]


@pytest.mark.parametrize(
    "content,words",
    [
        ('{"iteration": 0}\n', "expected 2 rows at least of measurements, found 1 rows"),
        ('{"iteration": 0}\n{"iterat\n', "found something else"),
        ('{"iteration": 0}\n[1]\n', "found something else"),
        ('{"iteration": 0}\n{"iteration": "1"}\n', "found something else"),
        (None, "expected rows of measurements, but it cannot be read (No such file or directory)"),
    ],
)
def test_a_log_with_other_rows_is_refused(content, words, path):
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        Log(path).load_state_dict({"rows": 2, "run_id": None})
    assert str(error.value).startswith(str(path)) and words in str(error.value)


class FullDisk:
    """A file that takes `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_row_that_cannot_be_written_leaves_the_file_as_it_was(room, path):
    measurements = Log(path)
    measurements.write(iteration=0)
    before, file = path.read_bytes(), measurements.file
    measurements.file = FullDisk(file, room)
    with pytest.raises(OSError, match="No space left on device") as error:
        measurements.write(iteration=1)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert path.read_bytes() == before and measurements.state_dict()["rows"] == 1
    measurements.file = FullDisk(file, 1000)  # there is room again
    measurements.write(iteration=1)
    assert read_rows(path) == [{"iteration": 0}, {"iteration": 1}]


def test_weights_and_biases_goes_on_with_the_same_run(path, monkeypatch):
    calls, rows = [], []
    run = types.SimpleNamespace(id="abc", log=rows.append, finish=lambda: rows.append("finished"))

    def init(**settings):
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    first = Log(path, "offline", {"lr": 1})
    first.begin()
    first.write(loss=1.0)
    second = Log(path, "offline", {"lr": 1})
    second.load_state_dict(first.state_dict())
    second.begin()
    second.write(loss=2.0)
    second.close()
    assert [call["id"] for call in calls] == [None, "abc"] and {call["mode"] for call in calls} == {"offline"}
    assert calls[0]["config"] == {"lr": 1} and rows == [{"loss": 1.0}, {"loss": 2.0}, "finished"]


def test_weights_and_biases_is_asked_before_any_work(path, monkeypatch):
    class Error(Exception):
        pass

    def init(**_):
        raise Error("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=Error))
    with pytest.raises(UserError, match="--wandb online: No API key configured; log in, or use --wandb offline"):
        Log(path, "online").begin()


def test_without_it_nothing_is_imported(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    Log(path).write(loss=1.0)


def test_results_and_log_have_their_streams(capsys):
    print0("result")
    log0("note")
    assert capsys.readouterr() == ("result\n", "note\n")


class Float:
    """A number that notes when its value is asked for, which waits for a GPU."""

    asked = 0

    def __float__(self):
        self.asked += 1
        return 0.12345678


def test_progress_on_a_pipe_prints_whole_lines_and_asks_no_value_in_between(capsys, monkeypatch):
    loss = Float()
    progress = Progress(1000, "stage 1/2, iteration")
    clock = [progress.bar.start_t]
    monkeypatch.setattr(progress.bar, "_time", lambda: clock[0])
    for number in range(1000):
        clock[0] += 0.06  # a minute in all
        progress.update(loss=loss, accuracy="12.5")
        if number == 500:
            log0("stage 1, iteration 500: test accuracy")
    progress.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err
    assert lines[0].startswith("stage 1/2, iteration 0/1000") and "stage 1, iteration 500: test accuracy" in lines
    shown = [line for line in lines if "loss=0.1235" in line and "accuracy=12.5" in line]
    assert len(shown) == 4 and shown[-1].startswith("stage 1/2, iteration 1000/1000")
    assert loss.asked == 4


def test_a_continued_progress_counts_on(capsys):
    progress = Progress(10, "epoch", start=7)
    for _ in range(3):
        progress.update()
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("epoch 7/10") and lines[-1].startswith("epoch 10/10")


def test_other_ranks_say_and_write_nothing(path, capsys, monkeypatch):
    monkeypatch.setattr(log.distributed, "is_rank0", lambda: False)
    print0("result")
    log0("note")
    progress = Progress(1, "epoch")
    loss = Float()
    progress.update(loss=loss)
    log0("text")
    progress.close()
    Log(path).write(loss=1.0)
    assert capsys.readouterr() == ("", "") and loss.asked == 0 and not path.exists()

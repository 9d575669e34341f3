"""A killed run, started again, ends with the files of an uninterrupted one, bit for bit.

`PDD_KILLS` sets how often each script is killed by each signal: 10, so that each is killed 20 times; 50 in the longer
mode, 100 times each.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import small
from tests.killer import Start, differing, kill_often, run

KILLS = int(os.environ.get("PDD_KILLS", "10"))
SECONDS = 1.0  # longest time before a kill; the runs last some seconds, and their start some tenths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("script", small.SCRIPTS)
def test_killed_runs_continue(script, number, reference, tmp_path):
    def begin(place):
        reference.prepare(script, place)
        return small.arguments(script, place)

    def check(place):
        assert differing(place / small.WRITES[script], reference.expected(script)) == []

    kill_often(script, begin, KILLS, SECONDS, tmp_path, number, check)


def at_work(process):
    """True where a process has a handler of its own for SIGTERM."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1 == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", small.SCRIPTS)
def test_a_signal_saves_the_state_at_once(script, number, reference, tmp_path):
    """With the default schedule, too, where no state would be saved for minutes."""
    reference.prepare(script, tmp_path)
    words = small.arguments(script, tmp_path)
    longer = {"buffer_mtt.py": "--train_epochs", "evaluate_mtt.py": "--full_epochs"}.get(script, "--epochs")
    longer = "--override_epoch_eval_train" if script == "distill_mtt.py" else longer
    words[words.index(longer) + 1] = 2000
    start = Start(script, words)
    while not at_work(start.process.pid):
        time.sleep(0.05)
        assert start.process.is_alive(), start.wait()
    time.sleep(0.05)  # the one for SIGINT is the next
    start.kill(number)
    status, lines = start.wait()
    assert status == 128 + number and lines[-1].startswith(f"stopped: stopped by signal {int(number)}; state saved to ")
    (saved,) = tmp_path.rglob("*checkpoint.pt")
    assert f"{saved}; run the same command again to continue" in lines[-1]


def test_a_signal_between_two_loops_is_not_lost(tmp_path, monkeypatch):
    """It comes when the checkpoint of one stage is closed and that of the next is not there yet."""
    from utils import files, runtime
    from utils.errors import Interrupted

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        files.Checkpoint(tmp_path / "first.pt").clear()
        os.kill(os.getpid(), signal.SIGTERM)
        second = files.Checkpoint(tmp_path / "second.pt")
        with pytest.raises(Interrupted), second.loop("work", 1, dict):
            second.tick()
        assert runtime.Signals.received is None and (tmp_path / "second.pt").exists()
    finally:
        for n, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(n, handler)


@pytest.mark.parametrize("script", small.SCRIPTS)
def test_a_finished_command_changes_nothing(script, reference, tmp_path):
    """It says so; an evaluation is made again and finds the same."""
    reference.prepare(script, tmp_path)
    words = small.arguments(script, tmp_path)
    for _ in range(2):
        assert run(script, words)[0] == 0
        assert differing(tmp_path / small.WRITES[script], reference.expected(script)) == []

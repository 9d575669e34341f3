"""How a process answers signals; what a loop makes of them is in test_checkpoint.py."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from utils.run import signals
from utils.run.errors import Interrupted


@pytest.fixture(autouse=True)
def nothing_received():
    yield
    assert signals.received is None


class Open:
    """A checkpoint that counts its saves."""

    path, saves = "checkpoint.pt", 0

    def save(self):
        self.saves += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_an_open_checkpoint_the_run_stops_at_once(number):
    signals.listen()
    with pytest.raises(Interrupted) as stop:
        os.kill(os.getpid(), number)
    assert (stop.value.signal_number, stop.value.saved) == (number, None)


def test_with_one_it_stops_when_asked_and_saves_once():
    signals.listen()
    checkpoint = Open()
    signals.open_checkpoint = checkpoint
    try:
        signals.stop_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM and checkpoint.saves == 0
        with pytest.raises(Interrupted) as stop:
            signals.stop_if_asked()
    finally:
        signals.open_checkpoint = None
    assert (stop.value.signal_number, stop.value.saved) == (signal.SIGTERM, "checkpoint.pt")
    assert checkpoint.saves == 1
    signals.stop_if_asked()  # it is asked once


def test_no_handler_of_ordinary_errors_stops_the_way_out():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("first,second", [(15, 15), (2, 15)])
def test_a_second_signal_of_the_same_kind_ends_the_process(first, second):
    program = f"""
import os
from utils.run import signals
signals.listen()
signals.open_checkpoint = object()
os.kill(os.getpid(), {first})
os.kill(os.getpid(), {second})
print("received", signals.received)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    if first == second:
        assert (done.returncode, done.stdout) == (-second, "")
    else:
        assert (done.returncode, done.stdout) == (0, f"received {second}\n")

"""Start scripts quickly, stop them at random moments or in the middle of a write, and compare their files.

A server process has PyTorch and the project's modules imported; each start is a child forked from it, which runs the
script's file as `python script …` does. So a start takes a tenth of a second instead of three, and a killed process
is a real one.
"""

import builtins
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.conftest import PROJECT, files_of

# They hold options that a test changes.
UNLIKE = ("config.json", "buffer.json", "args.txt")
MODULES = ["torch", "torchvision.utils", "PIL.Image", "PIL.PngImagePlugin", "sklearn.datasets",
           "sklearn.model_selection", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "tests.killer",
           "utils.evaluation", "utils.idc", "utils.matching", "utils.synset", "utils.zca"]  # fmt: skip


class Fault:
    """What goes wrong in a child: the first file whose name matches `name` cannot grow beyond `limit` bytes.

    Args:
        name: regular expression for the whole name of the file that is opened to be written.
        limit: bytes.
        kill: the process is killed at that byte instead of being told that the file is too large.
        turn: which opening of such a file fails, from 1.
    """

    def __init__(self, name, limit, kill=False, turn=1):
        self.name, self.limit, self.kill, self.turn = name, limit, kill, turn

    def arm(self):
        """Make the limit real: RLIMIT_FSIZE stands while the file is the last one opened."""
        # Killed by the signal that the kernel sends with it, which cannot be caught in its default action.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        opened, (_, hard) = builtins.open, resource.getrlimit(resource.RLIMIT_FSIZE)

        def open_limited(file, mode="r", *arguments, **keywords):
            if set(mode) & set("wax+") and isinstance(file, (str, os.PathLike)):
                limited = re.fullmatch(self.name, Path(file).name) is not None
                self.turn -= limited
                limited = limited and self.turn <= 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit if limited else hard, hard))
            return opened(file, mode, *arguments, **keywords)

        builtins.open = open_limited


def _child(script, arguments, output, fault, user, folder):
    """Become the script: what it prints goes to the connection `output`."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    # New objects: those of the server took its own files for theirs.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - they stay open
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [script, *arguments]
    os.chdir(folder)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if fault:
        fault.arm()
    runpy.run_path(str(PROJECT / script), run_name="__main__")


class Start:
    """A running script.

    Args:
        script: of the project.
        arguments: of its command line.
        fault: `Fault`, None for none.
        user: number of the user it runs as, None for the present one.
        folder: it works in.
    """

    def __init__(self, script, arguments, fault=None, user=None, folder=PROJECT):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        # A pipe, since a limit on files would hold for what is printed, too.
        self.output, there = context.Pipe(duplex=False)
        with _environment(PYTHONPATH=str(PROJECT), MPLBACKEND="Agg"):  # of the server, when this starts it
            self.process = context.Process(
                target=_child, args=(script, [str(a) for a in arguments], there, fault, user, folder)
            )
            self.process.start()
        there.close()

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self):
        """Return (exit status, printed lines)."""
        with open(self.output.fileno(), closefd=False, errors="replace") as file:
            lines = file.read().splitlines()
        self.output.close()
        self.process.join()
        return self.process.exitcode, lines


@contextlib.contextmanager
def _environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(script, arguments, **options):
    """Run a script to its end; returns (exit status, printed lines)."""
    return Start(script, arguments, **options).wait()


def run_killed(script, arguments, kills, seconds, number=signal.SIGKILL, rng=None):
    """Run a command to its end through `kills` kills at random moments, from its very first on.

    Args:
        script: of the project.
        arguments: of its command line; its state is saved at every step.
        kills: how often to kill it, if it lasts so long.
        seconds: longest time before a kill.
        number: the signal.
        rng: random.Random.

    Returns:
        How often it was killed.
    """
    rng = rng or random.Random(0)
    done = 0
    while True:
        start = Start(script, [*arguments, "--checkpoint_minutes", 0])
        if done < kills:
            time.sleep(rng.random() * seconds)
            start.kill(number)
        status, lines = start.wait()
        if status == 0:
            return done
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number]
        assert status in expected, f"status {status}: {lines[-20:]}"
        if status == 143:
            assert lines[-1].endswith("run the same command again to continue")
        done += 1


def kill_often(script, arguments, kills, seconds, folder, number, check):
    """Run a command through kills, as often as it takes to come to `kills` of them in all.

    Args:
        arguments: function of an empty folder returning the arguments of a run that writes there.
        folder: for the runs.
        check: called with the folder of each finished run.
        Others as for `run_killed`.
    """
    rng = random.Random(f"{script} {number}")
    done = turn = 0
    while done < kills:
        place = Path(folder) / f"run{turn}"
        place.mkdir()
        done += run_killed(script, arguments(place), kills - done, seconds, number, rng)
        check(place)
        shutil.rmtree(place)
        turn += 1
        assert turn < 20 * kills, "this script ends before it is killed"


def differing(found, expected):
    """Return the names of files below two folders that are not the same, leaving out what may differ."""
    found, expected = files_of(found), files_of(expected)
    names = {name for name in found.keys() | expected.keys() if name.rsplit("/", 1)[-1] not in UNLIKE}
    return sorted(name for name in names if _content(name, found) != _content(name, expected))


def _content(name, files):
    content = files.get(name)
    if content and name.endswith("report.json"):  # beside the accuracies it holds the options
        return json.loads(content)["models"]
    return content

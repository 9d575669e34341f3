"""Start scripts quickly, kill them at a chosen event or in the middle of a write, and compare their files.

A server process has PyTorch and the project's modules imported; each start is a child forked from it, which runs the
script's file as `python script …` does. So a start takes a tenth of a second instead of three, and a killed process
is a real one. The child writes down its events, so that a test can see what a continued run does again:

    begin                   before the script's first line
    read NAME
    write NAME, save NAME   the temporary file of NAME is opened; NAME is replaced by it
    open NAME               NAME itself is opened to be written
    remove NAME
    not done                a signal stopped the process before it did what the event before says
    epoch, iteration        an epoch of a network, a matching iteration or an IDC sweep has been computed
"""

import contextlib
import fcntl
import json
import multiprocessing.connection
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import PROJECT, files_of

# They hold options that a test changes.
UNLIKE = ("config.json", "buffer.json", "args.txt")
MODULES = ["torch", "torch._dynamo", "torchvision.utils", "PIL.Image", "PIL.PngImagePlugin", "sklearn.datasets",
           "sklearn.model_selection", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "tests.support.killer",
           "utils.evaluation", "utils.feature_matching", "utils.trajectory_matching", "utils.idc_runs",
           "utils.results.known", "utils.sizes"]  # fmt: skip
LOG_BYTES = 1 << 20  # of events
SECONDS_FOR_PEERS = 120  # to notice that another one has ended
READ = (".pt", ".json", ".jsonl")  # files of runs, not those of modules
WORK = ("epoch", "iteration")
# A finished unit of work, which is never done twice.
UNIT = r"save (expert_|epoch_|distilled-|random-|full-|evaluation-|starts-).*"


class Kill:
    """A signal that a child gets at an event, before what the event announces is done.

    Args:
        event: regular expression for the whole event.
        turn: which of these events, from 1.
        number: of the signal.
    """

    def __init__(self, event=".*", turn=1, number=signal.SIGKILL):
        self.event, self.turn, self.number = event, turn, number

    def arm(self):
        pass

    def __call__(self, event):
        if re.fullmatch(self.event, event):
            self.turn -= 1
            if self.turn == 0:
                os.kill(os.getpid(), self.number)


class Fault:
    """A file that breaks off while a child writes it.

    Args:
        event: regular expression for the event of its opening.
        limit: bytes that it can have.
        kill: the process is killed at that byte instead of being told that the file is too large.
        turn: which opening of such a file fails, from 1.
    """

    def __init__(self, event, limit, kill=False, turn=1):
        self.event, self.limit, self.kill, self.turn = event, limit, kill, turn

    def arm(self):
        # Killed by the signal that the kernel sends with it, which cannot be caught in its default action.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def __call__(self, event):
        """Make the limit real: RLIMIT_FSIZE stands while the file is the last one opened."""
        if event.startswith(("write ", "open ")):
            matches = re.fullmatch(self.event, event) is not None
            self.turn -= matches
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            limit = self.limit if matches and self.turn <= 0 else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def _watch(log, trigger):
    """Write the events of this process to the file descriptor `log`, then hand each to `trigger`."""

    def happens(event):
        os.write(log, f"{event}\n".encode())
        if trigger:
            trigger(event)

    def audit(name, arguments):
        event = _file_event(name, arguments)
        if event:
            try:
                happens(event)
            except BaseException:
                os.write(log, b"not done\n")
                raise

    def counted(function, event):
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            happens(event)
            return result

        return call

    from utils import feature_matching, gradient_matching, training, trajectory_matching

    training.train_epoch = counted(training.train_epoch, "epoch")
    for owner, name in (
        (trajectory_matching.TrajectoryMatcher, "backward"),
        (gradient_matching.GradientMatcher, "sweep"),
        (feature_matching.FeatureMatcher, "backward"),
    ):
        setattr(owner, name, counted(getattr(owner, name), "iteration"))
    happens("begin")
    sys.addaudithook(audit)


def _file_event(name, arguments):
    """Return the event of a call that Python audits; None if it changes no file of a run."""
    place = {"open": 0, "os.rename": 1, "os.remove": 0}.get(name)
    if place is None or not isinstance(arguments[place], (str, os.PathLike)):
        return None
    file = Path(arguments[place]).name
    temporary = re.fullmatch(r"\.(.+)\.\d+\.tmp", file)
    if name == "open":
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return f"read {file}" if file.endswith(READ) else None
        return f"write {temporary[1]}" if temporary else f"open {file}"
    if name == "os.rename":
        return f"save {file}"
    return None if temporary else f"remove {file}"


def _become(script, arguments, output, errors, folder):
    """Give this process the command line of a script; what it prints goes to the files or connections given."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    # New objects: those of the server took its own files for theirs.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - they stay open
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [script, *arguments]
    os.chdir(folder)


def _plain(script, arguments, output, errors, folder, environment):
    """Run the script in a process that nobody watches; `output` and `errors` are paths."""
    with open(output, "w") as out, open(errors, "w") as err:
        _become(script, arguments, out, err, folder)
    os.environ.clear()
    os.environ.update(environment)
    runpy.run_path(str(PROJECT / script), run_name="__main__")


def _child(script, arguments, output, log, trigger, user, folder):
    """Run the script; what it prints goes to the connection `output`, its events to the connection `log`."""
    _become(script, arguments, output, output, folder)
    output.close()
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if trigger:
        trigger.arm()
    _watch(log.fileno(), trigger)
    runpy.run_path(str(PROJECT / script), run_name="__main__")


def _start(context, target, *arguments):
    """Return a process that has been forked from the server."""
    context.set_forkserver_preload(MODULES)
    with _environment(PYTHONPATH=str(PROJECT), MPLBACKEND="Agg"):  # of the server, when this starts it
        process = context.Process(target=target, args=arguments)
        process.start()
    return process


class Start:
    """A running script.

    Args:
        script: of the project.
        arguments: of its command line.
        trigger: `Kill` or `Fault`, None for neither.
        user: number of the user it runs as, None for the present one.
        folder: it works in.
    """

    def __init__(self, script, arguments, trigger=None, user=None, folder=PROJECT):
        context = multiprocessing.get_context("forkserver")
        # Pipes, since a limit on files would hold for what is printed, too.
        self.output, output = context.Pipe(duplex=False)
        self.log, log = context.Pipe(duplex=False)
        fcntl.fcntl(log.fileno(), fcntl.F_SETPIPE_SZ, LOG_BYTES)  # it is read when the script has ended
        words = [str(argument) for argument in arguments]
        self.process = _start(context, _child, script, words, output, log, trigger, user, folder)
        output.close()
        log.close()

    def wait(self):
        """Wait for its end; returns `Ended`."""
        lines, events = (_lines_of(connection) for connection in (self.output, self.log))
        self.process.join()
        return Ended(self.process.exitcode, lines, events)


def _lines_of(connection):
    with open(connection.fileno(), closefd=False, errors="replace") as file:
        lines = file.read().splitlines()
    connection.close()
    return lines


class Ended:
    """A script that has ended: its exit status, the lines it printed, its events."""

    def __init__(self, status, lines, events):
        self.status, self.lines, self.events = status, lines, events

    @property
    def done(self):
        """The events without those that announced what never happened."""
        killed = ["not done"] if self.status < 0 and self.events[-1] not in WORK else []
        events = [*self.events, *killed]
        return [event for event, then in zip(events, [*events[1:], ""], strict=True) if "not done" not in (event, then)]

    def work(self):
        """Return how many epochs and iterations were computed."""
        return sum(event in WORK for event in self.done)

    def lost(self):
        """Return how many epochs and iterations stand in no file that a killed process has left.

        Of a process that stopped when it was asked to: at most so many, since its last save may hold some of them.
        """
        done = self.done
        if self.status > 0:
            done = done[: max((at for at, event in enumerate(done) if event in WORK), default=-1) + 1]
        saved = (at for at, event in enumerate(done) if re.fullmatch(rf"{UNIT}|save .*checkpoint\.pt", event))
        return sum(event in WORK for event in done[max(saved, default=-1) + 1 :])

    def units(self):
        """Return the finished units of work, in order; without the digests in their names, which may hold paths."""
        return [re.sub(r"-[0-9a-f]{16}\.pt", "", event) for event in self.done if re.fullmatch(UNIT, event)]


@contextlib.contextmanager
def _environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(script, arguments, trigger=None, **options):
    """Run a script to its end; returns `Ended`. Arguments as for `Start`."""
    return Start(script, arguments, trigger, **options).wait()


def run_plain(script, arguments, folder=PROJECT):
    """Run a script to its end; returns a CompletedProcess, what it printed to stdout and to stderr apart."""
    (done,) = run_together(script, arguments, [{}], folder)
    return done


def run_together(script, arguments, environments, folder=PROJECT):
    """Run a script once for each of some environments, at the same time; returns a CompletedProcess for each.

    Args:
        environments: variables, {name: value}, beside those of this process.
        Others as for `run_plain`.
    """
    words, context = [str(argument) for argument in arguments], multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as place:
        started = []
        for number, variables in enumerate(environments):
            printed = [Path(place) / f"{name}{number}" for name in ("stdout", "stderr")]
            process = _start(context, _plain, script, words, *printed, folder, {**os.environ, **variables})
            started.append((process, printed))
        running, failed, done = {process.sentinel: process for process, _ in started}, False, []
        while running:
            ended = multiprocessing.connection.wait(running, SECONDS_FOR_PEERS if failed else None)
            for process in [] if ended else running.values():  # they wait for one that failed
                process.kill()
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                failed |= process.exitcode != 0
        for process, printed in started:
            texts = [path.read_text() for path in printed]
            done.append(subprocess.CompletedProcess([script, *words], process.exitcode, *texts))
    return done


def run_killed(script, arguments, kills, whole, number=signal.SIGKILL, rng=None):
    """Run a command to its end through kills at random events, from its very first on.

    What a kill costs is checked: no finished unit of work is done twice, and nothing is computed again but what the
    last save before a kill did not hold.

    Args:
        script: of the project.
        arguments: of its command line; its state is saved in every iteration.
        kills: how often to kill it, if it lasts so long.
        whole: `Ended` of an uninterrupted run.
        number: the signal.
        rng: random.Random.

    Returns:
        How often it was killed.
    """
    rng, killed = rng or random.Random(0), []
    while True:
        kill = Kill(turn=rng.randint(1, len(whole.events)), number=number) if len(killed) < kills else None
        last = run(script, [*arguments, "--checkpoint_minutes", 0], kill)
        if last.status == 0:
            break
        # SIGTERM ends a process at once that does not listen yet.
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number]
        assert last.status in expected, f"status {last.status}: {last.lines[-20:]}"
        if last.status == 143:
            assert last.lines[-1].endswith("run the same command again to continue")
        killed.append(last)
    if not any("save report.json" in ended.done for ended in killed):  # an evaluation with a report is a finished one
        check_cost([*killed, last], whole)
    return len(killed)


def check_cost(runs, whole):
    """Compare the work of killed runs and the last one, which came to its end, with that of an uninterrupted run."""
    assert [unit for ended in runs for unit in ended.units()] == whole.units()
    spent, lost = sum(ended.work() for ended in runs), sum(ended.lost() for ended in runs[:-1])
    assert spent <= whole.work() + lost
    if all(ended.status == -signal.SIGKILL for ended in runs[:-1]):
        assert spent == whole.work() + lost


def kill_often(script, arguments, kills, whole, folder, number, check):
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
        done += run_killed(script, arguments(place), kills - done, whole, number, rng)
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

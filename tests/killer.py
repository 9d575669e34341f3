"""Kill a script at random moments, start the same command again until it is done, and compare the files."""

import random
import signal
import subprocess
import sys
import time

from tests.conftest import PROJECT, files_of

# They hold options that a test changes, versions, or the time of the run.
UNLIKE = ("config.json", "buffer.json", "args.txt", "report.json")


def run_killed(script, arguments, kills, seconds, number=signal.SIGKILL, seed=0):
    """Run a command to its end through `kills` kills.

    Args:
        script: of the project.
        arguments: of its command line; its state is saved at every step.
        kills: how often to kill it, if it lasts so long.
        seconds: longest wait before a kill, after the first moment at which the script works.
        number: the signal.

    Returns:
        How often it was killed.
    """
    rng = random.Random(seed)
    command = [sys.executable, str(PROJECT / script), *map(str, arguments), "--checkpoint_minutes", "0"]
    done = 0
    while True:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done < kills:
            time.sleep(2.0 + rng.random() * seconds)
            process.send_signal(number)
        _, message = process.communicate()
        if process.returncode == 0:
            return done
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number]
        assert process.returncode in expected, f"status {process.returncode}: {message[-2000:]}"
        if process.returncode == 143:
            assert message.splitlines()[-1].endswith("run the same command again to continue")
        done += 1


def differing(found, expected):
    """Return the names of files below two folders that are not the same, leaving out what may differ."""
    found, expected = files_of(found), files_of(expected)
    names = {name for name in found.keys() | expected.keys() if name.rsplit("/", 1)[-1] not in UNLIKE}
    return sorted(name for name in names if found.get(name) != expected.get(name))

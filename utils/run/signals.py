"""SIGTERM and SIGINT: stop at a point that the same command continues from.

A finished unit of work is on disk and anything else can be begun again, so a signal stops the run at once. Only while
a learning loop has its checkpoint open does it wait until the state is one that can be saved.
"""

import signal

from . import distributed
from .errors import Interrupted

received = None  # number of the signal that came
open_checkpoint = None  # saved before the run stops


def listen():
    """Handle SIGTERM and SIGINT from now on.

    A second signal of the same kind ends the process at once; not so under torchrun, which passes on what a cluster
    has already sent to every process.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def _handle(number, _frame):
    global received
    received = number
    if distributed.size() == 1:
        signal.signal(number, signal.SIG_DFL)
    if open_checkpoint is None:
        stop_if_asked()


def stop_if_asked(number=None):
    """Save the open checkpoint and stop if a signal came; called between two epochs and between two iterations.

    Args:
        number: the signal that came to another rank.

    Raises:
        Interrupted: the run was asked to stop.
    """
    global received
    number = number or received
    if number is None:
        return
    received = None
    if open_checkpoint:
        open_checkpoint.save()
    raise Interrupted(number, open_checkpoint and open_checkpoint.path)

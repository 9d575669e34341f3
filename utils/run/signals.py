"""SIGTERM and SIGINT: stop at a point that the same command continues from.

A finished unit of work is on disk and anything else can be begun again, so a signal stops the run at once. Only while
a learning loop has its checkpoint open does it wait until the state is one that can be saved.
"""

import signal

from . import distributed
from .errors import Interrupted

_received = None
_open_checkpoints = []


def listen():
    """Handle SIGTERM and SIGINT from now on.

    A second signal of the same kind ends the process at once; not so under torchrun, which passes on what a cluster
    has already sent to every process.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def _handle(number, _frame):
    global _received
    _received = number
    if distributed.size() == 1:
        signal.signal(number, signal.SIG_DFL)
    if not _open_checkpoints:
        stop_if_asked()


def received():
    """Return the number of the signal that came; None without one."""
    return _received


def opened(checkpoint):
    """Register a checkpoint to be saved before the run stops."""
    _open_checkpoints.append(checkpoint)


def closed(checkpoint):
    """Forget a checkpoint."""
    _open_checkpoints.remove(checkpoint)


def stop_if_asked(number=None):
    """Save the open checkpoint and stop if a signal came; called between two epochs and between two iterations.

    Args:
        number: of a signal that came to another rank.

    Raises:
        Interrupted: the run was asked to stop.
    """
    global _received
    number = number or _received
    if number is None:
        return
    _received = None
    saved = None
    for checkpoint in _open_checkpoints:
        checkpoint.save()
        saved = checkpoint.path
    raise Interrupted(number, saved)

"""Errors that a user can mend, and how a script ends."""

import errno
import os
import sys

UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


class UserError(Exception):
    """What was expected, what was found and what to do, in one line."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Args:
        signal_number: the signal that asked (SIGINT 2, SIGTERM 15).
        saved: path of the checkpoint that a later run continues from; None where nothing needed saving.
    """

    def __init__(self, signal_number, saved=None):
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.saved = saved


class PeerLost(Exception):
    """Another process of the same job ended while this one was waiting for it."""


def one_line(error):
    """Return the message of `error` with its line breaks folded."""
    return " ".join(str(error).split()) or type(error).__name__


def run(main, speaks=lambda: True):
    """Run a script's `main` and end the process the documented way.

    Exit status 0 on success; 2 with one line on stderr for a `UserError`, a full disk or too little memory on the
    device; 128 + signal number for an interruption; 1 where another process of the job ended. Anything else is a
    fault of the program and keeps its traceback.

    Args:
        main: function without arguments.
        speaks: asked before a message; False where another process of the same job has given one.
    """

    def end(message, status, kind="error"):
        sys.stdout.flush()
        if speaks():
            print(f"{kind}: {message}", file=sys.stderr, flush=True)
        sys.exit(status)

    try:
        main()
    except UserError as error:
        end(one_line(error), 2)
    except Interrupted as stop:
        where = f"; state saved to {stop.saved}" if stop.saved else ""
        end(
            f"stopped by signal {stop.signal_number}{where}; run the same command again to continue",
            128 + stop.signal_number,
            "stopped",
        )
    except PeerLost:
        end("another process of this job ended; run the same command again to continue", 1)
    except KeyboardInterrupt:
        end("stopped by the keyboard; run the same command again to continue", 130, "stopped")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            end(
                f"cannot write {error.filename or 'a file'}: {error.strerror}; "
                "files written before are intact: make room or choose another folder, "
                "then run the same command again",
                2,
            )
        if is_out_of_memory(error):
            end(
                f"the device has too little memory ({one_line(error)[:120]}); lower it with --kept_steps 0, "
                "--slice_size, --batch_syn, --batch_train or a narrower --model",
                2,
            )
        if speaks():
            raise
        sys.exit(1)


def is_out_of_memory(error):
    """True where `error` says that a device or the host has no memory left."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)
    )

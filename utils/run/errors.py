"""User errors, and how a script ends."""

import io
import os
import signal
import sys

from tqdm import tqdm

OOM_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class UserError(Exception):
    """What was expected, what was found and what to do, in one line."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved its state; no `except Exception` stops it on its way.

    Args:
        signal_number: the signal that asked (SIGINT 2, SIGTERM 15).
        saved: path of the checkpoint that a later run continues from; None if nothing needed saving.
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


def run(main, oom_advice="smaller minibatches", speaks=lambda: True):
    """Run a script's `main` and end the process the documented way.

    Exit status 0 on success; 2 with one line on stderr for a `UserError`, an error of the system about a file, or too
    little memory; 128 + signal number for an interruption; 1 if another process of the job ended. Anything else is a
    fault of the program and keeps its traceback.

    Args:
        main: function without arguments.
        oom_advice: the script's options that lower its memory, in words.
        speaks: asked before a message; False where another process of the same job has given one.
    """

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be valid text, terminals not Unicode

    def end(message, status, kind="error"):
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends one as soon as a rank is gone
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        for bar in list(tqdm._instances):  # else its last line comes after the message
            bar.close()
        if speaks():
            print(f"{kind}: {message}", file=sys.stderr, flush=True)
        sys.exit(status)

    try:
        main()
    except UserError as error:
        end(one_line(error), 2)
    except Interrupted as stop:
        where = f"; state saved to {stop.saved}" if stop.saved else ""
        name = signal.Signals(stop.signal_number).name
        end(f"by {name}{where}; run the same command again to continue", 128 + stop.signal_number, "stopped")
    except PeerLost:
        end("another process of this job ended; run the same command again to continue", 1)
    except KeyboardInterrupt:
        end("by the keyboard; run the same command again to continue", 130, "stopped")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            end(
                f"{error.filename or 'a file'}: cannot be used ({error.strerror}); files written before are intact: "
                "make room, check the path or choose another folder, then run the same command again",
                2,
            )
        if is_out_of_memory(error):
            end(f"too little memory ({one_line(error)[:120]}); lower what is needed with {oom_advice}", 2)
        if speaks():
            raise
        sys.exit(1)


def is_out_of_memory(error):
    """True if `error` says that a device or the host has no memory left."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in OOM_MESSAGES))

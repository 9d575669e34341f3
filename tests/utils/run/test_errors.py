"""How scripts end: one line and an exit status."""

import errno
import signal

import pytest

from utils.run import errors, signals


def raising(error):
    def work():
        raise error

    return work


def ended(error, capsys, **options):
    """Return the exit status and stderr of a script that raises `error`."""
    with pytest.raises(SystemExit) as end:
        errors.run(raising(error), "nothing", **options)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error,words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b.pt"), "a/b.pt: cannot be used (No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: cannot be used (Permission denied)"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: cannot be used (Not a directory)"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), "a/b: cannot be used (Is a directory)"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: cannot be used (Too many levels"),
    ],
)
def test_places_that_cannot_be_written(error, words, capsys):
    status, message = ended(error, capsys)
    assert status == 2 and message.count("\n") == 1 and words in message


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError("no number"), KeyError("x")])
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)):
        errors.run(raising(error), "nothing")


def test_names_that_are_no_text_can_be_printed(capsys):
    errors.run(lambda: print("folder b\udcff"), "nothing")
    assert capsys.readouterr().out == "folder b\\udcff\n"


AGAIN = "run the same command again to continue\n"


@pytest.mark.parametrize(
    "error,status,message",
    [
        (errors.UserError("expected a,\n  found b"), 2, "error: expected a, found b\n"),
        (errors.Interrupted(signal.SIGTERM), 143, f"stopped: by SIGTERM; {AGAIN}"),
        (errors.Interrupted(signal.SIGINT, "a/b.pt"), 130, f"stopped: by SIGINT; state saved to a/b.pt; {AGAIN}"),
        (errors.PeerLost(), 1, f"error: another process of this job ended; {AGAIN}"),
        (KeyboardInterrupt(), 130, f"stopped: by the keyboard; {AGAIN}"),
    ],
)
def test_the_exit_status_and_the_line(error, status, message, capsys):
    assert ended(error, capsys) == (status, message)


def test_one_process_of_a_job_speaks(capsys):
    assert ended(errors.UserError("found b"), capsys, speaks=lambda: False) == (2, "")
    assert ended(RuntimeError("shape mismatch"), capsys, speaks=lambda: False) == (1, "")


def test_a_signal_on_the_way_out_does_not_swallow_the_message(capsys):
    signals.listen()

    def speaks():  # torchrun sends SIGTERM to the other ranks as soon as one is gone
        signal.raise_signal(signal.SIGTERM)
        return True

    assert ended(errors.PeerLost(), capsys, speaks=speaks) == (1, f"error: another process of this job ended; {AGAIN}")


def test_the_message_is_the_last_line_also_after_an_open_progress_bar(capsys):
    from utils.run.log import Progress

    def work():
        progress = Progress(5, "iteration")
        progress.update()
        raise errors.UserError("found b")

    with pytest.raises(SystemExit):
        errors.run(work, "nothing")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: found b" and lines[-2].startswith("iteration 1/5")


def test_no_handler_of_errors_holds_an_interruption_up():
    with pytest.raises(errors.Interrupted):
        try:
            raise errors.Interrupted(signal.SIGTERM)
        except Exception as error:
            raise AssertionError("taken for an error of the work") from error

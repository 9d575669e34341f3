"""What a run says: results on stdout, progress on stderr, measurements as JSON lines and to Weights & Biases."""

import io
import json
import sys
from pathlib import Path

from tqdm import tqdm

from . import distributed, files
from .errors import UserError

PLAIN_SECONDS = 15  # between two lines of progress if stderr is not a terminal
tqdm.monitor_interval = 0  # no thread of its own


def print0(text):
    """Print a result to stdout, on rank 0."""
    if distributed.is_rank0():
        print(text, flush=True)


def log0(text):
    """Print one line of the log to stderr, on rank 0; a progress bar that is open stays whole."""
    if distributed.is_rank0():
        tqdm.write(text, file=sys.stderr)


class _Lines(io.TextIOBase):
    """A stream for tqdm that prints every state as a line of its own."""

    def write(self, text):
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr)


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere; on rank 0.

    Args:
        total: iterations in all.
        label: what is counted.
        start: iterations done already.
    """

    def __init__(self, total, label, start=0):
        style = {"dynamic_ncols": True, "mininterval": 0.5}
        if not sys.stderr.isatty():
            plain = "{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left"
            style = {"file": _Lines(), "mininterval": PLAIN_SECONDS, "miniters": 1, "bar_format": plain}
        hidden, self.values = not distributed.is_rank0(), {}
        self.bar = tqdm(total=total, initial=start, desc=label, position=0, disable=hidden, **style)

    def expect(self, total):
        """Change how many are counted in all."""
        self.bar.total = total

    def update(self, count=1, **values):
        """Count `count` more and show the latest values (numbers or strings) beside the count."""
        if self.bar.disable:
            return
        self.values |= values
        # Formatting a number waits for the device: only if it will be shown.
        if self.bar._time() - self.bar.last_print_t >= self.bar.mininterval:
            self._format()
        self.bar.update(count)

    def _format(self):
        shown = {k: v if isinstance(v, str) else f"{float(v):.4g}" for k, v in self.values.items()}
        self.bar.set_postfix(shown, refresh=False)

    def close(self):
        if not self.bar.disable:
            self._format()
            self.bar.close()


class Log:
    """Measurements of a run as JSON lines, and to Weights & Biases if asked for; rank 0 writes them.

    As part of a checkpoint it continues where the run was saved: no row stands twice, none is missing.

    Args:
        path: the file.
        wandb: disabled, online or offline.
        config: options of the run.
    """

    def __init__(self, path, wandb="disabled", config=None):
        self.path, self.wandb, self.config = Path(path), wandb, config
        self.rows, self.run_id = 0, None
        self.file = self.run = None

    def state_dict(self):
        return {"rows": self.rows, "run_id": self.run_id}

    def load_state_dict(self, state):
        """Continue a log.

        Raises:
            UserError: its file has fewer rows than were saved, or other lines.
        """
        self.rows, self.run_id = state["rows"], state["run_id"]
        if self.rows:  # else there may be no file yet
            read_rows(self.path, self.rows)

    def begin(self):
        """Make the file: a stage with images and no log is taken for a published one, which is finished.

        Raises:
            UserError: Weights & Biases cannot be used.
        """
        if distributed.is_rank0():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._start_wandb()

    def _open(self):
        kept = read_rows(self.path, self.rows) if self.rows else []
        with files.atomic(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - stays open as long as the loop

    def _start_wandb(self):
        if self.wandb != "disabled":
            import wandb

            try:
                self.run = wandb.init(
                    project="Progressive-Dataset-Distillation",
                    mode=self.wandb,
                    config=self.config,
                    id=self.run_id,
                    resume="allow",
                    dir=str(self.path.parent),
                )
            except wandb.Error as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"--wandb {self.wandb}: {reason}; log in, or use --wandb offline") from None
            self.run_id = self.run.id

    def write(self, **row):
        """Append one row of numbers; it is on its way to the disk when this returns.

        Raises:
            OSError: it cannot be written; the file is as it was before.
        """
        if not distributed.is_rank0():
            return
        if self.file is None:
            self._open()
        before, line = self.file.tell(), (json.dumps(row) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows += 1
        if self.run:
            self.run.log(row)

    def close(self):
        if self.file:
            self.file.close()
        if self.run:
            self.run.finish()


def read_rows(path, count=None):
    """Return the rows of a file of measurements, a list of dicts; the first `count` if it is given.

    Raises:
        UserError: there are fewer, or lines of something else than numbers.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_bytes().splitlines()[:count]]
        good = all(isinstance(row, dict) and all(isinstance(v, (int, float)) for v in row.values()) for row in rows)
    except OSError as error:
        raise UserError(f"{path}: expected rows of measurements, but it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        good = False
    if not good or (count is not None and len(rows) < count):
        wanted = "rows" if count is None else f"{count} rows at least"
        found = f"{len(rows)} rows" if good else "something else"
        raise UserError(
            f"{path}: expected {wanted} of measurements, found {found}; put the file back, or delete it and the "
            "checkpoint of an interrupted run beside it, which then begins the stage anew"
        )
    return rows

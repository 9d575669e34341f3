"""Files that are whole or not there: atomic saving, safe loading, run folders and checkpoints."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import time
import zipfile
import zlib
from pathlib import Path

import torch

from utils import distributed
from utils.errors import Interrupted, UserError, one_line
from utils.runtime import Signals, versions

CONFIG = "config.json"
LOCK = ".lock"
# Seconds to wait for a lock where another process may be about to let go: torchrun's last try, or a merging shard.
LOCK_PATIENCE = 40.0


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Open a temporary file beside `path`; on leaving without an error it becomes `path`, else nothing changes.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Text may hold paths, and paths need not be valid text.
    coding = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **coding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path, value):
    """torch.save `value` to `path`, whole or not at all."""
    # Through memory: torch's own file writer hides a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic(path) as file:
        file.write(buffer.getbuffer())


def load(path, what="a file written by torch.save", mmap=False):
    """Load tensors, numbers, strings, lists and dicts from `path` onto the CPU, running no code of the file.

    Args:
        path: the file.
        what: what the file should be, for the message.
        mmap: map the tensors from the file instead of reading them, where the file's format allows it.

    Raises:
        UserError: the file is missing, cut off, or needs more than safe loading allows.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: expected {what}, found {'a folder' if path.is_dir() else 'no file'}")
        mmap = mmap and zipfile.is_zipfile(path) and str(path).isprintable()  # PyTorch maps no names that are no text
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported" in text or "GLOBAL" in text or "WeightsUnpickler" in text:
            raise UserError(
                f"{path}: expected {what}, found a file that asks to run code or holds other objects than tensors; "
                "refused, since loading it is unsafe"
            ) from None
        raise UserError(f"{path}: expected {what}, found something else or a damaged file; make it anew") from None
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a cut-off archive leads to
            raise UserError(f"{path}: expected {what}, but it cannot be read ({error.strerror}); check it") from None
        # A damaged archive surfaces as whatever the parser stumbled over (RuntimeError, EOFError, KeyError, …).
        raise UserError(
            f"{path}: expected {what}, found a damaged or cut-off file ({one_line(error)[:80]}); make it anew"
        ) from None


def digest(value):
    """Return the SHA-256 (hexadecimal) of nested dicts, lists and tuples of tensors, numbers and strings."""
    total = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            total.update(f"tensor {part.dtype} {tuple(part.shape)};".encode())
            total.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            total.update(f"dict {len(part)};".encode())
            for item in part.items():
                add(item)
        elif isinstance(part, (list, tuple)):
            total.update(f"{type(part).__name__} {len(part)};".encode())
            for item in part:
                add(item)
        else:
            total.update(f"{part!r};".encode())

    add(value)
    return total.hexdigest()


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with atomic(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path, what="a JSON file", holds=None):
    """Return the JSON object in `path`.

    Args:
        path: the file.
        what: what the file should be, for the message.
        holds: {key: type or types} that the object must have.

    Raises:
        UserError: the file is missing, not a JSON object, or one without these keys.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected {what}, but it cannot be read ({error.strerror}); check it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected {what}, found something else ({one_line(error)[:80]}); move it away"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected {what} holding one object, found {type(value).__name__}; move it away")
    for key, types in (holds or {}).items():
        if not isinstance(value.get(key), types):
            raise UserError(
                f'{path}: expected {what} with "{key}", found {one_line(repr(value.get(key)))[:40]}; move it away'
            )
    return value


@contextlib.contextmanager
def locked(folder, name=LOCK, shared=False, patience=None):
    """Hold `folder` for this process and the others of its torchrun; the operating system lets go when rank 0 ends.

    Args:
        folder: made where it is missing.
        name: of the lock's file.
        shared: others that hold it shared, too, may work there at the same time.
        patience: seconds to wait for it; None waits where others are about to let go.

    Raises:
        UserError: another process holds it.
    """
    if patience is None:
        patience = LOCK_PATIENCE if shared or distributed.size() > 1 else 0
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: stack.enter_context(_locked_here(Path(folder), name, shared, patience)))
        yield Path(folder)


@contextlib.contextmanager
def _locked_here(folder, name, shared, patience):
    folder.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    until = time.monotonic() + patience
    with open(folder / name, "a+") as file:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                raise UserError(
                    f"{folder}: another process is writing there; wait for it, or choose another folder"
                ) from None
        if name == LOCK and not shared:
            for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
        yield


def claim(folder, options, free=(), name=CONFIG, since=None):
    """Tie `folder` to the options of this run: write its config file, or compare with the one that is there.

    Args:
        folder: a result folder.
        options: dict of all options.
        free: names of options that may change between a run and its continuation.
        name: of the config file.
        since: {option: value} of options that older folders do not name, and how these were made.

    Raises:
        UserError: the folder belongs to a run with other options; the message names them.
    """
    path = Path(folder) / name
    options = json.loads(json.dumps(options))
    if path.exists():
        before = read_json(path, "the options of the run in this folder", {"options": dict})["options"]
        found = differing((since or {}) | before, options, free)
        if found:
            raise UserError(
                f"{folder} holds a run with other options ({found}); repeat its options to continue it, or choose "
                "another folder or --tag"
            )
    else:
        write_json(path, {"options": options, "versions": versions()})


def differing(before, now, free=()):
    """Return in words where two dicts of options differ in what both hold, but for the names in `free`."""
    names = [name for name in now if name not in free and name in before and before[name] != now[name]]
    return "; ".join(f"{name} {before[name]} there, {now[name]} now" for name in names)


def need_disk(folder, wanted, what):
    """Compare the free disk space at `folder` with the `wanted` bytes of `what`.

    Raises:
        UserError: there is less.
    """
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    free = stat.f_bavail * stat.f_frsize
    if wanted > free:
        raise UserError(
            f"{folder}: {what} need {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room or choose another folder"
        )


class Checkpoint:
    """The state of all running loops, saved on a time schedule and when a signal asks the run to stop.

    A loop opens its own slot, and nested loops nest their slots:

        with checkpoint.loop("matching", stage, lambda: {"iteration": it, …}) as saved:
            for it in range(saved["iteration"] if saved else 0, iterations):
                checkpoint.tick()
                …

    The function given to `loop` returns the state from which the current turn of that loop can begin again, at any
    moment at which `tick` is called inside it. Leaving the loop normally closes its slot. States are what
    `files.save` can write and `files.load` can read.

    Of several ranks all make the same turns, rank 0 saves, and a signal to any of them stops all at the same tick. In
    `spread` they work apart, and each saves what it works on in a file of its own: a part.

    Args:
        path: of the checkpoint file, None to keep nothing (the loops still work).
        minutes: between two saves.
        options: dict of the options of the run; a file of a run with others is refused.
        free: names of those that may differ.
        whole: the checkpoint that this is a part of; None for that of all ranks.

    Raises:
        UserError: the file is damaged, was changed, or is another run's.
    """

    def __init__(self, path=None, minutes=10.0, options=None, free=(), whole=None):
        self.path = Path(path) if path else None
        self.options, self.free = json.loads(json.dumps(options or {})), free
        self.seconds = minutes * 60
        self.last = time.monotonic()
        self.slots = {}
        self.whole = whole
        self.signals = whole.signals if whole else Signals() if path else None
        self.saved = {}
        if self.path and self.path.exists():
            self.saved = self._load()
        elif whole:
            self.saved = dict(whole.saved)  # one process, which needs no parts, may have been on this work
        if self.path and not whole:
            distributed.wait()  # until all have read it, nobody writes it

    def _load(self):
        what = "the state of an interrupted run"
        found = load(self.path, what)
        found = found if isinstance(found, dict) else {}
        parts = [found.get(name) for name in ("options", "slots")]
        if not all(isinstance(part, dict) for part in parts) or found.get("digest") != digest(parts):
            raise UserError(
                f"{self.path}: expected {what}, found something else or a changed file; delete it to begin this part "
                "of the run anew"
            )
        if other := differing(parts[0], self.options, self.free):
            raise UserError(
                f"{self.path}: expected {what}, found that of another run ({other}); delete it to begin this part of "
                "the run anew"
            )
        return parts[1]

    @contextlib.contextmanager
    def loop(self, name, key, state):
        """Open the slot `name` with the function `state`; yields what an interrupted run saved there, or None.

        Args:
            name: of the slot.
            key: which piece of work it is (numbers, strings, tuples); a state saved for other work is forgotten,
                and with it the states of the loops inside.
            state: function without arguments.
        """
        if name in self.slots:
            raise ValueError(f"the slot {name!r} is open already")
        key = repr(key)
        self.slots[name] = lambda: {"key": key, "state": state()}
        saved = self.saved.pop(name, None)
        if saved is not None and saved["key"] != key:
            self.saved, saved = {}, None
        try:
            yield saved["state"] if saved else None
        finally:
            del self.slots[name]

    def tick(self):
        """Save when it is time to; after a signal save and stop.

        Raises:
            Interrupted: SIGTERM or SIGINT came.
        """
        if self.path is None:
            return
        stop = self.signals.received
        if not self.whole:
            stop = distributed.largest(stop or 0) or None
        if stop is None and time.monotonic() - self.last < self.seconds:
            return
        self.save()
        if stop is not None:
            if not self.whole:
                distributed.wait()  # torchrun ends the others when the first one does
            self.signals.take()
            raise Interrupted(stop, (self.whole or self).path)

    def save(self):
        """Save now; one for all ranks, unless this is a part."""
        self.last = time.monotonic()
        if self.path and (self.whole or distributed.is_first()):
            # Slots of an interrupted run that no loop has reached yet belong to the same turn: keep them.
            self._write(self.saved | {name: state() for name, state in self.slots.items()})

    def _write(self, slots):
        parts = {"options": self.options, "slots": slots}
        save(self.path, parts | {"digest": digest(list(parts.values()))})

    def clear(self):
        """Remove the file and its parts: their work is complete and stands in the results."""
        if self.path and distributed.is_first():
            self.path.unlink(missing_ok=True)
            self._remove_parts()
        self.saved = {}

    def spread(self, name, key, tasks, work):
        """Do every one of `tasks` once, over all ranks and interruptions.

        Args:
            name: of the slot, for file names too.
            key: which piece of work it is, as for `loop`.
            tasks: list of numbers, strings or tuples of them.
            work: function of (task, `Checkpoint` for the loops inside) returning what `files.save` can write, on the
                CPU; None from work that leaves its results elsewhere and is not to be remembered.

        Returns:
            List of the results, in the order of `tasks`.
        """
        results = {}

        def state():
            return {"results": {task: result for task, result in results.items() if result is not None}}

        with self.loop(name, key, state) as saved:
            results |= saved["results"] if saved else {}
            places = {task: self._part_path(name, key, task) for task in tasks}
            results |= distributed.first(lambda: self._begin_parts(places))
            mine = distributed.share([task for task in tasks if task not in results])
            for task in mine:
                part = self._part(places[task])
                results[task] = work(task, part)
                if part is not self:
                    part.finish(results[task])
            for found in distributed.gather({task: results[task] for task in mine}):
                results |= found
        return [results[task] for task in tasks]

    def _part_path(self, name, key, task):
        if not self.path:
            return None
        return self.path.with_name(f"{self.path.stem}.{name}-{zlib.crc32(repr((key, task)).encode()):08x}.part")

    def _begin_parts(self, places):
        """Make a place for the parts of a `spread`; returns the results of those that an earlier run has finished."""
        if not self.path:
            return {}
        if distributed.size() > 1:
            self.save()  # the loops around stand still until the tasks are done
            self._remove_parts(set(places.values()))
        found = {}
        for task, path in places.items():
            if path.exists():
                part = Checkpoint(path, options=self.options, free=self.free, whole=self).saved
                if "result" in part:
                    found[task] = part["result"]
        return found

    def _remove_parts(self, but=frozenset()):
        for path in self.path.parent.glob(f"{self.path.stem}.*.part"):
            if path not in but:
                path.unlink(missing_ok=True)

    def _part(self, path):
        """Return the checkpoint for one task; on its own and with nothing on disk, a process needs no part."""
        if not self.path or (distributed.size() == 1 and not path.exists()):
            return self
        return Checkpoint(path, self.seconds / 60, self.options, self.free, whole=self)

    def finish(self, result):
        """Put the result of a part in the place of its state."""
        if result is None:
            self.path.unlink(missing_ok=True)
        else:
            self._write({"result": result})


class Metrics:
    """Measurements as JSON lines, one file beside the results; a continued run leaves no row twice or out.

    Args:
        path: of the file.
        rows: how many rows of an existing file to keep; later ones are written again by the continued run.

    Raises:
        UserError: the existing file has fewer rows, or other lines.
    """

    def __init__(self, path, rows=0):
        self.path = Path(path)
        self.rows = rows
        kept = read_rows(self.path, rows) if rows else []
        with atomic(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - stays open as long as the run

    def write(self, **row):
        """Append one row; it is on its way to the disk when this returns.

        Raises:
            OSError: it cannot be written; the file is as it was before.
        """
        before = self.file.tell()
        line = (json.dumps(row) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows += 1

    def close(self):
        self.file.close()


def read_rows(path, count=None):
    """Return the rows of a metrics file, a list of dicts; the first `count` where it is given.

    Raises:
        UserError: there are fewer, or lines of something else than numbers.
    """
    path = Path(path)
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()[:count]]
        good = all(isinstance(row, dict) and all(isinstance(v, (int, float)) for v in row.values()) for row in rows)
    except OSError as error:
        raise UserError(f"{path}: expected rows of measurements, but it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        good = False
    if not good or (count is not None and len(rows) < count):
        wanted = "rows" if count is None else f"{count} rows at least"
        found = f"{len(rows)} rows" if good else "something else"
        raise UserError(
            f"{path}: expected {wanted} of measurements of an interrupted run, found {found}; put the file back, or "
            "delete it and the checkpoint beside it to begin the stage anew"
        )
    return rows

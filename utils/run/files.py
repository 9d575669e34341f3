"""Atomic file writes, safe loading, locked folders that belong to one run."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from . import distributed
from .device import versions
from .errors import UserError, is_out_of_memory, one_line

CONFIG = "config.json"
LOCK = ".lock"
LOCK_TIMEOUT = 40.0  # seconds
SMALL = 2**20  # bytes of a file that any machine can load


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


def can_map(path):
    """Return whether tensors can be mapped from `path`: no file of PyTorch 1.5 or earlier, with a name that is text."""
    return zipfile.is_zipfile(path) and str(path).isprintable()


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
    if not path.is_file():
        raise UserError(f"{path}: expected {what}, found {'a folder' if path.is_dir() else 'no file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and can_map(path))
    except Exception as error:  # a damaged archive surfaces as whatever the parser stumbled over
        if is_out_of_memory(error) and path.stat().st_size > SMALL:  # a small file needs much only if it is damaged
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a cut-off archive leads to
            raise UserError(f"{path}: expected {what}, but it cannot be read ({error.strerror}); check it") from None
        found = f"a damaged or cut-off file ({one_line(error)[:80]}); make it anew"
        unsafe = ("Unsupported", "GLOBAL", "WeightsUnpickler")
        if isinstance(error, pickle.UnpicklingError) and any(word in str(error) for word in unsafe):
            found = (
                "a file that asks to run code or holds other objects than tensors; refused, since loading it is unsafe"
            )
        raise UserError(f"{path}: expected {what}, found {found}") from None


def save_with_digest(path, state):
    """Save the dict `state` with its own digest, for `trusted` and `load_trusted`."""
    save(path, state | {"digest": digest(state)})


def trusted(value):
    """Return the dict that `save_with_digest` was given, from what `load` returned; None if it is something else."""
    return value if isinstance(value, dict) and value.pop("digest", None) == digest(value) else None


def load_trusted(path):
    """Return the dict that `save_with_digest` wrote to `path`; None if the file is missing, damaged or changed."""
    with contextlib.suppress(UserError):
        return trusted(load(path))


def digest(value):
    """Return the SHA-256 (hexadecimal) of nested dicts, lists and tuples of tensors, numbers and strings."""
    total = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            total.update(f"tensor {part.dtype} {tuple(part.shape)};".encode())
            total.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
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
    """Return the JSON object in `path`, which should be `what` and have the keys of `holds`, {key: type or types}.

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
def locked(folder, name=LOCK, timeout=None, alone=True):
    """Hold `folder` for this process and the others of its torchrun; the operating system lets go when rank 0 ends.

    Args:
        folder: made if it is missing.
        name: the lock's file.
        timeout: seconds to wait for it; None waits only under torchrun, which starts the next try before the last one
            has let go.
        alone: nobody else writes below the folder, so what killed processes left there is removed.

    Raises:
        UserError: another process holds it.
    """
    folder = Path(folder)
    lock = FileLock(folder / name)
    if timeout is None:
        timeout = LOCK_TIMEOUT if distributed.size() > 1 else 0

    def acquire():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise UserError(
                f"{folder}: another process is writing there; wait for it, or choose another folder"
            ) from None
        if alone:
            for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)

    distributed.on_rank0(acquire)
    try:
        yield folder
    finally:
        lock.release()


def check_config(folder, config, free=(), name=CONFIG, defaults=None, **extra):
    """Tie `folder` to the options of this run: write its config file, or compare with the one that is there.

    Args:
        folder: a result folder.
        config: dict of all options; with `dry_run` nothing is written.
        free: names of options that may change between a run and its continuation.
        name: the config file.
        defaults: {option: value} of options that older folders do not name.
        extra: more to write into a new file.

    Returns:
        The contents of the file.

    Raises:
        UserError: the folder belongs to a run with other options; the message names them.
    """
    path = Path(folder) / name
    config = json.loads(json.dumps(config))
    if not path.exists():
        content = {"options": config, "versions": versions(), **extra}
        if not config.get("dry_run"):
            write_json(path, content)
        return content
    content = read_json(path, "the options of the run in this folder", {"options": dict})
    if found := differing((defaults or {}) | content["options"], config, free):
        raise UserError(
            f"{folder} holds a run with other options ({found}); repeat its options to continue it, remove it, or "
            "choose another folder (distillations: or --tag)"
        )
    return content


def differing(before, now, free=()):
    """Return in words how two dicts of options differ in what both hold, except for the names in `free`."""
    names = [name for name in now if name not in free and name in before and before[name] != now[name]]
    return "; ".join(f"{name} {before[name]} there, {now[name]} now" for name in names)


def human_bytes(count):
    """Return a number of bytes as text: 512 bytes, 1.5 kB, 20.0 MB, 3.2 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def need_disk(folder, wanted, what):
    """Raise a `UserError` if less than `wanted` bytes are free at `folder`, which `what` need."""
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise UserError(
            f"{folder}: {what} need {human_bytes(wanted)}, {human_bytes(free)} are free; "
            "make room or choose another folder"
        )

"""Pictures on disk: trees of class folders, decoded once on all cores and cached beside the data.

A tree is `train/<class>/…` with `test/<class>/…` or `val/<class>/…`; Tiny ImageNet's own layout counts too.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time

import numpy as np

from utils import distributed, files
from utils.errors import UserError, one_line

CACHE = ".pdd_cache"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A data set as it is on disk.

    Attributes:
        train_images, test_images: uint8 NumPy arrays (N, C, H, W).
        train_labels, test_labels: int64 NumPy arrays (N,).
        class_names: list.
        statistics: (mean, standard deviation) of the training pixels in [0, 1] for each channel, where they were
            measured.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list
    statistics: tuple | None = None


def note_no_cache(path, error):
    """Tell that nothing could be kept at `path`."""
    if distributed.is_first():
        reason = error.strerror or one_line(error)  # NumPy's own have no number
        print(f"note: nothing cached at {path} ({reason}); the next start takes as long", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the pictures of a tree are made into.

    Attributes:
        channel: 1 for grey, 3 for colour.
        im_size: height and width in pixels.
        resize: bring the shorter side to im_size and cut out the centre; else other sizes are refused.
        measure: find the statistics of the training pictures.
    """

    channel: int
    im_size: int
    resize: bool = False
    measure: bool = False


def from_folders(name, root, form, num_classes=None, classes=None):
    """Read a tree of class folders through the cache beside it.

    Args:
        name: of the data set, for messages and the cache.
        root: folder of the tree.
        form: `Form`.
        num_classes: how many class folders there must be, None for any number.
        classes: names of the class folders to take, in the order of their labels; None for all, alphabetically.

    Raises:
        UserError: a folder or a picture is missing or damaged.
    """
    parts, class_names = list_folders(root, classes)
    if num_classes not in (None, len(class_names)):
        raise UserError(f"{root}: expected {num_classes} class folders for {name}, found {len(class_names)}")
    fingerprint = _fingerprint(root, parts, form)
    cache = root / CACHE / name
    found = _cached(cache, fingerprint)
    if found is None:
        try:
            found = _decode_into_cache(cache, fingerprint, parts, form)
        except OSError as error:
            note_no_cache(cache, error)
            arrays = [a for paths, labels in parts.values() for a in (_decode(paths, form, None), np.array(labels))]
            found = arrays, _statistics(arrays[0]) if form.measure else None
    arrays, statistics = found
    return Pictures(*arrays, class_names, statistics)


def list_folders(root, classes=None):
    """List the pictures of class folders.

    Args:
        root: holds train and test (or val); Tiny ImageNet's own layout (train/<class>/images, val/images with
            val/val_annotations.txt) counts too.
        classes: names of the class folders to take, in the order of their labels; None for all.

    Returns:
        ({"train": (paths, labels), "test": (paths, labels)}, class names): lists, classes in alphabetical order where
        none are named.

    Raises:
        UserError: a folder is missing or empty, or train and test have different classes.
    """
    train = root / "train"
    present = _class_folders(train)
    if not present:
        raise UserError(f"{train}: expected one folder for each class, found none")
    class_names = present if classes is None else list(classes)
    if missing := sorted(set(class_names) - set(present)):
        raise UserError(
            f"{train}: expected {len(class_names)} class folders, found {len(class_names) - len(missing)} of them and "
            f"not {missing[0]}; check --subset and --data_path"
        )
    number = {name: label for label, name in enumerate(class_names)}
    test = root / "test"
    if not test.is_dir() or not any((test / name).is_dir() for name in class_names):
        # Tiny ImageNet's test pictures carry no labels; its validation set is what everybody reports.
        test = root / "val"
    if not test.is_dir():
        raise UserError(f"{root}: expected a folder test or val beside train, found neither")
    parts = {"train": _list_classes(train, class_names)}
    annotations = test / "val_annotations.txt"
    if annotations.is_file() and (test / "images").is_dir():
        parts["test"] = _list_annotated(test, annotations, number)
    else:
        parts["test"] = _list_classes(test, class_names)
        # Sorting Tiny ImageNet's validation set into classes leaves an empty folder images behind.
        if strange := sorted(set(_class_folders(test)) - {*present, "images"}):
            raise UserError(f"{test / strange[0]}: expected the same classes as in {train}, where this one is missing")
    return parts, class_names


def _class_folders(folder):
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: expected class folders, but it cannot be read ({error.strerror})") from None


def _list_classes(folder, class_names):
    paths, labels = [], []
    for label, name in enumerate(class_names):
        where = folder / name
        if (where / "images").is_dir():
            where = where / "images"
        found = _pictures_in(where)
        if not found:
            raise UserError(f"{where}: expected pictures of class {name!r}, found none")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _pictures_in(folder):
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: expected a folder of pictures, but it cannot be read ({error.strerror})") from None
    return [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]


def _list_annotated(folder, annotations, number):
    """Tiny ImageNet's validation set: one line `file TAB class TAB box` for each picture."""
    paths, labels = [], []
    for line_number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise UserError(f"{annotations}: line {line_number}: expected file, tab, class, found {line[:60]!r}")
        paths.append(os.path.join(folder, "images", fields[0]))
        labels.append(number[fields[1]])
    if not paths:
        raise UserError(f"{annotations}: expected one line for each picture, found none")
    return paths, labels


def _fingerprint(root, parts, form):
    """A digest of the form and of names, sizes and times of all files: it changes when the data do."""
    digest = hashlib.sha1(f"{form}\n".encode())
    for paths, labels in parts.values():
        for path, label in zip(paths, labels, strict=True):
            try:
                stat = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check the data") from None
            relative = path[len(str(root)) :]
            digest.update(f"{relative}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _cached(cache, fingerprint):
    """Return (the four arrays in `cache`, images memory-mapped; statistics), None where they are not of these data."""
    try:
        about = json.loads((cache / "about.json").read_text())
        if about["fingerprint"] != fingerprint:
            return None
        statistics = about.get("statistics")
        statistics = tuple(tuple(map(float, values)) for values in statistics) if statistics else None
        arrays = [np.load(cache / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ARRAYS]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    fit = all(
        images.ndim == 4 and images.dtype == np.uint8 and labels.dtype == np.int64 and labels.shape == images.shape[:1]
        for images, labels in (arrays[:2], arrays[2:])
    )
    return (arrays, statistics) if fit and arrays[0].shape[1:] == arrays[2].shape[1:] else None


def _decode_into_cache(cache, fingerprint, parts, form):
    cache.parent.mkdir(exist_ok=True)
    _remove_leftovers(cache)
    making = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    lock = os.open(making, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        for part, (paths, labels) in parts.items():
            shape = (len(paths), form.channel, form.im_size, form.im_size)
            target = making / f"{part}_images.npy"
            np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape).flush()
            with open(target, "r+b") as file:  # a disk that is full must say so here: writing into a map would kill
                os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
            _decode(paths, form, target)
            np.save(making / f"{part}_labels.npy", np.array(labels, dtype=np.int64))
        about = {"fingerprint": fingerprint}
        if form.measure:
            about["statistics"] = _statistics(np.load(making / "train_images.npy", mmap_mode="r"))
        files.write_json(making / "about.json", about)
        shutil.rmtree(cache, ignore_errors=True)
        os.replace(making, cache)
    finally:
        os.close(lock)
        shutil.rmtree(making, ignore_errors=True)
    return _cached(cache, fingerprint)


def _remove_leftovers(cache):
    """Remove what processes left that were killed while they decoded: folders that nobody locks, a minute old."""
    for leftover in cache.parent.glob(f"{glob.escape(cache.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime < 60:
                continue
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover)
            finally:
                os.close(handle)


def _statistics(images):
    """Return (mean, standard deviation) of uint8 pictures (N, C, H, W) in [0, 1], one tuple of numbers each."""
    total, squares, pixels = 0, 0, len(images) * images.shape[2] * images.shape[3]
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000] / 255
        total, squares = total + part.sum((0, 2, 3)), squares + np.square(part).sum((0, 2, 3))
    mean = total / pixels
    # Pictures of one colour have no spread to divide by.
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    return tuple(float(round(m, 4)) for m in mean), tuple(float(round(s, 4)) for s in std)


def _decode(paths, form, target):
    """Decode pictures on all cores, into the .npy file `target` or, where it is None, into a new array."""
    chunks = [(start, paths[start : start + 1000]) for start in range(0, len(paths), 1000)]
    images = None if target else np.empty((len(paths), form.channel, form.im_size, form.im_size), dtype=np.uint8)
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers == 1:
        results = (_decode_chunk(*chunk, form, target) for chunk in chunks)
    else:
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
        futures = [pool.submit(_decode_chunk, *chunk, form, target) for chunk in chunks]
        results = (future.result() for future in futures)
    try:
        for (start, chunk), decoded in zip(chunks, results, strict=True):
            if images is not None:
                images[start : start + len(chunk)] = decoded
    finally:
        if workers > 1:
            pool.shutdown(cancel_futures=True)
    return images


def _decode_chunk(start, paths, form, target):
    images = np.empty((len(paths), form.channel, form.im_size, form.im_size), dtype=np.uint8)
    for row, path in enumerate(paths):
        pixels = _decode_picture(path, form)
        images[row] = pixels[None] if form.channel == 1 else pixels.transpose(2, 0, 1)
    if target is None:
        return images
    np.load(target, mmap_mode="r+")[start : start + len(paths)] = images
    return None


def _decode_picture(path, form):
    """Return one picture as a uint8 array (H, W) or (H, W, 3)."""
    from PIL import Image
    from torchvision.transforms import functional

    try:
        with Image.open(path) as picture:
            picture = picture.convert("L" if form.channel == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a picture, found a damaged file ({one_line(error)[:60]})") from None
    size = form.im_size
    if form.resize:
        picture = functional.center_crop(functional.resize(picture, size), [size, size])
    elif picture.size != (size, size):
        width, height = picture.size
        raise UserError(f"{path}: expected {size}x{size} pixels, found {width}x{height}")
    return np.asarray(picture)

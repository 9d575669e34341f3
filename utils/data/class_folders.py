"""Class folders: train/<class>/… with test/<class>/… or val/<class>/…, decoded once and cached beside the data.

Tiny ImageNet's own layout counts too: train/<class>/images, and val/images with val/val_annotations.txt.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..run import files
from ..run.errors import UserError, one_line
from ..run.log import log0
from .info import count_and_digest

CACHE = ".pdd_cache"
ABOUT = "about.json"
DECODER = 2  # raised when the same files are decoded into other pixels: a cache of before is made anew
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What the images of a data set are made into.

    Attributes:
        channel: 1 for grey, 3 for RGB.
        im_size: height and width in pixels.
        resize: bring the shorter side to im_size and cut out the centre; else other sizes are refused.
        measure: find mean and standard deviation of the training images.
        antialias: when resizing.
    """

    channel: int
    im_size: int
    resize: bool = False
    measure: bool = False
    antialias: bool = True


def read(name, root, spec, num_classes=None, classes=None):
    """Read class folders through the cache beside them.

    Args:
        name: the cache's, and the data set's for messages.
        root: holds train, and test or val.
        spec: `DecodeSpec`.
        num_classes: how many class folders there must be, None for any number.
        classes: names of the class folders to take, in the order of their labels; None for all, alphabetically.

    Returns:
        ((train images uint8 (N, C, H, W), train labels int64 (N,), test images, test labels); class names;
        (mean, std) per channel or None; fingerprint, see `DatasetInfo`).

    Raises:
        UserError: a folder or an image is missing or damaged, or train and test have different classes.
    """
    parts, class_names, others = _list_images(root, classes)
    if num_classes not in (None, len(class_names)):
        raise UserError(f"{root}: expected {num_classes} class folders for {name}, found {len(class_names)}")
    if len(class_names) < 2:
        raise UserError(f"{root / 'train'}: expected folders of at least two classes, found {class_names[0]} alone")
    if others:
        log0(
            f"note: {len(others)} files in class folders are not used, such as {others[0]}; images end in "
            f"{', '.join(SUFFIXES)}"
        )
    digest, fingerprint = _digests(root, parts, class_names, spec)
    shapes = {part: (len(paths), spec.channel, spec.im_size, spec.im_size) for part, (paths, _) in parts.items()}
    cache = root / CACHE / name
    found = _cached(cache, digest, shapes) or _decode_and_cache(cache, digest, shapes, parts, spec)
    (train, test), statistics = found
    train_labels, test_labels = (np.array(labels, dtype=np.int64) for _, labels in parts.values())
    return (train, train_labels, test, test_labels), class_names, statistics, fingerprint


def note_no_cache(path, error):
    """Print that nothing could be cached at `path`."""
    reason = error.strerror or one_line(error)  # NumPy's errors have no errno
    log0(f"note: nothing cached at {path} ({reason}); the next start takes as long")


def _list_images(root, classes):
    """Return ({"train": (paths, labels), "test": …}, class names, paths of other files in class folders): lists."""
    train, test, val = (root / part for part in ("train", "test", "val"))
    present = _class_folders(train)
    if not present:
        raise UserError(f"{train}: expected one folder for each class, found none")
    class_names = present if classes is None else list(classes)
    if missing := sorted(set(class_names) - set(present)):
        raise UserError(
            f"{train}: expected {len(class_names)} class folders, found {len(class_names) - len(missing)} of them and "
            f"not {missing[0]}; check --subset and --data_path"
        )
    if val.is_dir() and not any((test / name).is_dir() for name in class_names):
        test = val  # Tiny ImageNet's test images have no labels; its validation set is what everybody reports
    if not test.is_dir():
        raise UserError(f"{root}: expected a folder test or val beside train, found neither")
    others = []
    parts = {"train": _list_classes(train, class_names, others)}
    annotations = test / "val_annotations.txt"
    sorted_too = any((test / name).is_dir() for name in class_names)  # which may leave the annotations behind
    if annotations.is_file() and (test / "images").is_dir() and not sorted_too:
        return parts | {"test": _list_annotated(annotations, class_names)}, class_names, others
    in_test = _class_folders(test)
    if missing := sorted(set(class_names) - set(in_test)):
        raise UserError(
            f"{test}: expected the classes of train in {test.name}, found no {missing[0]}; add its images, or remove "
            "the class from train"
        )
    # Sorting Tiny ImageNet's validation set into classes leaves an empty folder images behind.
    if strange := sorted(set(in_test) - {*present, "images"}):
        raise UserError(f"{test / strange[0]}: expected the same classes as in {train}, where this one is missing")
    return parts | {"test": _list_classes(test, class_names, others)}, class_names, others


def _refuse(error):
    raise UserError(f"{error.filename}: expected a folder, but it cannot be read ({error.strerror})") from None


def _class_folders(folder):
    _, names, _ = next(os.walk(folder, onerror=_refuse))
    return sorted(name for name in names if not name.startswith("."))


def _list_classes(folder, class_names, others):
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = _images_below(folder / name, others)
        if not found:
            raise UserError(f"{folder / name}: expected images of class {name!r}, found none")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _images_below(top, others):
    """Return the paths of the images in `top` and in folders below, in order; append other files to `others`.

    torchvision's make_dataset would take seconds to import, and leave out folders that cannot be read.
    """
    found = []
    for folder, subfolders, names in os.walk(top, onerror=_refuse, followlinks=True):
        names += [name for name in subfolders if name.lower().endswith(SUFFIXES)]  # which decoding refuses
        subfolders[:] = sorted(
            name
            for name in set(subfolders) - set(names)
            # A link may lead back to a folder that it stands in.
            if not name.startswith(".") and not Path(folder).resolve().is_relative_to(Path(folder, name).resolve())
        )
        for name in sorted(names):
            if name.startswith("."):  # a Mac puts ._name.jpg beside name.jpg
                continue
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.join(folder, name))
            elif not name.endswith("_boxes.txt"):  # Tiny ImageNet's bounding boxes
                others.append(os.path.join(folder, name))
    return found


def _list_annotated(annotations, class_names):
    """Tiny ImageNet's validation set: one line `file TAB class TAB box` for each image."""
    number = {name: label for label, name in enumerate(class_names)}
    paths, labels = [], []
    for line_number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        file, _, rest = line.partition("\t")
        if (name := rest.partition("\t")[0]) not in number:
            raise UserError(f"{annotations}: line {line_number}: expected file, tab, class, found {line[:60]!r}")
        paths.append(str(annotations.parent / "images" / file))
        labels.append(number[name])
    if not paths:
        raise UserError(f"{annotations}: expected one line for each image, found none")
    return paths, labels


def _digests(root, parts, class_names, spec):
    """Return (digest of `spec` and of paths, labels, sizes and times of all files; fingerprint, see `DatasetInfo`)."""
    digest, fingerprint = hashlib.sha1(f"{spec} {DECODER}\n".encode()), {}
    for part, (paths, labels) in parts.items():
        members = [[] for _ in class_names]
        for path, label in zip(paths, labels, strict=True):
            try:
                stat = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check the data") from None
            line = f"{path[len(str(root)) :]}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
            members[label].append(os.fsencode(f"{os.path.basename(path)}\0{stat.st_size}\n"))
        fingerprint[part] = {
            name: count_and_digest(len(lines), b"".join(sorted(lines)))
            for name, lines in zip(class_names, members, strict=True)
        }
    return digest.hexdigest(), fingerprint


def _cached(cache, digest, shapes):
    """Return ([train images, test images], memory-mapped; (mean, std) or None); None if damaged or of other files."""
    try:
        about = json.loads((cache / ABOUT).read_text())
        if about["fingerprint"] != digest:
            return None
        statistics = about.get("statistics") and tuple([*map(float, values)] for values in about["statistics"])
        images = [np.load(cache / f"{part}_images.npy", mmap_mode="c", allow_pickle=False) for part in shapes]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    good = [array.shape for array in images] == [*shapes.values()] and all(a.dtype == np.uint8 for a in images)
    return (images, statistics) if good else None


def _decode_and_cache(cache, digest, shapes, parts, spec):
    """Return what `_cached` does; decodes all images unless another process is at it, and caches them if it can."""
    found = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if found := _cached(cache, digest, shapes):
                return found
            images, statistics = found = _decode(parts, spec)
            for leftover in cache.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            (cache / ABOUT).unlink(missing_ok=True)  # it says that the arrays are whole
            for part, array in zip(shapes, images, strict=True):
                with files.atomic(cache / f"{part}_images.npy") as file:
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                    file.write(array.data)  # np.save would not say that the disk is full
            files.write_json(cache / ABOUT, {"fingerprint": digest, "statistics": statistics})
            return _cached(cache, digest, shapes)  # frees the memory
    except OSError as error:
        note_no_cache(cache, error)
        shutil.rmtree(cache, ignore_errors=True)  # half of it would fill the disk
        return found or _decode(parts, spec)


def _decode(parts, spec):
    """Return ([train images, test images], (mean, std) or None)."""
    from .image_files import decode

    images = [decode(paths, spec) for paths, _ in parts.values()]
    return images, _statistics(images[0]) if spec.measure else None


def _statistics(images):
    """Return (mean, standard deviation) per channel of uint8 images (N, C, H, W), in units of [0, 1]."""
    mean, pixels = images.mean((0, 2, 3)) / 255, images[:, 0].size
    squares = np.einsum("nchw,nchw->c", images, images, dtype=np.float64) / 255**2
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))  # one colour has no spread to divide by
    return mean.round(4).tolist(), std.round(4).tolist()

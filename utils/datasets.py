"""Real data: decoded once, cached beside the data, held as one tensor on the device.

Every set can lie in class folders (`train/<class>/…` and `test/<class>/…` or `val/<class>/…`); CIFAR also in the
format of its authors, as torchvision downloads it; Tiny ImageNet also as its authors ship it.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from utils import files, zca
from utils.errors import UserError, one_line
from utils.runtime import stream

CACHE = ".pdd_cache"
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"}
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLIT_SEED = 0  # of the held-out pictures, whatever the seed of a run


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read: classes, channels, pixels, mean and standard deviation."""

    num_classes: int
    channel: int
    im_size: int
    statistics: tuple


KINDS = {
    "CIFAR10": Kind(10, 3, 32, CIFAR),
    "CIFAR100": Kind(100, 3, 32, CIFAR),
    "Tiny": Kind(200, 3, 64, IMAGENET),
    # Mean and standard deviation of the 1,437 training digits below.
    "Digits": Kind(10, 1, 8, ((0.3054,), (0.3760,))),
}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A data set as it is on disk: uint8 pictures (N, C, H, W) and int64 labels (N,), NumPy arrays."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list


class Source:
    """Pictures and labels to train or test on, as tensors on one device.

    Args:
        images: (N, C, H, W): uint8 pixels, float32 pixels in [0, 1], or float32 in network space.
        labels: (N,) int64.
        statistics: (mean, std) of pixels in [0, 1], per channel; None where images are in network space.
    """

    def __init__(self, images, labels, statistics=None):
        self.images = images
        self.labels = labels
        if statistics is not None:
            mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in statistics)
            self.mean, self.std = mean, std
        self.normalise = statistics is not None

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Return network-space pictures (B, C, H, W) float32 and labels (B,) at `index` (a tensor or slice)."""
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.normalise:
            images = images.sub(self.mean).div_(self.std)
        return images, self.labels[index]

    def subset(self, index):
        """Return the `Source` of the pictures at `index` (an int64 tensor)."""
        part = copy.copy(self)
        part.images, part.labels = self.images[index], self.labels[index]
        return part


class RealData:
    """A data set on a device.

    Attributes:
        name, num_classes, channel, im_size, class_names: what it is; im_size in pixels.
        train, test: `Source`s.
        selection: `Source` that accuracies inside a stage are measured on: `test`, or pictures `held_out` of `train`.
    """

    def __init__(self, name, pictures, device, whitening=None, statistics=None):
        self.name = name
        self.num_classes = len(pictures.class_names)
        self.class_names = pictures.class_names
        self.channel, self.im_size = pictures.train_images.shape[1:3]
        self.statistics = statistics or KINDS[name].statistics
        self.whitening = whitening
        self.train = self._source(pictures.train_images, pictures.train_labels, device)
        self.test = self._source(pictures.test_images, pictures.test_labels, device)
        self.selection = self.test
        labels = pictures.train_labels
        self.class_indices = [np.flatnonzero(labels == label) for label in range(self.num_classes)]

    def held_out(self, fraction):
        """Return these data with a share of each class's training pictures moved from `train` to `selection`.

        The pictures are the same for every seed, and those of a smaller share are among those of a larger one. ZCA
        whitening stays that of all training pictures, so that results are in the same space as others.

        Args:
            fraction: share of the training pictures, 0 to 1; 0 moves none.

        Raises:
            UserError: it leaves a class without pictures on one of the two sides.
        """
        if not fraction:
            return self
        kept, held = [], []
        for label, indices in enumerate(self.class_indices):
            count = round(fraction * len(indices))
            if not 0 < count < len(indices):
                raise UserError(
                    f"--val_fraction {fraction:g}: expected a share that holds out some of the {len(indices)} training "
                    f"pictures of class {self.class_names[label]!r} and keeps some, found {count} held out; change it"
                )
            order = stream(SPLIT_SEED, "held out", label).permutation(indices)
            held.append(order[:count])
            kept.append(order[count:])
        view, device = copy.copy(self), self.train.labels.device
        kept, held = (torch.from_numpy(np.sort(np.concatenate(parts))).to(device) for parts in (kept, held))
        view.train, view.selection = self.train.subset(kept), self.train.subset(held)
        labels = view.train.labels.cpu().numpy()
        view.class_indices = [np.flatnonzero(labels == label) for label in range(self.num_classes)]
        return view

    def _source(self, images, labels, device):
        labels = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        if self.whitening is None:
            return Source(pixels, labels, self.statistics)
        whitened = torch.empty(pixels.shape, device=device)
        for start in range(0, len(pixels), 10000):
            whitened[start : start + 10000] = self.whitening(pixels[start : start + 10000].float() / 255)
        return Source(whitened, labels)

    def to_pixels(self, images):
        """Return network-space `images` (N, C, H, W) as pixels, 0 to 1 where they are real pictures."""
        if self.whitening is not None:
            return self.whitening.inverse_transform(images)
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.statistics)
        return images * std + mean

    def source(self, pixels, labels):
        """Return a `Source` of pictures (N, C, H, W) in [0, 1] that are normalised as the real ones are."""
        return Source(pixels, labels, self.statistics)

    def random_indices(self, label, count, rng):
        """Return `count` different indices of training pictures of class `label`, drawn from `rng`.

        Raises:
            UserError: the class has fewer pictures.
        """
        indices = self.class_indices[label]
        if count > len(indices):
            raise UserError(
                f"{count} pictures of class {self.class_names[label]!r} asked for, "
                f"{self.name} has {len(indices)}; lower --ipc"
            )
        return rng.choice(indices, count, replace=False)


def load(name, data_path, device, whiten=False, statistics=None):
    """Load data set `name` and put it on `device`.

    Args:
        name: a key of `KINDS`.
        data_path: folder of the data.
        device: torch.device.
        whiten: ZCA whitening fitted on the training pictures instead of mean and standard deviation.
        statistics: (mean, std) instead of the data set's own.

    Raises:
        UserError: the data are missing or damaged.
    """
    pictures = read(name, data_path)
    if not whiten:
        return RealData(name, pictures, device, statistics=statistics)
    return RealData(name, pictures, device, _whitening(pictures.train_images, data_path, device))


def _whitening(images, data_path, device):
    """Fit ZCA on uint8 `images`, or take the fit that was cached for the very same pictures."""
    key = hashlib.sha1(np.ascontiguousarray(images)).hexdigest()[:16]
    path = Path(data_path) / CACHE / f"zca-{key}.pt"
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged cache is made anew
            return zca.restore(files.load(path, "a cached ZCA transform"), images[0].size, device)
    whitening = zca.fit(torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255)
    try:
        files.save(path, zca.state(whitening))
    except OSError as error:
        _note_no_cache(path, error)
    return whitening


def _note_no_cache(path, error):
    reason = error.strerror or one_line(error)  # NumPy's own have no number
    print(f"note: nothing cached at {path} ({reason}); the next start takes as long", file=sys.stderr)


def read(name, data_path):
    """Return the `Pictures` of data set `name` below `data_path`.

    Raises:
        UserError: the data are missing or damaged.
    """
    if name == "Digits":
        return _digits()
    root = Path(data_path)
    kind = KINDS[name]
    if (root / "train").is_dir():
        return _from_folders(name, root, kind)
    if name in ("CIFAR10", "CIFAR100"):
        return _cifar(name, root)
    raise UserError(
        f"{root}: expected {name} with a folder train in it, found "
        f"{'none' if root.is_dir() else 'no such folder'}; name the folder with --data_path"
    )


def _digits():
    """Scikit-learn's 1,797 digits, 8x8, with a fixed stratified split: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Pictures(images[train], labels[train], images[test], labels[test], [str(digit) for digit in range(10)])


class _BatchUnpickler(pickle.Unpickler):
    """Reads the pickled dictionaries of CIFAR's authors; any other object than NumPy's arrays is refused."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module, name):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path):
    try:
        with open(path, "rb") as file:
            return _BatchUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download the data again") from None
    except Exception as error:
        raise UserError(
            f"{path}: expected a CIFAR batch, found a damaged or foreign file "
            f"({one_line(error)[:80]}); download the data again"
        ) from None


def _cifar(name, root):
    """CIFAR in its authors' format, downloaded by torchvision where it is missing."""
    folder, train, test, label_key, meta, names_key = {
        "CIFAR10": (
            "cifar-10-batches-py",
            [f"data_batch_{n}" for n in range(1, 6)],
            "test_batch",
            "labels",
            "batches.meta",
            "label_names",
        ),
        "CIFAR100": ("cifar-100-python", ["train"], "test", "fine_labels", "meta", "fine_label_names"),
    }[name]
    if root.name == folder:
        root = root.parent
    if not (root / folder).is_dir():
        _download_cifar(name, root)

    def part(batches):
        images, labels = [], []
        for batch in batches:
            found = _unpickle(root / folder / batch)
            try:
                data = np.asarray(found["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
                batch_labels = np.asarray(found[label_key], dtype=np.int64)
                if len(data) != len(batch_labels) or not len(data):
                    raise ValueError(f"{len(data)} pictures, {len(batch_labels)} labels")
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{root / folder / batch}: expected pictures 3x32x32 with {label_key}, found {one_line(error)}; "
                    "download the data again"
                ) from None
            images.append(data)
            labels.append(batch_labels)
        return np.concatenate(images), np.concatenate(labels)

    class_names = [str(n) for n in _unpickle(root / folder / meta)[names_key]]
    pictures = Pictures(*part(train), *part([test]), class_names)
    _check_labels(root / folder, pictures, KINDS[name])
    return pictures


def _check_labels(where, pictures, kind):
    for part, labels in (("train", pictures.train_labels), ("test", pictures.test_labels)):
        present = np.unique(labels)
        if not np.array_equal(present, np.arange(kind.num_classes)):
            raise UserError(
                f"{where}: expected {kind.num_classes} classes in {part}, found {len(present)} "
                f"(labels {present.min()} to {present.max()}); check the data"
            )


def _download_cifar(name, root):
    import torchvision

    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            getattr(torchvision.datasets, name)(str(root), download=True)
    except Exception as error:
        for folder in missing:  # those that torchvision made, deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"{name} is not in {root} (neither train/<class>/ nor the original files), and downloading it failed "
            f"({one_line(error)[:100]}); put the data there or name their folder with --data_path"
        ) from None


def _from_folders(name, root, kind):
    """Read class folders through the cache beside them."""
    parts, class_names = list_folders(root)
    if len(class_names) != kind.num_classes:
        raise UserError(f"{root}: expected {kind.num_classes} class folders for {name}, found {len(class_names)}")
    fingerprint = _fingerprint(root, parts)
    cache = root / CACHE / name
    arrays = _cached(cache, fingerprint)
    if arrays is None:
        try:
            arrays = _decode_into_cache(cache, fingerprint, parts, kind)
        except OSError as error:
            _note_no_cache(cache, error)
            arrays = [
                array
                for paths, labels in parts.values()
                for array in (_decode(paths, kind.channel, kind.im_size, None), np.array(labels))
            ]
    return Pictures(*arrays, class_names)


def list_folders(root):
    """List the pictures of class folders.

    Args:
        root: holds train and test (or val); Tiny ImageNet's own layout (train/<class>/images, val/images with
            val/val_annotations.txt) counts too.

    Returns:
        ({"train": (paths, labels), "test": (paths, labels)}, class names): lists, classes in alphabetical order.

    Raises:
        UserError: a folder is missing or empty, or train and test have different classes.
    """
    train = root / "train"
    class_names = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith("."))
    if not class_names:
        raise UserError(f"{train}: expected one folder for each class, found none")
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
    return parts, class_names


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
    return [folder / name for name in names if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES]


def _list_annotated(folder, annotations, number):
    """Tiny ImageNet's validation set: one line `file TAB class TAB box` for each picture."""
    paths, labels = [], []
    for line_number, line in enumerate(annotations.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise UserError(f"{annotations}: line {line_number}: expected file, tab, class, found {line[:60]!r}")
        paths.append(folder / "images" / fields[0])
        labels.append(number[fields[1]])
    if not paths:
        raise UserError(f"{annotations}: expected one line for each picture, found none")
    return paths, labels


def _fingerprint(root, parts):
    """A digest of names, sizes and times of all files: it changes when the data do."""
    digest = hashlib.sha1()
    for paths, labels in parts.values():
        for path, label in zip(paths, labels, strict=True):
            try:
                stat = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check the data") from None
            relative = os.path.relpath(path, root)
            digest.update(f"{relative}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _cached(cache, fingerprint):
    """Return the four arrays in `cache`, images memory-mapped, or None where they are not of these data."""
    try:
        if json.loads((cache / "about.json").read_text())["fingerprint"] != fingerprint:
            return None
        arrays = [np.load(cache / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ARRAYS]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    fit = all(
        images.ndim == 4 and images.dtype == np.uint8 and labels.dtype == np.int64 and labels.shape == images.shape[:1]
        for images, labels in (arrays[:2], arrays[2:])
    )
    return arrays if fit and arrays[0].shape[1:] == arrays[2].shape[1:] else None


def _decode_into_cache(cache, fingerprint, parts, kind):
    cache.parent.mkdir(exist_ok=True)
    making = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        for part, (paths, labels) in parts.items():
            shape = (len(paths), kind.channel, kind.im_size, kind.im_size)
            target = making / f"{part}_images.npy"
            np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape).flush()
            with open(target, "r+b") as file:  # a disk that is full must say so here: writing into a map would kill
                os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
            _decode(paths, kind.channel, kind.im_size, target)
            np.save(making / f"{part}_labels.npy", np.array(labels, dtype=np.int64))
        files.write_json(making / "about.json", {"fingerprint": fingerprint})
        shutil.rmtree(cache, ignore_errors=True)
        os.replace(making, cache)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return _cached(cache, fingerprint)


def _decode(paths, channel, im_size, target):
    """Decode pictures on all cores, into the .npy file `target` or, where it is None, into a new array."""
    chunks = [(start, paths[start : start + 1000]) for start in range(0, len(paths), 1000)]
    images = None if target else np.empty((len(paths), channel, im_size, im_size), dtype=np.uint8)
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers == 1:
        results = (_decode_chunk(*chunk, channel, im_size, target) for chunk in chunks)
    else:
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
        futures = [pool.submit(_decode_chunk, *chunk, channel, im_size, target) for chunk in chunks]
        results = (future.result() for future in futures)
    try:
        for (start, chunk), decoded in zip(chunks, results, strict=True):
            if images is not None:
                images[start : start + len(chunk)] = decoded
    finally:
        if workers > 1:
            pool.shutdown(cancel_futures=True)
    return images


def _decode_chunk(start, paths, channel, im_size, target):
    from PIL import Image

    images = np.empty((len(paths), channel, im_size, im_size), dtype=np.uint8)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("L" if channel == 1 else "RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: expected a picture, found a damaged file ({one_line(error)[:60]})") from None
        if pixels.shape[:2] != (im_size, im_size):
            height, width = pixels.shape[:2]
            raise UserError(f"{path}: expected {im_size}x{im_size} pixels, found {width}x{height}")
        images[row] = pixels[None] if channel == 1 else pixels.transpose(2, 0, 1)
    if target is None:
        return images
    np.load(target, mmap_mode="r+")[start : start + len(paths)] = images
    return None

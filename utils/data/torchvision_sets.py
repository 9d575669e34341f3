"""Data sets in the files of their authors, downloaded and read by torchvision; scikit-learn's digits."""

import contextlib
import os
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..run.errors import UserError, one_line

NAMES = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN")


def digits():
    """Return the arrays of scikit-learn's 1,797 digits, 8x8, with a fixed stratified split: 1,437 to train."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def read(info, root):
    """Read one of torchvision's data sets; download it if none of its files is there.

    CIFAR's files are pickles. This is safe: torchvision unpickles no file before its MD5 is that of the authors' file.
    SVHN's files are checked in the same way, MNIST's when they are downloaded.

    Args:
        info: `DatasetInfo` of CIFAR10, CIFAR100, MNIST, FashionMNIST or SVHN.
        root: folder of the files or of the folder that torchvision makes for them.

    Returns:
        (train images uint8 (N, C, H, W), train labels int64 (N,), test images, test labels; class names).

    Raises:
        UserError: a file is missing or damaged, or the download failed.
    """
    import torchvision  # takes a second or two

    source = getattr(torchvision.datasets, info.name)
    if root.name == getattr(source, "base_folder", None):
        root = root.parent
    checksums, folders = _layout(source, root)

    def find():
        return next((folder for folder in folders if any((folder / file).exists() for file in checksums)), None)

    folder = find()
    if folder is None or not all((folder / file).is_file() for file in checksums):
        with _alone(root, info.name):  # another process may be downloading or unpacking
            folder = find() or _download(source, root) or find()
    again = f"put the authors' file there, or remove {folder} to download all again"
    for file in checksums:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: expected a file of {info.name}, found none; {again}")
    arrays = []
    for split in ("train", "test"):
        try:
            part = _open(source, folder, split)
            arrays += _arrays(part, info)
        except Exception as error:  # whatever a damaged file makes a reader stumble over
            if file := _wrong_file(folder, checksums):
                found = f"{folder / file}: expected the file with MD5 {checksums[file]}, found a damaged or foreign one"
            else:
                found = f"{folder}: expected {split} files of {info.name}, found damaged ones ({one_line(error)[:120]})"
            raise UserError(f"{found}; {again}") from None
    named = info.name in ("CIFAR10", "CIFAR100", "FashionMNIST")
    return arrays, [str(name) for name in part.classes] if named else info.class_names


def _layout(source, root):
    """Return ({file: its MD5, or None if only its archive has one}, folders that may hold the files)."""
    name = source.__name__
    if name == "SVHN":
        checksums = {source.split_list[part][1]: source.split_list[part][2] for part in ("train", "test")}
        return checksums, [root, root / "svhn", root / name]
    if name.startswith("CIFAR"):
        meta = {source.meta["filename"]: source.meta["md5"]}
        return dict(source.train_list + source.test_list) | meta, [root / source.base_folder]
    return {Path(file).stem: None for file, _ in source.resources}, [root / name / "raw", root / "raw", root]


def _open(source, folder, split):
    """Return torchvision's data set `split` of the files in `folder`."""
    if source.__name__ == "SVHN":
        return source(folder, split)
    if source.__name__.startswith("CIFAR"):
        return source(folder.parent, split == "train")
    # MNIST's files may lie in other folders than torchvision's own.
    return type(source.__name__, (source,), {"raw_folder": str(folder)})(folder, split == "train")


def _arrays(part, info):
    """Return uint8 images (N, C, H, W) and int64 labels (N,) of torchvision's data set `part`.

    Raises:
        ValueError: they are not what `info` says.
    """
    images, labels = np.asarray(part.data), np.asarray(part.labels if info.name == "SVHN" else part.targets)
    if info.name.startswith("CIFAR"):
        images = images.transpose(0, 3, 1, 2)
    elif info.channel == 1:
        images = images[:, None]
    shape = (len(labels), info.channel, info.im_size, info.im_size)
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"images {images.shape} of {images.dtype} and {len(labels)} labels")
    present = np.unique(labels)
    if not np.array_equal(present, np.arange(info.num_classes)):
        raise ValueError(f"{len(present)} classes instead of {info.num_classes}")
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _wrong_file(folder, checksums):
    """Return the name of the first file that has another MD5; None if there is none."""
    from torchvision.datasets.utils import check_md5

    for file, md5 in checksums.items():
        with contextlib.suppress(OSError):
            if md5 and not check_md5(folder / file, md5):
                return file
    return None


@contextlib.contextmanager
def _alone(root, name):
    """Let one process at a time work below `root`, if it can be; in the end its lock goes, and new empty folders."""
    inside = root / name / "raw"  # the deepest that torchvision makes
    missing = [folder for folder in (inside, *inside.parents) if not folder.exists()]
    path = root / ".download.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        yield
        return
    with FileLock(path):  # which begins again if another process has removed the file
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in filter(Path.exists, missing):  # deepest first, if nothing came to be there
                    folder.rmdir()


def _download(source, root):
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for part in ("train", "test") if source.__name__ == "SVHN" else (True,):
                source(root, part, download=True)
    except Exception as error:
        raise UserError(
            f"{source.__name__} is not in {root} (neither train/<class>/ nor the authors' files), and downloading it "
            f"failed ({one_line(error)[:100]}); put the data there or name their folder with --data_path"
        ) from None

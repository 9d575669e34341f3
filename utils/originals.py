"""Data sets in the files of their authors: CIFAR's pickled batches, SVHN's MATLAB files, MNIST's IDX files, the digits.

Missing files are downloaded by torchvision, which knows where they are and their check sums.
"""

import contextlib
import os
import pickle

import numpy as np

from utils.errors import UserError, one_line
from utils.pictures import Pictures

DIGITS = [str(digit) for digit in range(10)]


def digits():
    """Scikit-learn's 1,797 digits, 8x8, with a fixed stratified split: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Pictures(images[train], labels[train], images[test], labels[test], DIGITS)


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


def cifar(name, root):
    """CIFAR in its authors' format."""
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
        _download(name, root)

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
    return Pictures(*part(train), *part([test]), class_names)


def mnist(name, root):
    """MNIST and FashionMNIST as IDX files."""
    import torchvision
    from torchvision.datasets.mnist import read_image_file, read_label_file

    places = (root, root / "raw", root / name / "raw")

    def find():
        return next((place for place in places if (place / "train-images-idx3-ubyte").exists()), None)

    folder = find() or _download(name, root) or find()

    def part(prefix):
        found = []
        for kind, read in (("images-idx3", read_image_file), ("labels-idx1", read_label_file)):
            path = folder / f"{prefix}-{kind}-ubyte"
            with _reading(path, "an IDX file"):
                found.append(read(str(path)).numpy())
        with _reading(folder / f"{prefix}-images-idx3-ubyte", "28x28 pictures, as many as labels"):
            images = found[0].reshape(-1, 1, 28, 28)
            _same_length(images, found[1])
        return images, found[1].astype(np.int64)

    class_names = torchvision.datasets.FashionMNIST.classes if name == "FashionMNIST" else DIGITS
    return Pictures(*part("train"), *part("t10k"), list(class_names))


def svhn(name, root):
    """SVHN's cropped digits as MATLAB files."""
    from scipy.io import loadmat

    places = (root, root / "svhn", root / name)

    def find():
        return next((place for place in places if (place / "train_32x32.mat").exists()), None)

    folder = find() or _download(name, root) or find()

    def part(prefix):
        path = folder / f"{prefix}_32x32.mat"
        with _reading(path, "a MATLAB file with pictures X (32, 32, 3, N) and labels y"):
            found = loadmat(path, variable_names=("X", "y"))
            images = np.ascontiguousarray(found["X"].astype(np.uint8, casting="safe").transpose(3, 2, 0, 1))
            images = images.reshape(-1, 3, 32, 32)
            labels = found["y"].reshape(-1).astype(np.int64) % 10  # the authors write 10 for the digit 0
            _same_length(images, labels)
        return images, labels

    return Pictures(*part("train"), *part("test"), DIGITS)


@contextlib.contextmanager
def _reading(path, what):
    """Turn whatever a damaged file makes a reader stumble over into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)[:80]
        raise UserError(f"{path}: expected {what}, but it cannot be read ({reason}); download it again") from None
    except Exception as error:
        raise UserError(
            f"{path}: expected {what}, found a damaged or foreign file ({one_line(error)[:80]}); download it again"
        ) from None


def _same_length(images, labels):
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} pictures, {len(labels)} labels")


def _download(name, root):
    """Let torchvision download data set `name` into `root`."""
    import torchvision

    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for part in ({"split": "train"}, {"split": "test"}) if name == "SVHN" else ({},):
                getattr(torchvision.datasets, name)(str(root), download=True, **part)
    except Exception as error:
        for folder in missing:  # those that torchvision made, deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"{name} is not in {root} (neither train/<class>/ nor the original files), and downloading it failed "
            f"({one_line(error)[:100]}); put the data there or name their folder with --data_path"
        ) from None


READERS = {
    "CIFAR10": cifar,
    "CIFAR100": cifar,
    "MNIST": mnist,
    "FashionMNIST": mnist,
    "SVHN": svhn,
}

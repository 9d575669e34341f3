"""Small data sets in the files of their authors, written the way these write them."""

import hashlib
import pickle
import struct

import numpy as np

from tests.conftest import make_tree

WNIDS = [f"n{n:08d}" for n in range(200)]

_MD5 = set()  # of the files that were written here


def accept_written(monkeypatch):
    """Let torchvision accept the files that this module wrote as those of the authors, and no others."""
    from torchvision.datasets.utils import calculate_md5

    def accept(path, *_, **__):
        return calculate_md5(path) in _MD5

    monkeypatch.setattr("torchvision.datasets.utils.check_md5", accept)


def write_bytes(path, content):
    """Write a file that `accept_written` accepts."""
    path.write_bytes(content)
    _MD5.add(hashlib.md5(content).hexdigest())


def patterned(count, channel, size, seed=0):
    """Return uint8 images (count, channel, size, size) that a network can learn, and their labels 0-9 in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    coarse = np.random.default_rng(7).integers(40, 216, (10, channel, 4, 4))[labels]
    images = np.kron(coarse, np.ones((1, 1, size // 4, size // 4), dtype=int))
    return (images + rng.integers(-40, 41, images.shape)).astype(np.uint8), labels


def write_cifar(root, name="CIFAR10", count=20):
    """Pickled dictionaries with one row of 3,072 bytes for each image."""
    folder = root / {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[name]
    folder.mkdir(parents=True)
    batches, labels_key = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], "labels"
    meta, names_key, classes = "batches.meta", "label_names", 10
    if name == "CIFAR100":
        batches, labels_key = ["train", "test"], "fine_labels"
        meta, names_key, classes = "meta", "fine_label_names", 100
    for seed, batch in enumerate(batches):
        images, _ = patterned(count, 3, 32, seed)
        labels = [i % classes for i in range(count)]
        rows = {"data": images.reshape(count, -1), labels_key: labels, "batch_label": batch, "filenames": ["x"]}
        write_bytes(folder / batch, pickle.dumps(rows, protocol=2))
    write_bytes(folder / meta, pickle.dumps({names_key: [f"name{n}" for n in range(classes)]}, protocol=2))
    return folder


def write_idx(root, name="MNIST"):
    """IDX: two zero bytes, the type (8: unsigned bytes), the number of axes, their lengths, the values."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for seed, (prefix, count) in enumerate((("train", 100), ("t10k", 20))):
        images, labels = patterned(count, 1, 28, seed)
        for kind, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            write_bytes(folder / f"{prefix}-{kind}-ubyte", head + values.tobytes())
    return folder


def write_mat(root):
    """SVHN: X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for seed, (prefix, count) in enumerate((("train", 100), ("test", 20))):
        images, labels = patterned(count, 3, 32, seed)
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)
        path = root / f"{prefix}_32x32.mat"
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})
        write_bytes(path, path.read_bytes())
    return root


def write_tiny(root, sorted_val=False):
    """Tiny ImageNet as downloaded, or with the validation set sorted into class folders."""
    make_tree(root, WNIDS, 2, 1, 64, "val")
    lines = []
    for number, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir()
        for path in (root / "train" / wnid).glob("*.png"):
            save_jpeg(path, images / f"{wnid}_{path.stem}.JPEG")
        name = f"val_{199 - number}.JPEG"
        where = root / "val" / (wnid if sorted_val else "images")
        where.mkdir(exist_ok=True)
        save_jpeg(root / "val" / wnid / "0000.png", where / name)
        if not sorted_val:
            (root / "val" / wnid).rmdir()
        lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    if not sorted_val:
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)  # images without labels, as downloaded
    return root


def save_jpeg(source, target):
    """Turn one PNG into a JPEG."""
    from PIL import Image

    with Image.open(source) as image:
        image.save(target, quality=95)
    source.unlink()


def write_mixed(root, classes):
    """Class folders of images of many sizes and modes, as people have them."""
    from PIL import Image

    make_tree(root, classes, 6, 2)
    sizes = [(40, 60), (33, 33), (90, 50), (32, 64), (128, 48), (36, 35)]
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        with Image.open(path) as image:
            mode = ("RGB", "L", "RGBA", "P")[number % 4]
            image.resize(sizes[number % len(sizes)]).convert(mode).save(path)
    return root

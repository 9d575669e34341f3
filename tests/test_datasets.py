import fcntl
import os
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import make_tree
from utils import datasets, pictures
from utils.errors import UserError

CPU = torch.device("cpu")


def test_digits_are_split_in_a_fixed_stratified_way():
    first, second = datasets.read("Digits", ""), datasets.read("Digits", "")
    assert first.train_images.shape == (1437, 1, 8, 8) and first.test_images.shape == (360, 1, 8, 8)
    assert np.array_equal(first.train_images, second.train_images)
    counts = np.bincount(first.test_labels)
    assert counts.min() >= 34 and counts.max() <= 37
    real = datasets.load("Digits", "", CPU)
    pictures = real.train.batch(slice(None))[0]
    assert abs(float(pictures.mean())) < 1e-3 and abs(float(pictures.std()) - 1) < 1e-3


def test_class_folders_are_decoded_once_and_cached(cifar_tree, monkeypatch):
    first = datasets.load("CIFAR10", cifar_tree, CPU)
    assert first.class_names[0] == "airplane" and first.class_names[9] == "truck"
    assert len(first.train) == 120 and len(first.test) == 20
    from PIL import Image

    pixels = np.asarray(Image.open(cifar_tree / "train" / "automobile" / "0003.png")).transpose(2, 0, 1)
    assert np.array_equal(first.train.images[12 + 3].numpy(), pixels)
    monkeypatch.setattr(pictures, "_decode", None)  # a second start must not decode
    second = datasets.load("CIFAR10", cifar_tree, CPU)
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.test.labels, second.test.labels)


def test_a_changed_tree_is_decoded_again(tmp_path):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    before = datasets.read("CIFAR10", tree).train_images.copy()
    (tree / "train" / "class0" / "0001.png").write_bytes((tree / "train" / "class1" / "0001.png").read_bytes())
    after = datasets.read("CIFAR10", tree).train_images
    assert not np.array_equal(before[1], after[1]) and np.array_equal(after[1], after[3])


def test_what_killed_decodings_left_is_removed(tmp_path):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    dead, alive, young = (tree / pictures.CACHE / f"CIFAR10.{pid}.tmp" for pid in (1, 2, 3))
    for folder in (dead, alive, young):
        folder.mkdir(parents=True)
        (folder / "train_images.npy").write_bytes(b"half")
        if folder != young:
            os.utime(folder, (0, 0))
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        datasets.read("CIFAR10", tree)
    finally:
        os.close(lock)
    assert sorted(path.name for path in dead.parent.iterdir()) == ["CIFAR10", alive.name, young.name]


def test_a_read_only_tree_works_without_a_cache(tmp_path, monkeypatch, capsys):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(pictures, "_decode_into_cache", refuse)
    assert datasets.read("CIFAR10", tree).train_images.shape == (20, 3, 32, 32)
    assert "nothing cached" in capsys.readouterr().err


def write_cifar10(root, count=20):
    """The authors' format: pickled dictionaries of one row of 3,072 bytes for each picture."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {
            "data": data,
            "labels": [i % 10 for i in range(count)],
            "batch_label": name,
            "filenames": ["x"] * count,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"name{n}" for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def test_cifar10_in_its_authors_format(tmp_path):
    folder = write_cifar10(tmp_path)
    for path in (tmp_path, folder):
        found = datasets.read("CIFAR10", path)
        assert found.train_images.shape == (100, 3, 32, 32) and found.class_names[3] == "name3"
    batch = pickle.loads((folder / "data_batch_2").read_bytes())
    assert np.array_equal(found.train_images[20].reshape(-1), batch["data"][0])
    assert found.train_labels[20:25].tolist() == [0, 1, 2, 3, 4]


def test_cifar100_in_its_authors_format(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        batch = {"data": np.zeros((200, 3072), dtype=np.uint8), "fine_labels": list(range(100)) * 2}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(n) for n in range(100)]}))
    assert len(datasets.read("CIFAR100", tmp_path).class_names) == 100


class Malice:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda f: (f / "data_batch_3").write_bytes(b""), "damaged or foreign"),
        (lambda f: (f / "data_batch_3").write_bytes((f / "data_batch_3").read_bytes()[:500]), "damaged or foreign"),
        (lambda f: (f / "data_batch_3").unlink(), "cannot be read"),
        (lambda f: (f / "test_batch").write_bytes(pickle.dumps({"labels": [1]})), "expected pictures 3x32x32"),
        (lambda f: (f / "test_batch").write_bytes(pickle.dumps(Malice())), "builtins.print"),
        (lambda f: (f / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]})),
         "expected 10 classes in test of CIFAR10, found 2"),
    ],
)  # fmt: skip
def test_damaged_cifar_files_are_named(tmp_path, damage, words, capsys):
    folder = write_cifar10(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=words):
        datasets.read("CIFAR10", tmp_path)
    assert "code of the file ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda t: (t / "train/class3/0000.png").write_bytes(b"no picture"), "class3/0000.png: expected a picture"),
        (lambda t: (t / "train/class3/0000.png").write_bytes((t / "train/class3/0000.png").read_bytes()[:900]),
         "expected a picture, found a damaged"),
        (lambda t: [p.unlink() for p in (t / "train/class3").iterdir()], "class3: expected pictures"),
        (lambda t: (t / "train/class10").mkdir(), "expected 10 class folders for CIFAR10, found 11|expected pictures"),
        (lambda t: [p.unlink() for p in (t / "test/class2").iterdir()], "class2: expected pictures"),
        (lambda t: (t / "test").rename(t / "elsewhere"), "expected a folder test or val"),
    ],
)  # fmt: skip
def test_damaged_class_folders_are_named(tmp_path, damage, words):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    damage(tree)
    with pytest.raises(UserError, match=words):
        datasets.read("CIFAR10", tree)


def test_pictures_of_another_size_are_refused(tmp_path):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 1, 1, size=28)
    with pytest.raises(UserError, match="expected 32x32 pixels, found 28x28"):
        datasets.read("CIFAR10", tree)


@pytest.mark.parametrize("sorted_val", [True, False])
def test_tiny_imagenet_as_downloaded_and_sorted(tmp_path, sorted_val):
    from PIL import Image

    rng = np.random.default_rng(0)
    names = [f"n{n:08d}" for n in range(200)]
    lines = []
    for label, name in enumerate(names):
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / "train" / name / "images" / f"{name}_0.JPEG"
        )
        where = tmp_path / "val" / (name if sorted_val else "images")
        where.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (label, 0, 0)).save(where / f"val_{199 - label}.JPEG", quality=100)
        lines.append(f"val_{199 - label}.JPEG\t{name}\t0\t0\t62\t62\n")
    if not sorted_val:
        (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "test" / "images").mkdir(parents=True)  # without labels, as downloaded
    found = datasets.read("Tiny", tmp_path)
    assert found.train_images.shape == (200, 3, 64, 64)
    for image, label in zip(found.test_images, found.test_labels, strict=True):
        assert abs(int(image[0, 5, 5]) - label) <= 3


def test_zca_whitens_is_inverted_and_cached(cifar_tree, monkeypatch):
    real = datasets.load("CIFAR10", cifar_tree, CPU, whiten=True)
    pixels = datasets.read("CIFAR10", cifar_tree).train_images
    restored = real.to_pixels(real.train.images)
    torch.testing.assert_close(restored, torch.from_numpy(pixels / 255).float(), rtol=0, atol=2e-3)
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1) / 255)
    centred = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(flat) - 1))
    expected = centred @ (vectors * (values.clamp(min=0) + 0.1).rsqrt()) @ vectors.T
    torch.testing.assert_close(real.train.images.flatten(1).double(), expected, rtol=0, atol=2e-3)
    monkeypatch.setattr(datasets.zca, "fit", None)
    again = datasets.load("CIFAR10", cifar_tree, CPU, whiten=True)
    assert torch.equal(again.train.images, real.train.images)


def test_more_pictures_than_a_class_has():
    real = datasets.load("Digits", "", CPU)
    with pytest.raises(UserError, match="lower --ipc"):
        real.random_indices(0, 2000, np.random.default_rng(0))

import json
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

from tests.conftest import make_tree
from tests.support import formats
from utils.data import class_folders, datasets
from utils.data.class_folders import DecodeSpec
from utils.data.image_files import decode_image
from utils.data.info import changes, pixel_fingerprint
from utils.run import files
from utils.run.errors import UserError
from utils.stages import random_unions
from utils.synthetic import init_subset

CPU = torch.device("cpu")


def test_digits_are_split_in_a_fixed_stratified_way():
    first, second = datasets.read("Digits", ""), datasets.read("Digits", "")
    assert first.train_images.shape == (1437, 1, 8, 8) and first.test_images.shape == (360, 1, 8, 8)
    assert np.array_equal(first.train_images, second.train_images)
    counts = np.bincount(first.test_labels)
    assert counts.min() >= 34 and counts.max() <= 37
    real = datasets.load("Digits", "", CPU)
    images = real.train.batch(slice(None))[0]
    assert abs(float(images.mean())) < 1e-3 and abs(float(images.std()) - 1) < 1e-3


def test_class_folders_are_decoded_once_and_cached(cifar_tree, monkeypatch):
    first = datasets.load("CIFAR10", cifar_tree, CPU)
    assert first.info.class_names[0] == "airplane" and first.info.class_names[9] == "truck"
    assert len(first.train) == 120 and len(first.test) == 20
    pixels = np.asarray(Image.open(cifar_tree / "train" / "automobile" / "0003.png")).transpose(2, 0, 1)
    assert np.array_equal(first.train.images[12 + 3].numpy(), pixels)
    monkeypatch.setattr(class_folders, "_decode", None)  # a second start must not decode
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
    dead, other = (tree / class_folders.CACHE / name for name in ("CIFAR10", "ImageNet-x-64"))
    for folder in (dead, other):
        folder.mkdir(parents=True)
        (folder / ".train_images.npy.1.tmp").write_bytes(b"half")
    datasets.read("CIFAR10", tree)
    assert {p.name for p in dead.iterdir()} == {".lock", "about.json", "test_images.npy", "train_images.npy"}
    assert len(list(other.iterdir())) == 1


@pytest.mark.parametrize("full", ["train_images.npy", "test_images.npy", "about.json"])
def test_a_cache_that_cannot_be_written_is_not_taken_for_whole(full, tmp_path, monkeypatch, capsys):
    """The disk is full in the middle of the second data set's files: nothing of the first one is used for it."""
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    datasets.read("CIFAR10", tree)
    (tree / "train" / "class0" / "0001.png").write_bytes((tree / "train" / "class1" / "0001.png").read_bytes())
    atomic = files.atomic

    def fail(path, mode="wb"):
        if path.name == full:
            raise OSError(28, "No space left on device", str(path))
        return atomic(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic", fail)
        found = datasets.read("CIFAR10", tree)
    assert "nothing cached" in capsys.readouterr().err and not list(tree.rglob("about.json"))
    again = datasets.read("CIFAR10", tree)
    assert list(tree.rglob("about.json"))
    for images in (found.train_images, again.train_images):
        assert np.array_equal(images[1], images[3])


def test_a_second_process_waits_for_the_first_ones_cache(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    expected = np.array(datasets.read("CIFAR10", tree).train_images)
    cache = tree / class_folders.CACHE / "CIFAR10"
    (cache / "about.json").rename(cache / "about")
    monkeypatch.setattr(class_folders, "_decode", None)  # the second one must not decode
    asked, found = threading.Event(), []

    class Lock(FileLock):
        def acquire(self, *arguments, **options):
            asked.set()
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(class_folders, "FileLock", Lock)
    waiting = threading.Thread(target=lambda: found.append(datasets.read("CIFAR10", tree).train_images), daemon=True)
    with FileLock(cache / ".lock"):
        waiting.start()
        assert asked.wait(60) and not found
        (cache / "about").rename(cache / "about.json")
    waiting.join(60)
    assert np.array_equal(found[0], expected)


def test_a_read_only_tree_works_without_a_cache(tmp_path, monkeypatch, capsys):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    cached = datasets.read("CIFAR10", tree)
    shutil.rmtree(tree / class_folders.CACHE)
    monkeypatch.setattr(class_folders, "FileLock", refuse)
    found = datasets.read("CIFAR10", tree)
    assert np.array_equal(found.train_images, cached.train_images)
    assert np.array_equal(found.test_labels, cached.test_labels)
    assert "nothing cached" in capsys.readouterr().err


@pytest.fixture
def md5(monkeypatch):
    """torchvision takes the small files of `formats` for those of the authors."""
    formats.accept_written(monkeypatch)


@pytest.mark.parametrize("workers", [2, 5])
def test_many_workers_decode_what_one_does(workers, tmp_path, monkeypatch):
    tree = formats.write_mixed(tmp_path / "t", ["cat", "dog"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    alone = datasets.read("folder", tree, res=24)
    shutil.rmtree(tree / class_folders.CACHE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(workers))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    found = datasets.read("folder", tree, res=24)
    assert torch.equal(torch.rand(1), expected)  # loading draws nothing from the global generator
    assert np.array_equal(found.train_images, alone.train_images) and found.info == alone.info
    paths = sorted((tree / "train" / "dog").iterdir())
    for path in paths[2:4]:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"^{paths[2]}: expected an image"):
        datasets.read("folder", tree, res=24)


def test_cifar10_in_its_authors_format(tmp_path, md5):
    folder = formats.write_cifar(tmp_path)
    for path in (tmp_path, folder):
        found = datasets.read("CIFAR10", path)
        assert found.train_images.shape == (100, 3, 32, 32) and found.info.class_names[3] == "name3"
    batch = pickle.loads((folder / "data_batch_2").read_bytes())
    assert np.array_equal(found.train_images[20].reshape(-1), batch["data"][0])
    assert found.train_labels[20:25].tolist() == [0, 1, 2, 3, 4]


def test_one_process_downloads_while_others_wait(tmp_path, md5, monkeypatch):
    root, locked = tmp_path / "data", []

    def download(source, root):
        with pytest.raises(Timeout), FileLock(root / ".download.lock", timeout=0):
            pass
        locked.append(source.__name__)
        formats.write_cifar(root)

    monkeypatch.setattr("utils.data.torchvision_sets._download", download)
    for _ in range(2):
        assert len(datasets.read("CIFAR10", root).train_images) == 100
    assert locked == ["CIFAR10"] and not (root / ".download.lock").exists()


def test_cifar100_in_its_authors_format(tmp_path, md5):
    formats.write_cifar(tmp_path, "CIFAR100", 200)
    found = datasets.read("CIFAR100", tmp_path)
    assert len(found.info.class_names) == 100 and found.test_labels[:3].tolist() == [0, 1, 2]


class Malice:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_foreign_pickles_are_refused_before_they_are_unpickled(file, tmp_path, md5, capsys):
    folder = formats.write_cifar(tmp_path)
    (folder / file).write_bytes(pickle.dumps(Malice()))
    with pytest.raises(
        UserError, match=f"{file}: expected the file with MD5 [0-9a-f]*, found a damaged or foreign one"
    ):
        datasets.read("CIFAR10", tmp_path)
    assert "code of the file ran" not in capsys.readouterr().out
    pickle.loads((folder / file).read_bytes())
    assert "code of the file ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    "batch,words",
    [
        ({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 1]},
         "expected test files .*2 classes instead of 10"),
        ({"labels": [1]}, "expected test files of CIFAR10"),
        ({"data": np.zeros((10, 3072)), "labels": [*range(10)]}, "expected test files .* of float64"),
    ],
)  # fmt: skip
def test_foreign_contents_of_authors_files(batch, words, tmp_path, md5):
    folder = formats.write_cifar(tmp_path)
    formats.write_bytes(folder / "test_batch", pickle.dumps(batch))
    with pytest.raises(UserError, match=words):
        datasets.read("CIFAR10", tmp_path)


@pytest.mark.parametrize(
    "name,inside", [("CIFAR10", ""), ("CIFAR10", "cifar-10-batches-py"), ("MNIST", ""), ("SVHN", "")]
)
def test_a_failed_download_leaves_nothing(name, inside, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    for module in ("cifar.download_and_extract_archive", "mnist.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{module}", fail)
    with pytest.raises(UserError, match=f"{name} is not in {tmp_path / 'data'} .*no route to host.*--data_path"):
        datasets.read(name, tmp_path / "data" / inside)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda t: (t / "train/class3/0000.png").write_bytes(b"no image"), "class3/0000.png: expected an image"),
        (lambda t: (t / "train/class3/0000.png").write_bytes((t / "train/class3/0000.png").read_bytes()[:900]),
         "expected an image, found a damaged"),
        (lambda t: [p.unlink() for p in (t / "train/class3").iterdir()], "class3: expected images"),
        (lambda t: (t / "train/class10").mkdir(), "expected 10 class folders for CIFAR10, found 11|expected images"),
        (lambda t: [p.unlink() for p in (t / "test/class2").iterdir()], "class2: expected images"),
        (lambda t: (t / "test").rename(t / "elsewhere"), "expected a folder test or val"),
        (lambda t: shutil.rmtree(t / "test/class2"), "test: expected the classes of train in test, found no class2"),
        (lambda t: [shutil.rmtree(p) for p in (t / "test").iterdir()],
         "test: expected the classes of train in test, found no class0"),
        (lambda t: (t / "test/class10").mkdir(), "test/class10: expected the same classes as in .*train"),
    ],
)  # fmt: skip
def test_damaged_class_folders_are_named(tmp_path, damage, words):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 2, 1)
    damage(tree)
    with pytest.raises(UserError, match=words):
        datasets.read("CIFAR10", tree)


@pytest.mark.parametrize("mode,suffix,top", [("I;16", "png", 65535), ("I", "tiff", 65535), ("I", "tiff", 255)])
def test_images_of_16_bits_are_scaled(mode, suffix, top, tmp_path):
    """A file of 32 bits for a number may hold numbers of 16, or of 8, which stay as they are."""
    tree = make_tree(tmp_path / "t", ["cat", "dog"], 1, 1)
    ramp = np.linspace(0, top, 32 * 32).reshape(32, 32)
    array = ramp.astype(np.uint16 if mode == "I;16" else np.int32)
    Image.fromarray(array).save(tree / "train" / "cat" / f"0000.{suffix}")
    found = datasets.read("folder", tree, res=32).train_images
    (image,) = (one[0] for one in found if np.ptp(one[0].astype(int)) == 255 and (one[0] == one[1]).all())
    assert np.abs(image - ramp * 255 / top).max() <= 1


def test_images_that_are_no_8_or_16_bits_are_named(tmp_path):
    tree = make_tree(tmp_path / "t", ["cat", "dog"], 1, 1)
    Image.fromarray(np.random.default_rng(0).random((32, 32), dtype=np.float32)).save(tree / "train/cat/0000.tiff")
    with pytest.raises(UserError, match=r"0000\.tiff: expected 8 or 16 bits a channel, found floats; save it"):
        datasets.read("folder", tree, res=32)


def test_a_decoder_that_stumbles_is_one_line(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "t", ["cat", "dog"], 1, 1)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(TypeError("not a number")))
    with pytest.raises(UserError, match="expected an image, found a damaged file"):
        datasets.read("folder", tree, res=32)


def test_hidden_files_of_a_mac_are_no_images(tmp_path, capsys):
    tree = make_tree(tmp_path / "t", ["cat", "dog"], 2, 1)
    (tree / "train" / "cat" / "._0000.png").write_bytes(b"companion")
    assert len(datasets.read("folder", tree, res=32).train_images) == 4 and capsys.readouterr().err == ""


def test_one_class_is_refused(tmp_path):
    tree = make_tree(tmp_path / "t", ["cat"], 2, 1)
    with pytest.raises(UserError, match="train: expected folders of at least two classes, found cat alone"):
        datasets.read("folder", tree, res=32)


def test_images_of_another_size_are_refused(tmp_path):
    tree = make_tree(tmp_path / "t", [f"class{n}" for n in range(10)], 1, 1, size=28)
    with pytest.raises(UserError, match="expected 32x32 pixels, found 28x28"):
        datasets.read("CIFAR10", tree)


@pytest.mark.parametrize("sorted_val,annotated", [(True, False), (True, True), (False, True)])
def test_tiny_imagenet_as_downloaded_and_sorted(tmp_path, sorted_val, annotated):
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
    if annotated:
        (tmp_path / "val" / "images").mkdir(exist_ok=True)  # sorting may leave it behind, empty
        (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "test" / "images").mkdir(parents=True)  # without labels, as downloaded
    found = datasets.read("Tiny", tmp_path)
    assert found.train_images.shape == (200, 3, 64, 64)
    for image, label in zip(found.test_images, found.test_labels, strict=True):
        assert abs(int(image[0, 5, 5]) - label) <= 3


def test_zca_whitens_is_inverted_and_cached(cifar_tree, monkeypatch):
    real = datasets.load("CIFAR10", cifar_tree, CPU, whiten=True)
    pixels = datasets.read("CIFAR10", cifar_tree).train_images
    restored = real.info.to_pixels(real.train.images)
    torch.testing.assert_close(restored, torch.from_numpy(pixels / 255).float(), rtol=0, atol=2e-3)
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1) / 255)
    left, scales, right = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    expected = (left * scales * (scales.square() / (len(flat) - 1) + 0.1).rsqrt()) @ right
    torch.testing.assert_close(real.train.images.flatten(1).double(), expected, rtol=0, atol=2e-3)
    monkeypatch.setattr(datasets.zca, "fit", None)
    again = datasets.load("CIFAR10", cifar_tree, CPU, whiten=True)
    assert torch.equal(again.train.images, real.train.images)


def test_more_images_than_a_class_has():
    real = datasets.load("Digits", "", CPU)
    most = min(map(len, real.class_indices))
    for init, factor, largest in (("random", 1, most), ("mix", 2, most // 4)):
        init_subset(real, largest, init, np.random.default_rng(0), factor=factor)
        with pytest.raises(UserError, match=f"found [0-9]+; lower --ipc to {largest} at most, or begin with noise"):
            init_subset(real, largest + 1, init, np.random.default_rng(0), factor=factor)
    random_unions(real, [(0, most // 2), (0, most)], 0, ())
    with pytest.raises(UserError, match=f"--skip_random, or distil with --ipc times --num_intervals at most {most}$"):
        random_unions(real, [(0, most), (0, most + 1)], 0, ())


def test_own_folders_without_train(tmp_path):
    make_tree(tmp_path, ["cat", "dog"], 2, 1)
    shutil.move(tmp_path / "train", tmp_path / "training")
    with pytest.raises(UserError, match="expected train/<class>/… and test/<class>/… of folder, found no folder train"):
        datasets.read("folder", tmp_path, res=32)


def test_nested_folders_are_read_and_other_files_counted(tmp_path, capsys):
    tree = make_tree(tmp_path / "t", ["cat", "dog"], 3, 1)
    flat = datasets.read("folder", tree, res=32)
    assert not capsys.readouterr().err
    cat = tree / "train" / "cat"
    (cat / "later" / "still").mkdir(parents=True)
    (cat / "0002.png").rename(cat / "later" / "still" / "0000.png")
    (cat / "later" / "back").symlink_to(cat)  # a circle
    (cat / ".ipynb_checkpoints").mkdir()
    shutil.copy(cat / "0000.png", cat / ".ipynb_checkpoints" / "0000.png")
    (cat / "0009.gif").write_bytes(b"")
    (tree / "test" / "dog" / "read.me").write_bytes(b"")
    found = datasets.read("folder", tree, res=32)
    assert np.array_equal(found.train_images, flat.train_images) and np.array_equal(
        found.train_labels, flat.train_labels
    )
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: 2 files in class folders are not used, such as {cat / '0009.gif'};")


def fingerprint(tree):
    """The fingerprint of class folders, as data.json keeps it."""
    return json.loads(json.dumps(datasets.read("folder", tree, res=32).info.fingerprint))


def test_fingerprint_of_class_folders(tmp_path):
    tree = make_tree(tmp_path / "t", ["cat", "dog", "owl"], 6, 2)
    before = fingerprint(tree)
    assert before["train"]["cat"].startswith("6:") and before["test"]["owl"].startswith("2:")
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree, moved, ignore=lambda *_: [class_folders.CACHE], copy_function=shutil.copyfile)
    assert fingerprint(moved) == before  # other place, other times
    (moved / "train/cat/0000.png").unlink()
    with open(moved / "test/dog/0001.png", "ab") as file:
        file.write(b"more")
    (moved / "train/owl/0003.png").rename(moved / "train/owl/new.png")
    said = "class 'cat': 6 train images, now 5; class 'dog': other files in test; class 'owl': other files in train"
    assert changes(before, fingerprint(moved)) == said


def test_fingerprint_of_pixels():
    info = datasets.read("Digits", "").info
    assert {name: value.split(":")[0] for name, value in info.fingerprint["test"].items()}["3"] == "37"
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    other = images.copy()
    other[3, 0, 1, 1] = 1
    first, second = (pixel_fingerprint((x, labels, images, labels), ["a", "b"]) for x in (images, other))
    assert changes(first, second) == "class 'b': other files in train"


@pytest.mark.parametrize(
    "now,words",
    [
        ({"cat": "120:a", "dog": "60:b"}, None),
        ({"cat": "118:c", "dog": "60:b"}, "class 'cat': 120 train images, now 118"),
        ({"cat": "120:c", "dog": "60:b"}, "class 'cat': other files in train"),
        ({"dog": "60:b"}, "class 'cat' is gone"),
        ({"cat": "120:a", "dog": "60:b", "owl": "1:d"}, "class 'owl' is new"),
        ({"dog": "60:b", "cat": "120:a"}, "the classes are in another order"),
        ({"a": "1:a", "b": "1:a", "c": "1:a"},
         "class 'cat' is gone; class 'dog' is gone; class 'a' is new; and 2 more changes"),
    ],
)  # fmt: skip
def test_changes_are_told_in_words(now, words):
    before = {"train": {"cat": "120:a", "dog": "60:b"}, "test": dict.fromkeys(["cat", "dog"], "5:x")}
    assert changes(before, {"train": now, "test": dict.fromkeys(now, "5:x")}) == words


@pytest.mark.parametrize("antialias,expected", [(False, 255), (True, 127)])
def test_resizing_to_a_quarter_with_and_without_antialiasing(antialias, expected, tmp_path):  # SPEC 8.10
    """Without it, column i is the mean of columns 4 i + 1 and 4 i + 2: the white ones."""
    columns = np.tile(np.array([0, 255, 255, 0], dtype=np.uint8), 16)
    Image.fromarray(np.broadcast_to(columns[None, :, None], (64, 64, 3)).copy()).save(tmp_path / "x.png")
    found = decode_image(tmp_path / "x.png", DecodeSpec(3, 16, resize=True, antialias=antialias))
    assert found.shape == (16, 16, 3) and np.abs(found[:, 2:-2].astype(int) - expected).max() < 25

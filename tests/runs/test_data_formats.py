"""Every data set in its true files on disk, from experts to report, and what is said of damaged ones."""

import re
import shutil

import numpy as np
import pytest
import torch

from tests.conftest import call, files_of, make_tree
from tests.support import formats
from utils.data import datasets, imagenet
from utils.data.info import SIZED
from utils.run.errors import UserError

CPU = torch.device("cpu")
CIFAR100 = [f"class{n:02d}" for n in range(100)]


@pytest.fixture(autouse=True)
def md5(monkeypatch):
    formats.accept_written(monkeypatch)


def imagenet_tree(root):
    return make_tree(root, sorted(imagenet.SUBSETS["imagewoof"] + imagenet.IDC_CLASSES[:10]), 12, 2, 40, "val")


def own_subset(root):
    tree = make_tree(root, ["n01", "n02", "n03", "n04"], 6, 2, 32, "val")
    (root / "mine.txt").write_text("n04\nn02\nn03\n")
    return tree


# name: (writes the files into a folder and returns the folder for --data_path, MTT's options, IDC's options)
SETS = {
    "CIFAR10": (lambda r: formats.write_cifar(r).parent, [], ["-d", "cifar10"]),
    "CIFAR100": (lambda r: formats.write_cifar(r, "CIFAR100", 200).parent, [], ["-d", "cifar100"]),
    "CIFAR100 in class folders": (lambda r: make_tree(r, CIFAR100, 2, 1), [], []),
    "SVHN": (formats.write_mat, [], ["-d", "svhn"]),
    "MNIST": (lambda r: formats.write_idx(r).parents[1], [], ["-d", "mnist"]),
    "FashionMNIST": (lambda r: formats.write_idx(r, "FashionMNIST").parents[1], [], ["-d", "fashion"]),
    "Tiny": (formats.write_tiny, [], ["-d", "tiny-imagenet", "-n", "convnet"]),
    "ImageNet": (imagenet_tree, ["--subset", "imagewoof", "--res", 32], ["-d", "imagenet", "--size", 32]),
    "ImageNet listed": (own_subset, ["--subset", "mine.txt", "--res", 32], []),
    "folder": (lambda r: formats.write_mixed(r, ["cat", "dog", "owl"]), ["--res", 32], ["-d", "folder", "--size", 32]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a data set once; returns the folder for --data_path."""
    made = {}

    def write(name):
        if name not in made:
            made[name] = SETS[name][0](tmp_path_factory.mktemp("set") / "data")
        return made[name]

    return write


def done(script, *arguments, capsys, monkeypatch):
    status, message = call(script, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, message


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n == "Tiny" else []) for n in SETS])
def test_trajectory_matching_from_experts_to_report(name, written, tmp_path, capsys, monkeypatch):
    data, kind = written(name), name.split()[0]
    monkeypatch.chdir(data)
    model = "ConvNetW32"
    both = ["--dataset", kind, "--data_path", data, *SETS[name][1], "--model", model, "--batch_train", 32]
    both += ["--buffer_path", tmp_path / "buffers"]
    stages = ["--ipc", 1, "--num_intervals", 2, "--max_start_epoch", 1, "--expert_epochs", 1, "--syn_steps", 2]
    stages += ["--lr_img", 1, "--lr_lr", 1e-07, "--batch_syn", 10]
    run = {"capsys": capsys, "monkeypatch": monkeypatch}
    done("buffer_mtt.py", *both, "--num_experts", 1, "--train_epochs", 2, **run)
    short = ["--Iteration", 1, "--num_eval", 1, "--override_epoch_eval_train", 1]
    done("distill_mtt.py", *both, *stages, *short, "--root_log_dir", tmp_path / "logs", **run)
    networks = ["--num_experts", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--full_epochs", 1]
    done("evaluate_mtt.py", *both, *stages, *networks, "--save_path", tmp_path / "logs", **run)
    (report,) = (tmp_path / "logs").rglob("report.json")
    place = datasets.dataset_subdir(kind, data, "mine.txt" if "listed" in name else "imagewoof", 32)
    assert report.relative_to(tmp_path / "logs").as_posix().startswith(f"{place}/{kind}_{model}_S_ipc1")
    found = torch.load(report.parent / "interval2_epoch2-2" / "images_best.pt", weights_only=True)
    real = datasets.load(kind, data, CPU, subset="mine.txt" if "listed" in name else "imagewoof",
                         res=32 if kind in SIZED else None)  # fmt: skip
    assert found.shape == (2 * real.info.num_classes, real.info.channel, real.info.im_size, real.info.im_size)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "Tiny" else []) for n in SETS if SETS[n][2]]
)
def test_gradient_matching_from_images_to_report(name, written, tmp_path, capsys, monkeypatch):
    data = written(name)
    options = [*SETS[name][2], "--data_dir", data, "--imagenet_dir", data, "--results", tmp_path, "--ipc", 1]
    options += ["--num-intervals", 2, "--niter", 0.01, "--inner_loop", 1, "--n_data", 32, "--batch_real", 4]
    options += ["--width", 0.25, "--epochs", 1, "--depth", 10 if name == "ImageNet" else 3]
    run = {"capsys": capsys, "monkeypatch": monkeypatch}
    done("distill_idc.py", *options, **run)
    done("evaluate_idc.py", *options, "--eval_models", "self", "--full_epochs", 1, **run)
    (report,) = tmp_path.rglob("report.json")
    images, labels = torch.load(report.parent / "interval_1_data.pt", weights_only=True)
    assert len(images) == len(labels) == 2 * len(labels.unique())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def remove(path):
    path.unlink()


DAMAGES = [
    ("CIFAR10", "cifar-10-batches-py/data_batch_3", cut, "data_batch_3: expected the file with MD5 .* found a damaged"),
    ("CIFAR10", "cifar-10-batches-py/data_batch_3", remove, "data_batch_3: expected a file of CIFAR10, found none"),
    ("CIFAR100", "cifar-100-python/train", cut, "train: expected the file with MD5 .* found a damaged or foreign"),
    ("CIFAR100", "cifar-100-python/meta", cut, "meta: expected the file with MD5"),
    ("CIFAR100", "cifar-100-python/meta", remove, "meta: expected a file of CIFAR100, found none"),
    ("SVHN", "train_32x32.mat", cut, "train_32x32.mat: expected the file with MD5"),
    ("SVHN", "test_32x32.mat", remove, "test_32x32.mat: expected a file of SVHN, found none"),
    ("SVHN", "test_32x32.mat", lambda p: p.write_bytes(b""), "test_32x32.mat: expected the file with MD5"),
    ("MNIST", "MNIST/raw/train-images-idx3-ubyte", cut, "raw: expected train files of MNIST, found damaged"),
    ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte", remove, "t10k-labels-idx1-ubyte: expected a file of MNIST"),
    ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte", lambda p: shutil.copy(p.with_name("train-labels-idx1-ubyte"), p),
     r"raw: expected test files of MNIST, found .*\(20, 1, 28, 28\) of uint8 and 100 labels"),
    ("FashionMNIST", "FashionMNIST/raw/train-labels-idx1-ubyte", cut, "raw: expected train files of FashionMNIST"),
    ("Tiny", "val/val_annotations.txt", lambda p: p.write_text("val_0.JPEG n00000000\n"), "line 1: expected file, tab"),
    ("Tiny", "val/images/val_7.JPEG", remove, "val_7.JPEG: cannot be read"),
    ("Tiny", "train/n00000003/images/n00000003_0001.JPEG", lambda p: p.write_bytes(p.read_bytes()[:200]),
     "n00000003_0001.JPEG: expected an image"),
    ("ImageNet", "val/n02096294/0001.png", lambda p: p.write_bytes(p.read_bytes()[:200]), "0001.png: expected an im"),
    ("ImageNet", "train/n02096294", shutil.rmtree, "expected 10 class folders, found 9 of them and not n02096294"),
    ("folder", "test/owl", shutil.rmtree, "test: expected the classes of train in test, found no owl"),
    ("folder", "train/owl", shutil.rmtree, "test/owl: expected the same classes as in"),
    ("folder", "train/dog/0003.png", lambda p: p.write_bytes(b""), "dog/0003.png: expected an image"),
]  # fmt: skip


@pytest.mark.parametrize("name,path,damage,words", DAMAGES, ids=[f"{d[0]}-{d[3][:40]}" for d in DAMAGES])
def test_damaged_files_are_named(name, path, damage, words, written, tmp_path, capsys, monkeypatch):
    data = shutil.copytree(written(name), tmp_path / "data", ignore=lambda *_: [".pdd_cache"])
    damage(data / path)
    before = files_of(data)
    options = ["--dataset", name, "--data_path", data, *SETS[name][1], "--model", "ConvNet"]
    status, message = call(
        "buffer_mtt.py", *options, "--buffer_path", tmp_path / "b", capsys=capsys, monkeypatch=monkeypatch
    )
    assert status == 2 and message.count("\n") == 1, message
    assert re.search(words, message), message
    assert {k: v for k, v in files_of(data).items() if ".pdd_cache" not in k} == before
    assert not (tmp_path / "b").exists()


def test_authors_files_hold_what_was_written(written):
    images, labels = formats.patterned(100, 3, 32)
    found = datasets.read("SVHN", written("SVHN"))
    assert np.array_equal(found.train_images, images) and np.array_equal(found.train_labels, labels)
    images, labels = formats.patterned(20, 1, 28, 1)
    found = datasets.read("MNIST", written("MNIST"))
    assert np.array_equal(found.test_images, images) and np.array_equal(found.test_labels, labels)
    assert datasets.read("FashionMNIST", written("FashionMNIST")).info.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    "name,inside", [("MNIST", ""), ("MNIST", "raw"), ("MNIST", "MNIST/raw"), ("SVHN", "svhn"), ("SVHN", "SVHN")]
)
def test_authors_files_are_found_in_all_usual_folders(name, inside, written, tmp_path):
    source = written(name) / ("MNIST/raw" if name == "MNIST" else "")
    shutil.copytree(source, tmp_path / "data" / inside)
    assert np.array_equal(
        datasets.read(name, tmp_path / "data").train_images, datasets.read(name, written(name)).train_images
    )


def test_subsets_of_imagenet_follow_their_class_indices():
    indices = {  # as MTT lists them
        "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
        "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
        "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
        "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
        "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
        "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    }
    pairs = {(i, w) for name in indices for i, w in zip(indices[name], imagenet.SUBSETS[name], strict=True)}
    # Class indices number the folders alphabetically, so both must ascend together, each pair once.
    by_index = sorted(pairs)
    assert [w for _, w in by_index] == sorted(w for _, w in pairs) and len({i for i, _ in pairs}) == len(pairs) == 57
    assert len(set(imagenet.subset_classes("imagenet100"))) == 100
    assert imagenet.subset_classes("imagenet10") == imagenet.subset_classes("imagenet100")[:10]
    for none in ("imagenet101", "imagenet1", "imagenet0-seed1"):
        with pytest.raises(UserError, match=f"--subset {none}: expected"):
            imagenet.subset_classes(none)


def test_labels_follow_the_order_of_the_list(written):
    data = written("ImageNet listed")
    found = datasets.read("ImageNet", data, str(data / "mine.txt"), 32)
    alone = datasets.read("folder", data, res=32)
    assert found.info.class_names == ["n04", "n02", "n03"] and alone.info.class_names == ["n01", "n02", "n03", "n04"]
    assert np.array_equal(found.train_images[:6], alone.train_images[18:])
    assert found.train_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


@pytest.mark.parametrize(
    "text,words", [("", "found 0 names"), ("a\na\n", "each once, found 2"), (None, "found neither")]
)
def test_lists_of_classes_that_make_no_sense(text, words, tmp_path):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        imagenet.subset_classes(str(tmp_path / "list.txt"))


def test_own_images_are_resized_cut_and_measured(written, monkeypatch):
    from PIL import Image

    data = written("folder")
    first = datasets.load("folder", data, CPU, res=32)
    pixels = first.train.images.double() / 255
    mean, std = first.info.mean, first.info.std
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(mean, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(pixels.transpose(0, 1).flatten(1).std(1, correction=0), torch.tensor(std).double(), atol=1e-4)
    path = sorted((data / "train" / "cat").iterdir())[0]
    with Image.open(path) as image:
        image = image.convert("RGB")
    width, height = image.size
    short = 32 / min(width, height)
    image = image.resize((int(width * short), int(height * short)), Image.BILINEAR)
    left, top = (round((side - 32) / 2) for side in image.size)
    expected = np.asarray(image.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
    assert np.array_equal(first.train.images[0].numpy(), expected)
    monkeypatch.setattr("utils.data.class_folders._decode", None)  # a second start reads the cache, statistics too
    again = datasets.load("folder", data, CPU, res=32).info
    assert (again.mean, again.std) == (mean, std)


def test_sizes_that_make_no_sense(written):
    with pytest.raises(UserError, match="--res 64: expected none for SVHN"):
        datasets.read("SVHN", written("SVHN"), res=64)
    with pytest.raises(UserError, match="--zca: expected images of at most 12288 values"):
        datasets.load("folder", written("folder"), CPU, whiten=True, res=128)

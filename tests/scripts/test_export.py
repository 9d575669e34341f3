import json
import pickle
import re
import shlex
import shutil
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import evaluate_idc
import networks
from scripts import export
from tests.conftest import call, files_of, make_tree, run_script
from tests.faults.test_damage import cut
from utils import multi_formation, zca
from utils.augment import DSA
from utils.data import datasets
from utils.results import formats, known
from utils.results.load import load_distilled
from utils.run.errors import UserError
from utils.run.streams import stream
from utils.synthetic import load_idc
from utils.training import accuracy

E = "scripts.export"
CPU = torch.device("cpu")
STAGES = ["interval1_epoch1-2", "interval2_epoch3-4", "interval3_epoch5-6"]
TENSORS = ("images", "pixels", "labels", "stage")


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two stages of PDD+IDC on Digits, 2 x 2 small images in a synthetic one."""
    root = tmp_path_factory.mktemp("results")
    run_script("distill_idc.py", *shlex.split("-d digits --ipc 2 -f 2 --num-intervals 2 --niter 0.02 --inner_loop 2 "
               "--epochs 5 --n_data 64 --batch_real 8 --results"), root)  # fmt: skip
    (folder,) = (root / "digits").iterdir()
    return folder


@pytest.fixture
def exported(tmp_path, capsys, monkeypatch):
    """Exports a result; returns the folder."""

    def run(folder, kind, *extra):
        out = tmp_path / f"out_{kind}"
        status, message = call(
            E, folder, "--format", kind, "--out", out, *extra, capsys=capsys, monkeypatch=monkeypatch
        )
        assert status == 0, message
        return out

    return run


def source(name, distilled, packed, whitened):
    return {
        "mtt": distilled,
        "stage": distilled / STAGES[1],
        "idc": packed,
        "zca": whitened,
    }[name]


@pytest.mark.parametrize("name", ["mtt", "stage", "idc", "zca"])
@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_exported_tensors_are_those_of_the_result(kind, name, distilled, packed, whitened, exported):
    folder = source(name, distilled, packed, whitened)
    data, out = load_distilled(folder), exported(folder, kind)
    for path in (out, out / f"distilled.{kind}"):
        again = load_distilled(path)
        for tensor in TENSORS:
            assert getattr(again, tensor).dtype == getattr(data, tensor).dtype
            assert torch.equal(getattr(again, tensor), getattr(data, tensor)), tensor
        assert again.syn_lr == data.syn_lr and again.class_names == data.class_names
        test = torch.rand(3, *data.images.shape[1:])
        assert torch.equal(again.transform(test), data.transform(test))
    assert json.loads((out / "distilled.json").read_text())["shape"] == list(data.images.shape)


def test_other_programs_find_the_documented_tensors(distilled, exported):
    from safetensors.torch import load_file

    rates = [float(loaded(distilled / stage / "syn_lr_best.pt")) for stage in STAGES]
    images = loaded(distilled / STAGES[2] / "images_best.pt")
    with np.load(exported(distilled, "npz") / "distilled.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "about"}
    for tensors in (found, load_file(exported(distilled, "safetensors") / "distilled.safetensors"),
                    loaded(exported(distilled, "pt") / "distilled.pt")):  # fmt: skip
        assert {*TENSORS, "syn_lr"} <= set(tensors)
        assert torch.equal(tensors["images"], images)
        assert tensors["syn_lr"].tolist() == rates and tensors["stage"].tolist() == [1] * 10 + [2] * 10 + [3] * 10
        assert tensors["pixels"].min() >= 0 and tensors["pixels"].max() <= 1
        assert torch.allclose(tensors["pixels"], (images * 0.3760 + 0.3054).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["mtt", "idc", "zca"])
def test_images_are_within_half_a_step(name, distilled, packed, whitened, exported):
    from PIL import Image

    folder = source(name, distilled, packed, whitened)
    data, out = load_distilled(folder), exported(folder, "png")
    again = load_distilled(out)
    assert (again.pixels - data.pixels).abs().max() <= 1 / 255 / 2 + 1e-6
    assert torch.equal(again.labels, data.labels) and torch.equal(again.stage, data.stage)
    assert torch.allclose(again.images, again.transform(again.pixels)) and again.syn_lr == data.syn_lr
    where = out / formats.class_folder(3, data.class_names[3])
    assert len(list(where.glob("stage*_*.png"))) == int((data.labels == 3).sum())
    with Image.open(out / "contact_sheet.png") as sheet:
        columns = int((data.labels == 0).sum())
        assert sheet.size == (columns * (64 + 2) + 2, 10 * (64 + 2) + 2)


def test_earlier_exports_of_images_are_read_and_replaced(distilled, exported):
    out = exported(distilled, "png")
    expected = load_distilled(out)
    (out / "png").mkdir()
    for folder in out.glob("0*_*"):
        folder.rename(out / "png" / folder.name)
    again = load_distilled(out)
    assert torch.equal(again.pixels, expected.pixels) and torch.equal(again.stage, expected.stage)
    assert not (exported(distilled, "png") / "png").exists() and torch.equal(load_distilled(out).pixels, again.pixels)
    (out / "000_0" / "stage1_00000.png").rename(out / "mine.png")
    with pytest.raises(UserError, match="found mine"), formats.replaced(out):
        pass


def test_class_folders_alone_are_no_export(tmp_path):
    (tmp_path / "000_cat").mkdir()
    with pytest.raises(UserError, match="found 000_cat; choose another"), formats.replaced(tmp_path):
        pass
    assert (tmp_path / "000_cat").is_dir()


def test_what_an_export_did_not_write_is_never_replaced(distilled, exported, tmp_path):
    beside = tmp_path / "export"
    beside.mkdir()
    exported(distilled, "png").rename(beside / "png")
    (tmp_path / "figures" / "png").mkdir(parents=True)
    (tmp_path / "distilled.json").touch()
    for place, found in ((beside, "found png"), (tmp_path / "figures", "found png"),
                         (tmp_path / "distilled.json", "expected a folder, found a file")):  # fmt: skip
        with pytest.raises(UserError, match=found), formats.replaced(place):
            pass
    assert (beside / "png" / formats.ABOUT).exists() and (tmp_path / "figures" / "png").is_dir()


def test_an_export_that_cannot_be_exchanged_stays(tmp_path, monkeypatch):
    out, replace = tmp_path / "out", formats.os.replace
    out.mkdir()
    (out / formats.ABOUT).write_text("{}")

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "no room", str(target))
        replace(source, target)

    monkeypatch.setattr(formats.os, "replace", fails)
    with pytest.raises(OSError, match="no room"), formats.replaced(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / formats.ABOUT).exists()


@pytest.mark.parametrize("stage", [0, "1", 9])
def test_a_stage_that_an_export_does_not_have(stage, distilled, exported):
    with pytest.raises(UserError, match="expected the stage 3 that was exported"):
        load_distilled(exported(distilled, "pt"), stage)


def test_folders_of_classes_are_in_the_order_of_the_labels():
    names = [formats.class_folder(label, f"a/b {20 - label}") for label in range(12)]
    assert sorted(names) == names and not any("/" in name for name in names)


def test_networks_see_what_the_evaluation_sees(distilled, packed, monkeypatch):
    real = datasets.load("Digits", "", CPU)
    data = load_distilled(distilled)
    assert torch.equal(data.images, loaded(distilled / STAGES[2] / "images_best.pt"))
    assert torch.equal(data.transform(real.test.images.float() / 255), real.test.batch(slice(None))[0])
    args = types.SimpleNamespace(factor=2, decode_type="single")
    for stage in (1, 2):
        union = load_idc(packed, stage, real.info)
        images, labels = evaluate_idc.decoded(union, args, real).batch(slice(None))
        data = load_distilled(packed, stage=stage)
        assert torch.equal(data.images, images) and torch.equal(data.labels, labels) and data.syn_lr is None
    assert torch.equal(data.transform(real.test.images.float() / 255), real.test.batch(slice(None))[0])


def test_decoded_images_know_their_stage(packed):
    data, first = load_distilled(packed), load_distilled(packed, stage=1)
    assert torch.bincount(data.stage).tolist() == [0, 80, 80] and first.stage.tolist() == [1] * 80
    assert torch.equal(data.images[data.stage == 1], first.images)


@pytest.mark.parametrize("kind,bound", [("single", 128), ("multi", 128), ("bound", 128), ("bound", 7)])
def test_origins_follow_the_decoding(kind, bound):
    values = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 6, 6)
    decoded = multi_formation.decode_class(values, 2, kind, bound)
    assert multi_formation.origins(5, 2, kind, bound).tolist() == decoded[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_union_of_an_earlier_stage(stage, distilled, exported):
    for folder in (distilled, exported(distilled, "npz")):
        data = load_distilled(folder, stage=stage)
        for name in ("images", "labels"):
            assert torch.equal(getattr(data, name), loaded(distilled / STAGES[stage - 1] / f"{name}_best.pt"))
        assert data.syn_lr == float(loaded(distilled / STAGES[stage - 1] / "syn_lr_best.pt"))


def test_the_five_lines_train_a_network(distilled):
    data = load_distilled(distilled)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    torch.manual_seed(0)
    network = networks.get_network("ConvNetW32", 1, data.num_classes, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    dsa = DSA("color_crop_flip_scale_rotate")
    for epoch in range(60):
        for x, y in loader:
            x = dsa.apply(x, dsa.draw(len(x), stream(0, epoch)))
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    real = datasets.load("Digits", "", CPU)
    test = datasets.ImageDataset(data.transform(real.test.images.float() / 255), real.test.labels)
    assert accuracy(network, test) > 60
    copy = pickle.loads(pickle.dumps(data))  # workers of loaders receive it so
    assert torch.equal(copy[7][0], data[7][0]) and len(copy) == 30


def test_a_whitened_set_brings_its_transform(whitened, cifar_tree, monkeypatch):
    real = datasets.load("CIFAR10", cifar_tree, CPU, whiten=True)
    monkeypatch.setattr(datasets, "load", None)  # the data are not needed
    data = load_distilled(whitened)
    pixels = torch.from_numpy(datasets.read("CIFAR10", cifar_tree).test_images).float() / 255
    assert torch.allclose(data.transform(pixels), real.test.images, atol=1e-5)
    assert torch.allclose(data.transform(pixels[0]), real.test.images[0], atol=1e-5)
    best = json.loads((whitened / "stage.json").read_text())["best_iteration"]
    assert torch.equal(data.pixels, loaded(whitened / f"images_zca_{best}.pt").clamp(0, 1))
    assert data.class_names[0] == "airplane"


@pytest.fixture
def published_zca(whitened, tmp_path):
    """The whitened result as the published code leaves one."""
    folder = tmp_path / whitened.name
    folder.mkdir()
    for path in whitened.glob("*.pt"):
        if path.name != zca.FILE:
            shutil.copy(path, folder)
    return folder


def test_published_whitened_sets(published_zca, whitened, cifar_tree, exported, capsys, monkeypatch):
    data, complete = load_distilled(published_zca), load_distilled(whitened)
    assert torch.equal(data.images, complete.images) and torch.equal(data.pixels, complete.pixels)
    assert data.class_names == [str(n) for n in range(10)]
    with pytest.raises(Exception, match="name the folder of CIFAR10 with --data_path"):
        data.transform  # noqa: B018
    again = load_distilled(exported(published_zca, "pt"))
    assert torch.equal(again.pixels, data.pixels)
    helped = load_distilled(published_zca, data_path=cifar_tree)
    test = torch.rand(2, 3, 32, 32)
    assert torch.equal(helped.transform(test), complete.transform(test)) and helped.class_names[1] == "automobile"
    assert torch.allclose(helped.pixels, data.pixels, atol=1e-5)
    for path in published_zca.glob("images_zca_*"):
        path.unlink()
    refused([published_zca], "name the folder of CIFAR10 with --data_path", capsys, monkeypatch)


def refused(arguments, words, capsys, monkeypatch):
    status, message = call(E, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.count("\n") == 1 and re.search(words, message), message


def test_names_of_published_folders_say_how_they_were_made(distilled, packed, tmp_path, capsys, monkeypatch):
    bare = tmp_path / "Digits" / distilled.name
    for stage in STAGES:
        (bare / stage).mkdir(parents=True)
        for path in (distilled / stage).glob("*_best.pt"):
            shutil.copy(path, bare / stage)
    assert torch.equal(load_distilled(bare).images, load_distilled(distilled).images)
    assert torch.equal(load_distilled(bare / STAGES[1]).images, load_distilled(distilled, stage=2).images)
    named = tmp_path / "digits" / packed.name
    named.mkdir(parents=True)
    for path in packed.glob("*_data.pt"):
        shutil.copy(path, named)
    assert torch.equal(load_distilled(named).images, load_distilled(packed).images)
    other = named.rename(tmp_path / "other")
    refused([other], "neither config.json nor the folder's name says --dataset; name it", capsys, monkeypatch)
    with_options = load_distilled(other, dataset="digits", factor=2, decode_type="single")
    assert torch.equal(with_options.images, load_distilled(packed).images)
    for text in ("dataset: digits\nfactor: 2\ndecode_type: single\n",
                 '{\n "dataset": "digits",\n "decode_type": "single",\n "factor": 2\n}'):  # fmt: skip
        (other / "args.txt").write_text(text)
        assert torch.equal(load_distilled(other).images, load_distilled(packed).images)
    refused([other, "--factor", 3], "made with --factor 2, but --factor 3 is given", capsys, monkeypatch)
    refused([bare, "--dataset", "CIFAR10"], "made with --dataset Digits, but", capsys, monkeypatch)


@pytest.mark.parametrize(
    "name,expected",
    [
        ("cifar10/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2",
         ("cifar10", 2, "single")),
        ("cifar100/conv3in_grad_l1_nd500_cut_lr0.005_random_ipc1", ("cifar100", 1, "single")),
        ("imagenet10/resnet10apin_progressive_grad_l1_ely10_nd500_cut_factor3_bound_lr0.003_mix_ipc20",
         ("imagenet", 3, "bound")),
        ("mnist/conv3in_progressive_grad_l1_nd500_factor2_color_crop_lr0.0001_mix_ipc2", ("mnist", 2, "single")),
    ],
)  # fmt: skip
def test_published_names_of_idc(name, expected, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    found = known.parse_idc_name(tmp_path / name)
    assert (found["dataset"], found["factor"], found["decode_type"]) == expected


def write_union(folder, classes, size, ipc=2):
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.rand(classes * ipc, 3, size, size)
    torch.save([images, torch.arange(classes).repeat_interleave(ipc)], folder / "interval_0_data.pt")
    return images


def test_published_images_of_imagenet(tmp_path):
    folder = tmp_path / "imagenet10" / "resnet10apin_grad_l1_nd500_cut_factor3_bound_lr0.003_mix_ipc2"
    images = write_union(folder, 10, 24)
    data = load_distilled(folder)
    assert data.num_classes == 10 and data.images.shape == (10 * 2 * 9, 3, 24, 24)
    assert torch.equal(data.images, data.transform(data.pixels)) and data.pixels.max() <= images.max()
    moved = folder.rename(tmp_path / folder.name)
    with pytest.raises(Exception, match="says --dataset; name it"):
        load_distilled(moved)
    with pytest.raises(Exception, match="ImageNet may be of any classes, mean and std; name its folder"):
        load_distilled(moved, dataset="imagenet")


def test_sets_of_own_images_describe_themselves(tmp_path):
    tree = make_tree(tmp_path / "mine", ["cup", "hat", "spoon"], 4, 2, size=16)
    real = datasets.load("folder", tree, CPU, res=16)
    images = write_union(tmp_path / "x", 3, 16)
    options = {"dataset": "folder", "factor": 1, "decode_type": "single", "nclass": 10}
    (tmp_path / "x" / "config.json").write_text(json.dumps({"options": options}))
    with pytest.raises(Exception, match="name its folder with --data_path"):
        load_distilled(tmp_path / "x")
    assert load_distilled(tmp_path / "x", data_path=tree).class_names == ["cup", "hat", "spoon"]
    known.save_info(tmp_path / "x", real.info)
    shutil.rmtree(tree)
    data = load_distilled(tmp_path / "x")
    assert data.class_names == ["cup", "hat", "spoon"] and torch.equal(data.pixels, images)
    assert torch.equal(data.images, real.pixel_dataset(images, data.labels).batch(slice(None))[0])


@pytest.fixture
def copy(distilled, tmp_path):
    return shutil.copytree(distilled, tmp_path / "copy" / distilled.name)


def swap(folder):
    path = folder / STAGES[0] / "images_best.pt"
    torch.save(loaded(path).flip(0), path)


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda f: shutil.rmtree(f), "expected a folder of results, found none"),
        (lambda f: [shutil.rmtree(f / stage) for stage in STAGES], "expected a result .* found none"),
        (lambda f: shutil.rmtree(f / STAGES[1]), "expected stages 1 to 3, found no stage 2"),
        (lambda f: shutil.copytree(f / STAGES[1], f / "interval2_epoch9-9"), "one folder interval2_epoch…, found 2"),
        (lambda f: (f / STAGES[1] / "labels_best.pt").unlink(), "labels_best.pt: .*found no file"),
        (lambda f: torch.save(torch.zeros(10, 3, 8, 8), f / STAGES[0] / "images_best.pt"), "images_best.pt: .* 1x8x8"),
        (lambda f: (f / "data.json").write_text("{}"), "data.json: expected the description of a data set"),
        (lambda f: (f / "config.json").write_text("["), "config.json: expected the options"),
        (swap, "interval1_epoch1-2: expected the images that stage 3 keeps"),
    ],
)
def test_damaged_results_are_refused(damage, words, copy, tmp_path, capsys, monkeypatch):
    damage(copy)
    before = files_of(tmp_path)
    refused([copy], words, capsys, monkeypatch)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors", "png"])
@pytest.mark.parametrize("damage", [cut, lambda p: p.write_text("hello"), lambda p: p.write_bytes(b"")])
def test_damaged_exports_are_named(damage, kind, distilled, exported):
    out = exported(distilled, kind)
    path = out / f"distilled.{kind}" if kind != "png" else next(out.glob("000_*/stage2_*.png"))
    damage(path)
    with pytest.raises(Exception, match=rf"^{re.escape(str(path))}: expected"):
        load_distilled(out)


def test_incomplete_exports_are_refused(distilled, exported):
    out = exported(distilled, "png")
    next(out.glob("*/stage1_00004.png")).unlink()
    with pytest.raises(Exception, match="found none of number 4"):
        load_distilled(out)
    out = exported(distilled, "pt")
    torch.save(loaded(out / "distilled.pt") | {"labels": torch.zeros(3)}, out / "distilled.pt")
    with pytest.raises(Exception, match=r"found shape \(3,\) for 'labels'"):
        load_distilled(out)


def test_an_export_takes_the_place_of_an_earlier_one_only(distilled, exported, capsys, monkeypatch):
    out = exported(distilled, "pt")
    before = files_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(export.formats, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
        refused([distilled, "--format", "npz", "--out", out], "No space left", capsys, patch)
    assert files_of(out) == before and sorted(p.name for p in out.parent.iterdir()) == [out.name]
    assert call(E, distilled, "--format", "npz", "--out", out, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    assert sorted(files_of(out)) == ["distilled.json", "distilled.npz"]
    (out / "notes.txt").write_text("mine")
    refused([distilled, "--out", out], "found notes.txt; choose another", capsys, monkeypatch)
    assert (out / "notes.txt").read_text() == "mine"


def test_stages_that_are_still_learned_are_left_out(copy, capfd):
    for name in STAGES[:0:-1]:
        (copy / name / "stage.json").unlink()
        assert len(load_distilled(copy)) == 10 * STAGES.index(name)
        assert f"stage {STAGES.index(name) + 1} is not finished; without it" in capfd.readouterr().err
    (copy / STAGES[0] / "stage.json").unlink()
    with pytest.raises(UserError, match="expected a finished stage, found none"):
        load_distilled(copy)


def test_one_stage_that_is_still_learned_is_refused(copy, tmp_path):
    folder = shutil.copytree(copy / STAGES[0], tmp_path / "one" / copy.name)
    shutil.copy(copy / "config.json", folder), shutil.copy(copy / "data.json", folder)
    assert len(load_distilled(folder)) == 10
    (folder / "stage.json").unlink()
    with pytest.raises(UserError, match="expected a finished stage, found none"):
        load_distilled(folder)


def test_an_export_of_an_export_is_refused(distilled, exported, capsys, monkeypatch):
    refused([exported(distilled, "npz")], "distilled.npz: expected a result, found an export", capsys, monkeypatch)


def test_export_as_a_user_runs_it(copy):
    done = run_script("scripts/export.py", copy, "--format", "png")
    first, second = done.stdout.splitlines()
    assert first == f"{copy / 'export' / 'png'}: 30 images of 10 classes, stages 1 to 3"
    exact = loaded(copy / STAGES[2] / "images_best.pt") * 0.3760 + 0.3054
    moved = (load_distilled(copy / "export" / "png").pixels - exact).abs()
    assert second.startswith("PNG rounds to 8 bits and clips to [0, 1]: values moved by ")
    numbers = [float(word) for word in re.findall(r"\d\.\d{4}", second)]
    assert numbers == pytest.approx([float(moved.mean()), float(moved.max())], abs=1e-4) and numbers[0] > 0
    assert len(moved) == 30 and len(load_distilled(copy)) == 30
    done = run_script("scripts/export.py", copy / "nothing", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_asking_for_a_stage_that_is_not_there(distilled, packed, exported):
    for folder in (distilled, packed, exported(distilled, "pt")):
        with pytest.raises(Exception, match="asked for 9"):
            load_distilled(folder, stage=9)

import json
import re
import shlex

import numpy as np
import pytest
import torch

import distill_idc
from tests.conftest import call, files_of, make_tree, run_script
from utils import datasets, idc
from utils.idc_options import evaluation_epochs

D, E = "distill_idc.py", "evaluate_idc.py"
SHORT = shlex.split(
    "-d digits --ipc 2 --num-intervals 3 --niter 0.04 --inner_loop 2 --epochs 5 --net_epoch 1 --n_data 64"
)
NAME = "conv2in_w0.25_grad_mse_nd64_inloop2_cut_niter0.04_lr0.05_random_ipc2"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    run_script(D, *SHORT, "--results", root, "--batch_real", "8")
    (folder,) = (root / "digits").iterdir()
    return folder


def parsed(words, monkeypatch, script=distill_idc):
    monkeypatch.setattr("sys.argv", ["script", *shlex.split(words)])
    return script.parse()


ROWS = [
    ("-d cifar10 --ipc 2 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar10/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"),
    ("-d cifar10 --ipc 10 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar10/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc10"),
    ("-d cifar100 --ipc 2 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar100/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"),
    ("-d cifar100 --ipc 10 -f 2 --niter 1000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar100/conv3in_progressive_grad_mse_nd2000_cut_niter1000_factor2_lr0.005_mix_ipc10"),
    ("-d svhn --ipc 2 -f 2 --reproduce --tag progressive",
     "svhn/conv3in_progressive_grad_mse_nd500_cut_factor2_lr0.005_mix_ipc2"),
    ("-d mnist --ipc 2 -f 2 --reproduce --tag progressive",
     "mnist/conv3in_progressive_grad_l1_nd500_factor2_color_crop_lr0.0001_mix_ipc2"),
    ("-d imagenet --nclass 10 -f 3 --ipc 20 --reproduce --tag progressive",
     "imagenet10/resnet10apin_progressive_grad_l1_ely10_nd500_cut_factor3_bound_lr0.003_mix_ipc20"),
]  # fmt: skip


@pytest.mark.parametrize("words,folder", ROWS)
def test_published_commands_name_the_published_folders(words, folder, monkeypatch):
    assert str(idc.save_folder(parsed(words, monkeypatch))) == f"results/{folder}"


@pytest.mark.slow
@pytest.mark.parametrize("words,folder", ROWS[:4])
def test_published_commands_run_and_evaluate(words, folder, tmp_path):
    """Shortened by options that the folder's name shows; takes minutes: python -m pytest -m slow."""
    dataset = "cifar100" if "cifar100" in words else "cifar10"
    classes = 100 if dataset == "cifar100" else 10
    tree = make_tree(tmp_path / "data", [f"class{n:03d}" for n in range(classes)], 48, 1)
    short = ["--niter", "0.01", "--inner_loop", "1", "--epochs", "5", "--num-intervals", "2"]
    both = [*shlex.split(words), "--data_dir", tree, "--results", tmp_path / "results", *short]
    run_script(D, *both)
    name = re.sub(r"niter\d+", "niter0.01", folder.replace("nd2000", "nd2000_inloop1"))
    images = [torch.load(tmp_path / "results" / name / f"interval_{s}_data.pt", weights_only=True)[0] for s in (0, 1)]
    assert len(images[1]) == 2 * len(images[0])
    both = [word for word in both if word not in ("--start-interval", "0")]
    done = run_script(E, *both, "--eval_models", "self", "--epochs", 1, "--skip_full", "--skip_random")
    assert "stage 1-2" in done.stdout


BASE = "conv3in_grad_l1_nd500_cut_lr0.005_random_ipc1"


@pytest.mark.parametrize(
    "words,name",
    [
        ("", BASE),
        ("--tag x", BASE.replace("in_", "in_x_")),
        ("--match feat", BASE.replace("grad", "feat")),
        ("--bias True", BASE.replace("grad", "grad_b")),
        ("--fc True", BASE.replace("grad", "grad_fc")),
        ("--bias True --fc True", BASE.replace("grad", "grad_b_fc")),
        ("--metric cos", BASE.replace("l1", "cos")),
        ("--pt_from 5", BASE.replace("_nd", "_pt5_nd")),
        ("--pt_from 5 --pt_num 3", BASE.replace("_nd", "_pt5_3_nd")),
        ("--fix_iter 4", BASE.replace("_nd", "_fix4_nd")),
        ("--early 7", BASE.replace("_nd", "_ely7_nd")),
        ("--n_data 100", BASE.replace("nd500", "nd100")),
        ("--inner_loop 20", BASE.replace("nd500", "nd500_inloop20")),
        ("--mixup_net vanilla", BASE.replace("_cut", "")),
        ("--lr 0.1", BASE.replace("_cut", "_cut_nlr0.1")),
        ("--wd 1e-4", BASE.replace("_cut", "_cut_wd0.0001")),
        ("--niter 10", BASE.replace("_cut", "_cut_niter10")),
        ("--factor 3", BASE.replace("_cut", "_cut_factor3").replace("random", "mix")),
        ("-f 2 --decode_type multi", BASE.replace("_cut", "_cut_factor2_multi").replace("random", "mix")),
        ("-f 2 --init noise", BASE.replace("_cut", "_cut_factor2").replace("random", "noise")),
        ("-a color_crop", BASE.replace("_cut", "_cut_color_crop")),
        ("--lr_img 0.1", BASE.replace("lr0.005", "lr0.1")),
        ("--momentum 0.5", BASE.replace("lr0.005", "lr0.005_mom0.5")),
        ("--batch_real 128", BASE.replace("lr0.005", "lr0.005_b_real128")),
        ("--batch_syn_max 64", BASE.replace("lr0.005", "lr0.005_synmax64")),
        ("--init noise", BASE.replace("random", "noise")),
        ("-n resnet --depth 18 --norm_type batch", BASE.replace("conv3in", "resnet18bn")),
    ],
)
def test_every_tag_of_the_grammar(words, name, monkeypatch):
    assert idc.save_folder(parsed(f"-d cifar10 --ipc 1 {words}", monkeypatch)).name == name


def test_derived_settings_and_what_is_given_wins(monkeypatch):
    o = parsed("-d cifar10 --ipc 2 -f 2 --reproduce", monkeypatch)
    assert (o.init, o.mix_p, o.dsa, o.depth, o.metric, o.n_data, o.epochs) == ("mix", 0.5, True, 3, "mse", 2000, 1000)
    assert o.dsa_strategy == "color_crop_flip_scale_rotate" and o.lr_img_scaled == pytest.approx(0.001)
    o = parsed("-d cifar10 --ipc 2 -f 2 --reproduce --init random --metric l1 --mix_p 1 --dsa False --n_data 9 "
               "--dsa_strategy color_cutout --depth 4 --epochs 7", monkeypatch)  # fmt: skip
    assert (o.init, o.mix_p, o.dsa, o.depth, o.metric, o.n_data, o.epochs) == ("random", 1.0, False, 4, "l1", 9, 7)
    assert o.dsa_strategy == "color_cutout"
    o = parsed("-d svhn --ipc 1 --reproduce", monkeypatch)
    assert (o.mixup, o.mixup_net) == ("vanilla", "cut") and o.dsa_strategy == "color_crop_cutout_scale_rotate"
    o = parsed("-d mnist --ipc 10 --reproduce -f 2", monkeypatch)
    assert (o.aug_type, o.mixup, o.lr_img_scaled) == ("color_crop", "vanilla", 1e-4)
    o = parsed("-d imagenet --nclass 100 --ipc 10 --size 112", monkeypatch)
    assert (o.net_type, o.lr, o.weight_decay, o.batch_size, o.batch_real) == ("resnet_ap", 0.1, 1e-4, 128, 128)
    assert o.lr_img_scaled == pytest.approx(0.005 * 0.25) and o.dsa is False and o.epochs == 1300
    assert parsed("-d fashion --ipc 10", monkeypatch).lr_img_scaled == pytest.approx(0.005 * (28 / 32) ** 2)


def test_epochs_of_imagenet():
    found = [evaluation_epochs("imagenet", n, False) for n in (1, 10, 50, 200, 500, 501)]
    assert found == [3000, 2000, 1500, 1000, 500, 300]
    assert [evaluation_epochs("imagenet", n, True) for n in (1, 10, 50, 200, 500, 501)] == [
        2000, 1300, 1000, 600, 300, 200,
    ]  # fmt: skip
    assert evaluation_epochs("cifar10", 1, False) == 1000


def test_files_have_the_documented_names_and_forms(distilled):
    assert distilled.name == NAME.replace("lr0.05", "lr0.05_b_real8")
    names = {path.name for path in distilled.iterdir()}
    for stage in range(3):
        wanted = {"data.pt", "init.png", "img2.png", "metrics.jsonl"}
        assert {f"interval_{stage}_{name}" for name in wanted} | {f"interval_{stage}.json"} <= names
        images, labels = torch.load(distilled / f"interval_{stage}_data.pt", weights_only=True)
        assert images.shape == (20 * (stage + 1), 1, 8, 8) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert labels.dtype == torch.int64 and labels.tolist() == sorted(list(range(10)) * 2 * (stage + 1))
    assert {"args.txt", "log.txt", "config.json"} <= names
    assert "ipc: 2\n" in (distilled / "args.txt").read_text()
    assert "accuracy_mean" in (distilled / "log.txt").read_text()


def test_slots_stand_side_by_side_and_frozen_bits_stay(distilled):
    unions = [torch.load(distilled / f"interval_{s}_data.pt", weights_only=True)[0] for s in range(3)]
    slots = [union.view(10, 2, s + 1, 1, 8, 8) for s, union in enumerate(unions)]
    for stage in (1, 2):
        assert torch.equal(slots[stage][:, :, :stage], slots[stage - 1])
    assert not torch.equal(slots[2][:, :, 2], slots[2][:, :, 1])


def test_images_have_moved_and_the_last_iteration_is_saved(distilled):
    real = datasets.load("Digits", "", torch.device("cpu"))
    digits = {tuple(x.flatten().tolist()) for x in real.train.images.float() / 255}
    images = torch.load(distilled / "interval_0_data.pt", weights_only=True)[0]
    assert not any(tuple(x.flatten().tolist()) in digits for x in images)
    rows = [json.loads(line) for line in (distilled / "interval_0_metrics.jsonl").read_text().splitlines()]
    assert [(r["iteration"], "loss" in r) for r in rows] == [(2, True), (2, False)]


def test_two_runs_are_bit_identical_and_a_finished_one_does_nothing(distilled, tmp_path):
    arguments = [*SHORT, "--batch_real", "8", "--results"]
    run_script(D, *arguments, tmp_path)
    found, expected = files_of(tmp_path / "digits" / distilled.name), files_of(distilled)
    for key in ("config.json", "args.txt"):
        found.pop(key), expected.pop(key)
    assert found.keys() >= {k for k in expected if k.startswith("interval")}
    assert [k for k in found if k in expected and found[k] != expected[k]] == []
    before = files_of(distilled)
    assert "done already" in run_script(D, *arguments, distilled.parent.parent).stderr
    after = files_of(distilled)
    assert {k: v for k, v in after.items() if k != "args.txt"} == {k: v for k, v in before.items() if k != "args.txt"}


def test_start_interval_goes_on_from_what_is_on_disk(distilled, tmp_path):
    folder = tmp_path / "digits" / distilled.name
    folder.mkdir(parents=True)
    (folder / "interval_1_data.pt").write_bytes((distilled / "interval_1_data.pt").read_bytes())
    run_script(D, *SHORT, "--batch_real", "8", "--results", tmp_path, "--start-interval", "2")
    assert (folder / "interval_2_data.pt").read_bytes() == (distilled / "interval_2_data.pt").read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        "--match feat --metric l2",
        "--metric l1 --factor 3",
        "--factor 2 --decode_type multi --batch_syn_max 4 --init noise",
        "--factor 2 --decode_type bound --early 1 --fix_iter 2",
        "--transition_pool 1 --transition_batch 2 --mixup vanilla --mixup_net vanilla",
        "--norm_type batch --metric cos",
        "--norm_type sn --metric l1_mean --bias True --fc True --test --time --save_ckpt True",
        "-n resnet --depth 10 --width 0.0625 --repeat 2",
    ],
)
def test_variants_run_and_evaluate(extra, tmp_path, capsys, monkeypatch):
    words = [*SHORT, "--num-intervals", 2, "--batch_real", 4, "--epochs", 2, *extra.split(), "--results", tmp_path]
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    assert call(D, *words, **options)[0] == 0
    more = ["--skip_full", "--skip_random"]
    words = [w for w in words if w not in ("--transition_pool", "--transition_batch")]
    if "--transition_pool" in extra:
        words = [*SHORT, "--num-intervals", 2, "--batch_real", 4, "--mixup", "vanilla", "--mixup_net", "vanilla",
                 "--results", tmp_path]  # fmt: skip
    assert call(E, *words, *more, **options)[0] == 0
    (path,) = tmp_path.rglob("report.json")
    assert len(json.loads(path.read_text())["stages"]) == 2


def test_pretrained_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "--num-intervals", 1, "--batch_real", 4, "--pt_from", 1, "--pt_num", 2]
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    status, message = call(D, *words, **options)
    assert status == 2 and "expected a pretrained network, found none" in message
    assert call(D, *words, "--pretrain", **options)[0] == 0
    assert len(list(tmp_path.glob("pretrained/digits/conv2in_w0.25/network_*_epoch1.pt"))) == 2
    assert call(D, *words, **options)[0] == 0


def test_evaluation_reports_every_mode(distilled, capsys, monkeypatch):
    base = [*SHORT, "--batch_real", 8, "--results", distilled.parent.parent, "--epochs", 2, "--full_epochs", 1]
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    words = ["--eval_models", "self,resnet10,densenet", "--epochs", 1, "--skip_random", "--skip_full"]
    assert call(E, *base, *words, **options)[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert list(found["models"]) == ["conv2in_w0.25", "resnet10", "densenet"]
    assert call(E, *base, "--repeat", 2, **options)[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert list(found["models"]) == ["conv2in_w0.25"]
    assert [s["ipc_total"] for s in found["stages"]] == [2, 4, 6] and found["random"] and found["full"]
    for extra, totals in ((["--new_only"], [2, 2, 2]), (["--last_only"], [6]), (["--same_compute", "True"], [2, 4, 6]),
                          (["--slct_type", "random"], [2, 4, 6])):  # fmt: skip
        assert call(E, *base, *extra, "--skip_full", "--skip_random", **options)[0] == 0
        found = json.loads((distilled / "report.json").read_text())
        assert [s["ipc_total"] for s in found["stages"]] == totals and found["random"] is None


def write_published(folder, new_format):
    """Write two unions as the published code saves them; returns the words that evaluate them."""
    folder.mkdir()
    for stage in range(2):
        count = 2 * (stage + 1)
        value = [torch.rand(10 * count, 3, 32, 32), torch.arange(10).repeat_interleave(count)]
        torch.save(value, folder / f"interval_{stage}_data.pt", _use_new_zipfile_serialization=new_format)
    return ["--reproduce", "-d", "cifar10", "-f", 2, "--ipc", 2, "--override-load-dir", folder, "--num-intervals", 2,
            "--epochs", 1, "--eval_models", "self", "--skip_full"]  # fmt: skip


@pytest.mark.parametrize("new_format", [True, False])
def test_published_files_are_read_as_they_are(new_format, tmp_path, cifar_tree, capsys, monkeypatch):
    folder = tmp_path / "published"
    words = write_published(folder, new_format)
    assert call(E, *words, "--data_dir", cifar_tree, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    assert json.loads((folder / "report.json").read_text())["stages"][1]["ipc_total"] == 4


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "index,tensor,words",
    [
        (0, torch.zeros(40, 3, 28, 28), "expected pictures 3x32x32 for CIFAR10, found 3x28x28"),
        (0, torch.zeros(40, 1, 32, 32), "found 1x32x32"),
        (0, torch.zeros(39, 3, 32, 32), r"expected \[images"),
        (1, torch.zeros(40, 1).long(), r"expected \[images"),
    ],
)
def test_published_files_of_another_shape_are_named(
    index, tensor, words, new_format, tmp_path, cifar_tree, capsys, monkeypatch
):
    arguments = write_published(tmp_path / "published", new_format)
    path = tmp_path / "published" / "interval_1_data.pt"
    value = torch.load(path, weights_only=True)
    value[index] = tensor
    torch.save(value, path, _use_new_zipfile_serialization=new_format)
    status, message = call(E, *arguments, "--data_dir", cifar_tree, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.startswith(f"error: {path}: ") and re.search(words, message), message


@pytest.mark.parametrize(
    "words,message",
    [
        ("-d digits", "--ipc: expected the number of images"),
        ("-d digits --ipc 0", "expected a whole number >= 1"),
        ("-d digits --ipc 3 -f 9", "larger than the pictures of 8 pixels"),
        ("-d digits --ipc 5000", "pictures of class '0' asked for"),
        ("-d digits --ipc 1 --num-intervals 2 --start-interval 2", "expected less than --num-intervals 2"),
        ("-d digits --ipc 1 --start-interval 1", "found no file"),
        ("-d digits --ipc 1 --pt_from 3", "expected a pretrained network"),
        ("-d digits --ipc 1 --metric l3", "invalid choice"),
        ("-d imagenet --ipc 1 --nclass 30", "expected 10 or 100"),
        ("-d cifar10 --ipc 1 --data_dir /nowhere/x", "CIFAR10 is not in"),
        ("-d digits --ipc 1 -n resnet --depth 11", "depth 11"),
    ],
)
def test_mistakes_on_the_command_line(words, message, tmp_path, capsys, monkeypatch):
    status, found = call(D, *words.split(), "--results", tmp_path, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message in found and found.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_infinite_losses_stop_the_run_and_keep_the_last_good_files(distilled, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    for path in distilled.glob("interval_0*"):
        (folder / path.name).write_bytes(path.read_bytes())
    before = files_of(folder)
    words = [*SHORT, "--batch_real", 8, "--lr_img", "1e38", "--override-save-dir", folder, "--start-interval", 1]
    status, message = call(D, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and re.search(r"stage 1, outer iteration \d.* lower --lr_img", message.splitlines()[-1])
    assert {k: files_of(folder)[k] for k in before} == before
    assert not (folder / "interval_1_data.pt").exists()


def test_a_folder_of_another_run_is_refused(distilled, capsys, monkeypatch):
    words = [*SHORT, "--batch_real", 8, "--results", distilled.parent.parent, "--seed", 3, "--n_data", 64]
    status, message = call(D, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and "seed 0 there, 3 now" in message


def test_pools_and_batches_of_transition_networks(tmp_path):
    base = [*SHORT, "--num-intervals", "2", "--batch_real", "8"]
    for name, extra in (("one", []), ("two", ["--transition_batch", "2"]), ("pool", ["--transition_pool", "1"])):
        run_script(D, *base, *extra, "--override-save-dir", tmp_path / name)
    one, two, pool = ((tmp_path / n / "interval_1_data.pt").read_bytes() for n in ("one", "two", "pool"))
    assert one == two and one != pool


def test_class_blocks_hold_the_union_in_slot_order(monkeypatch, tmp_path):
    options = parsed("-d digits --ipc 2", monkeypatch)
    real = datasets.load("Digits", "", torch.device("cpu"))
    earlier = torch.from_numpy(np.random.default_rng(0).random((10, 2, 3, 1, 8, 8), dtype=np.float32))
    learner = distill_idc.Learner(
        distill_idc.Run(options, real, tmp_path), 3, earlier, torch.zeros(10, 2, 1, 8, 8), None
    )
    block, learned = learner.block(4, learner.learned[4])
    assert block.shape == (8, 1, 8, 8) and learned.requires_grad
    assert torch.equal(block[:3], earlier[4, 0]) and torch.equal(block[4:7], earlier[4, 1])
    assert torch.equal(block[3], learned[0]) and torch.equal(block[7], learned[1])

import shlex

import pytest

import distill_idc
from tests.support.published import IDC_COMMANDS
from utils.options.idc import evaluation_epochs, result_folder


@pytest.fixture
def parse(monkeypatch):
    """Parses the command line of distill_idc.py."""

    def parse(words):
        monkeypatch.setattr("sys.argv", ["distill_idc.py", *shlex.split(words)])
        return distill_idc.parse()

    return parse


@pytest.mark.parametrize("words,folder", IDC_COMMANDS)
def test_published_commands_name_the_published_folders(words, folder, parse):
    assert str(result_folder(parse(words))) == f"results/{folder}"


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
def test_every_tag_of_the_grammar(words, name, parse):
    assert result_folder(parse(f"-d cifar10 --ipc 1 {words}")).name == name


def test_derived_settings_and_what_is_given_wins(parse):
    args = parse("-d cifar10 --ipc 2 -f 2 --reproduce")
    assert (args.init, args.mix_p, args.dsa, args.depth, args.metric, args.n_data, args.epochs) == (
        "mix",
        0.5,
        True,
        3,
        "mse",
        2000,
        1000,
    )
    assert args.dsa_strategy == "color_crop_flip_scale_rotate" and args.lr_img_scaled == pytest.approx(0.001)
    args = parse("-d cifar10 --ipc 2 -f 2 --reproduce --init random --metric l1 --mix_p 1 --dsa False --n_data 9 "
               "--dsa_strategy color_cutout --depth 4 --epochs 7")  # fmt: skip
    assert (args.init, args.mix_p, args.dsa, args.depth, args.metric, args.n_data, args.epochs) == (
        "random",
        1.0,
        False,
        4,
        "l1",
        9,
        7,
    )
    assert args.dsa_strategy == "color_cutout"
    args = parse("-d svhn --ipc 1 --reproduce")
    assert (args.mixup, args.mixup_net) == ("vanilla", "cut") and args.dsa_strategy == "color_crop_cutout_scale_rotate"
    args = parse("-d mnist --ipc 10 --reproduce -f 2")
    assert (args.aug_type, args.mixup, args.lr_img_scaled) == ("color_crop", "vanilla", 1e-4)
    args = parse("-d imagenet --nclass 100 --ipc 10 --size 112")
    assert (args.net_type, args.lr, args.weight_decay, args.batch_size, args.batch_real) == (
        "resnet_ap",
        0.1,
        1e-4,
        128,
        128,
    )
    assert args.lr_img_scaled == pytest.approx(0.005 * 0.25) and args.dsa is False and args.epochs == 1300
    assert parse("-d fashion --ipc 10").lr_img_scaled == pytest.approx(0.005 * (28 / 32) ** 2)


def test_epochs_of_imagenet():
    found = [evaluation_epochs("imagenet", n, False) for n in (1, 10, 50, 200, 500, 501)]
    assert found == [3000, 2000, 1500, 1000, 500, 300]
    assert [evaluation_epochs("imagenet", n, True) for n in (1, 10, 50, 200, 500, 501)] == [
        2000, 1300, 1000, 600, 300, 200,
    ]  # fmt: skip
    assert evaluation_epochs("cifar10", 1, False) == 1000

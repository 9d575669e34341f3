import shlex

import numpy as np
import pytest

import distill_idc
from tests.conftest import PROJECT
from tests.support.published import IDC_COMMANDS
from utils.data.imagenet import subset_classes
from utils.options.idc import evaluation_epochs, result_folder, subset, train_config
from utils.run.errors import UserError


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


BASE = "conv3in_grad_l1_nd500_cut_factor1_lr0.005_random_ipc1"  # _factor1: SPEC 8.14


@pytest.mark.parametrize(
    "words,name",
    [
        ("", BASE),
        ("--tag x", BASE.replace("in_", "in_x_")),
        ("--match feat", BASE.replace("grad_l1", "f4_mse")),  # SPEC 8.13
        ("--match feat --metric cos --f_idx 1,2", BASE.replace("grad_l1", "f1,2_mse")),
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
        ("--factor 3", BASE.replace("factor1", "factor3").replace("random", "mix")),
        ("-f 2 --decode_type multi", BASE.replace("factor1", "factor2_multi").replace("random", "mix")),
        ("-f 2 --init noise", BASE.replace("factor1", "factor2").replace("random", "noise")),
        ("--decode_type multi", BASE.replace("factor1", "factor1_multi")),
        ("-a color_crop", BASE.replace("factor1", "factor1_color_crop")),
        ("--lr_img 0.1", BASE.replace("lr0.005", "lr0.1")),
        ("--momentum 0.5", BASE.replace("lr0.005", "lr0.005_mom0.5")),
        ("--batch_real 128", BASE.replace("lr0.005", "lr0.005_b_real128")),
        ("--batch_syn_max 64", BASE.replace("lr0.005", "lr0.005_synmax64")),
        ("--init noise", BASE.replace("random", "noise")),
        ("-n resnet --depth 18 --norm_type batch", BASE.replace("conv3in", "resnet18")),  # SPEC 8.14
        ("-n resnet --depth 18", BASE.replace("conv3in", "resnet18in")),
        ("--norm_type none", BASE.replace("conv3in", "conv3")),
        ("-n densenet", BASE.replace("conv3in", "densenetin")),  # SPEC 8.18
        ("-n efficient", BASE.replace("conv3in", "efficientin")),
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


@pytest.mark.parametrize(
    "words,message",
    [
        ("-d cifar10 --ipc 1 --size 64", "--size 64: expected none for cifar10, whose images have 32 pixels"),
        ("-d digits --ipc 1 --nclass 5", "--nclass 5: expected none for digits; it is an option of imagenet"),
        ("-d digits --ipc 1 -s random", "--slct-type: expected for evaluate_idc.py alone; leave it out"),
        ("-d digits --ipc 1 --override-load-dir x", "--override-load-dir: expected for evaluate_idc.py alone"),
    ],
)
def test_options_that_would_change_nothing_are_refused(words, message, parse):
    with pytest.raises(UserError, match=message):
        parse(words)
    assert parse("-d cifar10 --ipc 1 --size 32 --nclass 10").size == 32  # what is so anyway


def test_epochs_of_imagenet():
    found = [evaluation_epochs("imagenet", n, False) for n in (1, 10, 50, 200, 500, 501)]
    assert found == [3000, 2000, 1500, 1000, 500, 300]
    assert [evaluation_epochs("imagenet", n, True) for n in (1, 10, 50, 200, 500, 501)] == [
        2000, 1300, 1000, 600, 300, 200,
    ]  # fmt: skip
    assert evaluation_epochs("cifar10", 1, False) == 1000


@pytest.mark.parametrize(
    "words,earlier",
    [
        ("-d cifar10 --ipc 1", "conv3in_grad_l1_nd500_cut_lr0.005_random_ipc1"),
        ("-d cifar10 --ipc 1 --match feat", "conv3in_feat_mse_nd500_cut_lr0.005_random_ipc1"),
        ("-d cifar10 --ipc 1 -n resnet --norm_type batch", "resnet10bn_grad_l1_nd500_cut_lr0.005_random_ipc1"),
    ],
)
def test_a_result_under_its_earlier_spelling_is_found(words, earlier, parse, tmp_path):  # SPEC 8.14
    words += f" --results {tmp_path}"
    new = result_folder(parse(words))
    assert new.parent == tmp_path / "cifar10" and new.name != earlier
    (new.parent / earlier).mkdir(parents=True)
    assert result_folder(parse(words)) == new.parent / earlier
    new.mkdir()
    assert result_folder(parse(words)) == new


def test_epochs_of_bound_images_count_what_is_decoded(parse):  # SPEC 8.14
    """ImageNet, 30 images packed by factor 3: 270 images a class, of which bound shows 128."""
    words = "-d imagenet --nclass 10 -f 3 --ipc 30 --decode_type"
    assert parse(f"{words} single").epochs == 500
    assert parse(f"{words} bound").epochs == 1000
    assert parse(f"{words} bound --batch_syn_max 40").epochs == 1500
    assert parse("-d imagenet --nclass 100 -f 3 --ipc 30 --decode_type bound").epochs == 600


def test_features_are_compared_by_mse_whatever_is_given(parse):  # SPEC 8.13
    for metric in ("", "--metric cos", "--reproduce --metric l1"):
        assert parse(f"-d cifar10 --ipc 1 --match feat {metric}").metric == "mse"
    assert parse("-d cifar10 --ipc 1 --metric cos").metric == "cos"


@pytest.mark.parametrize("text", ["2,1", "-1", "a", "1,2,3", ",", "1,"])
def test_ranges_of_features_that_are_none(text, parse):  # SPEC 8.13
    with pytest.raises(UserError, match="--f_idx: expected a or a,b with 0 <= a <= b, found"):
        parse(f"-d cifar10 --ipc 1 --match feat --f_idx={text}")


def test_another_seed_of_imagenet_chooses_other_classes(parse):  # SPEC 8.14
    found = {}
    for seed in (0, 1, 2):
        args = parse(f"-d imagenet --nclass 10 --ipc 1 --dseed {seed}")
        folder = result_folder(args).parent
        assert str(folder) == "results/imagenet10" + (f"-seed{seed}" if seed else "")
        found[seed] = subset_classes(subset(args))
        assert len(set(found[seed])) == 10
    listed = (PROJECT / "utils/data/imagenet100_wnids.txt").read_text().split()
    assert found[0] == listed[:10]
    np.random.seed(2)  # the published choice
    assert found[2] == [listed[line] for line in np.random.permutation(100)[:10]]
    assert found[1] != found[2] and result_folder(parse("-d cifar10 --ipc 1 --dseed 3")).parent.name == "cifar10"


@pytest.mark.parametrize("count", [2, 30, 99, 100])
def test_any_number_of_classes_of_imagenet(count, parse):  # SPEC 8.18
    args = parse(f"-d imagenet --nclass {count} --ipc 1")
    assert str(result_folder(args).parent) == f"results/imagenet{count}" and len(subset_classes(subset(args))) == count
    assert (args.batch_size == 128) == (count == 100)


@pytest.mark.parametrize(
    "words,message",
    [
        ("-d speech", "-d speech: expected image data"),
        ("-d cifar10 -s herding", "-s herding: expected idc, random, dsa or kip"),
        ("-d imagenet --nclass 101", "expected 2 to 100, found 101"),
        ("-d cifar10 -n densenet --match feat", "--match feat: expected -n convnet"),
    ],
)
def test_choices_that_are_refused(words, message, parse):  # SPEC 8.18
    with pytest.raises(UserError, match=message):
        parse(f"{words} --ipc 1")


def test_options_of_the_release_that_change_nothing(parse):  # SPEC 8.18
    plain, more = parse("-d cifar10 --ipc 1"), parse("-d cifar10 --ipc 1 --pretrained --verbose")
    assert more.pretrained and more.verbose and result_folder(plain) == result_folder(more)


def test_augmentation_where_dsa_is_off(parse):  # SPEC 8.10
    def kinds(words):
        args = parse(words)
        return [train_config(args, 10, real_images=real).imagenet for real in (False, True)]

    assert kinds("-d imagenet --ipc 1") == ["crop", None]
    assert kinds("-d tiny-imagenet --ipc 1") == ["crop", None]
    assert kinds("-d imagenet --ipc 1 --rrc False") == ["no_crop", None]
    assert kinds("-d imagenet --ipc 1 --dsa True") == kinds("-d cifar10 --ipc 1") == [None, None]


def test_a_test_is_written_to_a_folder_of_its_own(parse):  # SPEC 8.16
    assert str(result_folder(parse("-d cifar10 --ipc 1 --test --results r"))) == "r/test"

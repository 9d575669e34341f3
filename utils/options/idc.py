"""The options of PDD+IDC: their table, the `--reproduce` presets, and settings derived from the data set.

An option given on the command line wins over derived settings, these over presets, presets over defaults.
"""

import argparse
from pathlib import Path

from ..augment import DSA, without
from ..data import datasets, info
from ..gradient_matching import METRICS, GradientMatchConfig, feature_range
from ..results import names
from ..training import TrainConfig
from . import (
    COUNT,
    DSA_STRATEGY,
    FLAG,
    FRACTION,
    FROM_MINUS_ONE,
    NATURAL,
    POSITIVE,
    RATE,
    SEED,
    UNUSED,
    WANDB,
    strategy,
    truth,
)

# --reproduce: what each data set sets besides PRESET_ALL.
PRESET_ALL = {"n_data": 500, "net_type": "convnet", "depth": 3}
PRESETS = {
    "cifar10": {"metric": "mse", "lr_img": 5e-3, "n_data": 2000},
    "cifar100": {"metric": "mse", "lr_img": 5e-3, "n_data": 2000},
    "svhn": {"metric": "mse", "lr_img": 5e-3},
    "mnist": {"metric": "l1", "lr_img": 1e-4},
    "fashion": {"metric": "l1", "lr_img": 1e-4},
    "imagenet": {"net_type": "resnet_ap", "depth": 10},
}
# The bundled digits are no data set of the paper: these settings are this project's, with or without --reproduce.
DIGITS = {"depth": 2, "width": 0.25, "metric": "mse", "lr_img": 0.05, "n_data": 500, "inner_loop": 10, "niter": 2}

NET_TYPES = ("resnet", "resnet_ap", "convnet", "densenet", "efficient", "efficientnet")
SELECTIONS = ("idc", "random", "dsa", "kip", "herding")
SMALL = ("mnist", "fashion", "svhn", "cifar10", "cifar100", "digits")
BASE_SIZE = {"mnist": 28, "imagenet": 224, "digits": 8}  # of the scaling of lr_img; 32 for the others
LARGE_IMAGES = 64  # own images above this many pixels have the lr_img of ImageNet's, others that of CIFAR's

# Rows of tables that PDD+DM has, too.
AUG_TYPE = ("-a --aug_type", strategy, "color_crop_cutout", "DSA of a pair of batches")
BATCH_REAL = ("--batch_real", COUNT, 64, "real images of a class in one match")
STUDENT = [
    ("--early", NATURAL, 0, "real epochs of a network before its first sweep"),
    ("--fix_iter", FROM_MINUS_ONE, -1, "outer iterations that a network is kept for (-1: one)"),
    ("--net_epoch", NATURAL, 1, "epochs on real images after each sweep"),
    ("--n_data", NATURAL, 500, "real images of these epochs; 0: none, the networks stay as they are"),
]
SPEED = [
    ("--transition_batch", COUNT, 1, "outer iterations whose networks are trained on the earlier unions together"),
    ("--transition_pool", NATURAL, 0, "train this many networks on the earlier unions once and use them in turn; 0 "
     "trains a new one for every outer iteration, as published"),
]  # fmt: skip


def niter(text):
    """Parse --niter: a number > 0, whole if it is (folder names hold it); fractions make runs shorter than 1."""
    value = POSITIVE(text)
    return int(value) if value == int(value) else value


def features(text):
    """Parse --f_idx: a or a,b."""
    try:
        feature_range(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a or a,b with 0 <= a <= b, found {text!r}") from None
    return text if "," in text else int(text)  # earlier versions kept a number


# The options that distillation and evaluation share, {group: table}.
OPTIONS = {
    "data": [
        ("-d --dataset", (*info.IDC_NAMES, "speech"), "cifar10", "data set; folder: your own images"),
        ("--data_dir", str, "data", "folder of the data set; downloaded there if possible"),
        ("--imagenet_dir", str, "data/imagenet", "folder of ImageNet"),
        ("--nclass", COUNT, 10, "classes of imagenet, of the published list of 100"),
        ("--dseed", NATURAL, 0, "seed of the choice of imagenet's classes; 0 takes the first of the list"),
        ("--size", COUNT, 224, f"pixels of imagenet and of own images (folder: {datasets.RES})"),
        ("-l --load_memory", truth, True, f"{UNUSED}: data stay in memory"),
        ("-j --workers", NATURAL, 8, f"{UNUSED}: there are no loaders"),
    ],
    "network": [
        ("-n --net_type", NET_TYPES, "convnet", "network"),
        ("--norm_type", ("batch", "instance", "sn", "none"), "instance", "its normalisation"),
        ("--depth", COUNT, 10, "blocks of a convnet (3; digits: 2), or layers of another network"),
        ("--width", POSITIVE, 1.0, "factor on its channels"),
    ],
    "training of networks": [
        (
            "--epochs",
            COUNT,
            300,
            "epochs on each union, of which a transition takes a fifth (default: distill_idc.py 1000, on imagenet "
            "3000 to 200, fewer for more images; evaluate_idc.py 500, with --last_only or --new_only 1000)",
        ),
        ("--batch_size", COUNT, 64, "images in a minibatch"),
        ("--lr", POSITIVE, 0.01, "learning rate; PDD+IDC: 0.1 for tiny-imagenet, and imagenet of 100 classes"),
        ("--momentum", RATE, 0.9, "momentum"),
        ("--weight-decay --wd", RATE, 5e-4, "weight decay"),
        ("--mixup", ("vanilla", "cut"), "cut", "cut: CutMix on synthetic images; vanilla: none"),
        ("--mixup_net", ("vanilla", "cut"), "cut", "the same on real images"),
        ("--beta", POSITIVE, 1.0, "CutMix: lambda is drawn from Beta(beta, beta)"),
        ("--mix_p", FRACTION, 1.0, "CutMix: probability (0.5 for named sets of at most 32 pixels)"),
        ("--dsa", truth, False, "DSA when training on synthetic images (True for named sets of at most 32 pixels)"),
        (
            "--dsa_strategy",
            strategy,
            DSA_STRATEGY,
            "operations of DSA, joined by _, or none; cutout only without CutMix",
        ),
        ("--rrc", truth, True, "random resized crops if DSA is off"),
    ],
    "synthetic images": [
        (
            "-i --ipc",
            COUNT,
            -1,
            "images of each class that every stage learns; needed unless --override-load-dir is read",
        ),
        ("-f --factor", COUNT, 1, "images on each side of one synthetic image (multi-formation)"),
        (
            "--decode_type",
            ("single", "multi", "bound"),
            "single",
            "cut an image into factor x factor; multi: and into fewer; bound: as --batch_syn_max allows",
        ),
        ("--init", ("random", "noise", "mix"), "random", "what new images start from (mix if factor > 1)"),
        ("--num-intervals", COUNT, 5, "stages P"),
        ("--start-interval", NATURAL, 0, "begin at this stage (from 0); evaluate_idc.py evaluates all stages"),
    ],
    "matching": [
        AUG_TYPE,
        ("--match", ("feat", "grad"), "grad", "what is matched"),
        ("--metric", METRICS, "l1", "distance"),
        ("--bias", truth, False, "match gradients of biases and normalisations, too"),
        ("--fc", truth, False, "match gradients of linear layers, too"),
        ("--f_idx", features, 4, "block a, or blocks a,b, whose features are matched (--match feat)"),
        ("--niter", niter, 500, "length of a stage: niter x 100 sweeps, inner_loop of them in each outer iteration"),
        ("--inner_loop", COUNT, 100, "sweeps over the classes in one outer iteration"),
        *STUDENT,
        ("--pt_from", FROM_MINUS_ONE, -1, "start from networks pretrained for so many epochs (-1: from new ones)"),
        ("--pt_num", COUNT, 1, "from networks of so many epochs, --pt_from and those after it"),
        BATCH_REAL,
        ("--batch_syn_max", COUNT, 128, "decoded images of a class in one match, at most"),
        (
            "--lr_img",
            POSITIVE,
            5e-3,
            "learning rate of the images, scaled by ipc / 10 and (size / 32)^2; 224 instead of 32 for imagenet and "
            "own images above 64 pixels, 28 for mnist, 8 for digits",
        ),
        ("--mom_img", FRACTION, 0.5, "momentum of the images"),
        ("--reproduce", FLAG, False, "the release's settings for this data set"),
        *SEED,
    ],
    "output": [
        ("--tag", str, "", "put into the folder's name after the network"),
        ("--name", str, "", "name of the folder in results/{dataset}, instead of the one that options give"),
        ("--results", str, "results", "root folder of the results"),
        ("--override-save-dir", str, None, "the folder to write to, itself"),
        ("--override-load-dir", str, None, "the folder to read from, itself"),
        (
            "-s --slct_type",
            SELECTIONS,
            "idc",
            "what evaluate_idc.py trains on: distilled images, random real ones, or "
            "the file of DSA or KIP that --override-load-dir names",
        ),
        ("--repeat", COUNT, 1, "networks of an evaluation"),
        ("--save_ckpt", truth, False, "save the networks of the evaluation"),
        ("-p --print-freq", COUNT, 10, "outer iterations (PDD+DM: iterations) between two rows of the log"),
        # Published: each of several commands learned nclass_sub classes, with networks that knew no others.
        ("--phase", FROM_MINUS_ONE, -1, f"{UNUSED}: torchrun spreads the classes of one command over processes"),
        ("--nclass_sub", FROM_MINUS_ONE, -1, f"{UNUSED}: torchrun spreads the classes of one command"),
        ("--test", FLAG, False, "no evaluation in a stage; writes to {results}/test, one result at a time"),
        ("--pretrained", FLAG, False, UNUSED),
        ("--verbose", FLAG, False, UNUSED),
        ("--time", FLAG, False, "print the seconds of each outer iteration"),
        *WANDB,
    ],
}


def add_options(parser):
    """Declare the options that distillation and evaluation share."""
    for title, rows in OPTIONS.items():
        parser.add_options(title, rows)


def resolve(parser):
    """Parse the command line; returns the namespace with presets and derived settings in it.

    `lr_img` is as given, `lr_img_scaled` what the optimiser uses, `size` the pixels, `nclass` the classes and `data`
    the data set's name in utils/data.
    """
    args, derive = resolve_data(parser)
    dataset, many = args.dataset, args.nclass >= 100
    if args.reproduce:
        _apply_presets(args, derive, many)
    if dataset == "digits":
        derive(**DIGITS)
    resolve_training(args, derive)
    if dataset in ("imagenet", "tiny-imagenet") and args.net_type == "convnet":
        derive(net_type="resnet_ap", depth=10)
    if args.net_type == "convnet" and args.depth > 4:
        derive(depth=3)
    if dataset in ("imagenet", "tiny-imagenet") and many:
        derive(lr=0.1, weight_decay=1e-4)
        derive(batch_size=max(args.batch_size, 128), batch_real=max(args.batch_real, 128))
    decoded = args.factor**2 * args.ipc
    decoded = min(decoded, args.batch_syn_max) if args.decode_type == "bound" else decoded
    derive(epochs=evaluation_epochs(dataset, decoded, many))
    if args.match == "feat":
        args.metric = "mse"  # whatever is given, as published
        if args.net_type not in ("convnet", "resnet", "resnet_ap"):
            parser.error(f"--match feat: expected -n convnet, resnet or resnet_ap, found {args.net_type}")
    args.lr_img_scaled = args.lr_img * (args.ipc / 10) * (args.size / base_size(dataset, args.size)) ** 2
    return args


def resolve_data(parser):
    """Parse the command line; returns (namespace with `data`, `size` and `nclass`, function that derives settings)."""
    args, given = parser.parse_args(), parser.given()
    if args.dataset == "speech":
        parser.error("-d speech: expected image data; the speech commands of the release have never been published")
    if args.slct_type == "herding":
        parser.error("-s herding: expected idc, random, dsa or kip; the release declares herding and cannot run it")
    evaluates = "checks" in args
    for option in ("override_load_dir", "slct_type"):
        if option in given and not evaluates:
            parser.error(f"--{option.replace('_', '-')}: expected for evaluate_idc.py alone; leave it out")
    if args.ipc < 1 and not (args.override_load_dir and evaluates):  # an evaluation finds it in the files
        parser.error("--ipc: expected the number of images that every stage learns, found none")
    if args.start_interval >= args.num_intervals and not evaluates:
        parser.error(f"--start-interval {args.start_interval}: expected less than --num-intervals {args.num_intervals}")

    def derive(**settings):
        vars(args).update({name: value for name, value in settings.items() if name not in given})

    dataset = args.dataset
    args.data = info.IDC_NAMES[dataset]
    if dataset == "folder":
        derive(size=datasets.RES)
    elif dataset != "imagenet":
        args.size = info.KNOWN[args.data].im_size
        if given.get("size", args.size) != args.size:
            parser.error(f"--size {given['size']}: expected none for {dataset}, whose images have {args.size} pixels")
    if dataset != "imagenet":
        args.nclass = info.KNOWN[args.data].num_classes if args.data in info.KNOWN else 10
        if given.get("nclass", args.nclass) != args.nclass:
            parser.error(f"--nclass {given['nclass']}: expected none for {dataset}; it is an option of imagenet")
    elif not 2 <= args.nclass <= 100:
        parser.error(f"--nclass: expected 2 to 100, found {args.nclass}")
    if args.factor > args.size:
        parser.error(f"--factor {args.factor}: larger than the images of {args.size} pixels")
    return args, derive


def resolve_training(args, derive):
    """Derive how images are initialised and networks are trained on them."""
    if args.factor > 1:
        derive(init="mix")
    if args.dataset in SMALL:
        derive(mix_p=0.5, dsa=True)
    if args.dataset in ("svhn", "mnist"):
        derive(dsa_strategy=without(args.dsa_strategy, "flip"))
    if args.mixup == "cut":
        derive(dsa_strategy=without(args.dsa_strategy, "cutout"))


def _apply_presets(args, derive, many):
    """Apply --reproduce."""
    preset = PRESETS.get(args.dataset, {})
    derive(**PRESET_ALL | preset)
    if args.dataset == "svhn" and args.factor == 1 and args.ipc == 1:
        derive(mixup="vanilla", dsa_strategy=without(args.dsa_strategy, "flip"))
    if args.dataset == "mnist" and args.factor > 1:
        derive(aug_type="color_crop", mixup="vanilla", mixup_net="vanilla", dsa_strategy="color_crop_scale_rotate")
    if args.dataset == "imagenet":
        derive(**({"metric": "l1", "lr_img": 1e-3} if many else {"metric": "l1", "lr_img": 3e-3, "early": 10}))
        if args.factor >= 3 and args.ipc >= 20:
            derive(decode_type="bound")


def base_size(dataset, size):
    """Return the pixels that lr_img is scaled relative to."""
    if dataset == "folder":
        return 224 if size > LARGE_IMAGES else 32
    return BASE_SIZE.get(dataset, 32)


def evaluation_epochs(dataset, images, many):
    """Return the epochs of an evaluation on one union.

    Args:
        dataset: name.
        images: decoded images of each class that a stage learns (factor² · ipc).
        many: 100 classes or more.
    """
    if dataset != "imagenet":
        return 1000
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((epochs for limit, epochs in table if images <= limit), 300)
    return epochs * 2 // 3 // 100 * 100 if many else epochs


def load_data(args, device):
    """Load the data set that the options name."""
    statistics = info.IDC_STATISTICS.get(args.dataset)
    return datasets.load(
        args.data, data_folder(args), device, statistics=statistics, subset=subset(args), res=args.size
    )


def data_folder(args):
    """Return the folder of the data set."""
    return args.imagenet_dir if args.dataset == "imagenet" else args.data_dir


def subset(args):
    """Return the name of the part of ImageNet; None for other data sets."""
    if args.dataset != "imagenet":
        return None
    return f"imagenet{args.nclass}" + (f"-seed{args.dseed}" if args.dseed else "")


def dataset_subdir(args):
    """Return where results of a data set lie below the root of all results."""
    if args.dataset == "folder":
        return datasets.dataset_subdir("folder", args.data_dir, res=args.size)
    return subset(args) or args.dataset


def result_folder(args):
    """Return the folder that a distillation with these options writes."""
    if args.override_save_dir:
        return Path(args.override_save_dir)
    if args.test:
        return Path(args.results) / "test"
    parent = Path(args.results) / dataset_subdir(args)
    folder, earlier = (parent / (args.name or names.idc_folder(vars(args), old)) for old in (False, True))
    return earlier if earlier.exists() and not folder.exists() else folder


def network_spec(args):
    """Return the distillation's network as arguments of `networks.idc_network`."""
    return {"net_type": args.net_type, "depth": args.depth, "width": args.width, "norm": args.norm_type}


def match_config(args):
    """Return how gradients are matched."""
    return GradientMatchConfig(
        lr=args.lr_img_scaled,
        augment=DSA(args.aug_type, "idc"),
        momentum=args.mom_img,
        factor=args.factor,
        decode_type=args.decode_type,
        batch_real=args.batch_real,
        batch_syn_max=args.batch_syn_max,
        match=args.match,
        metric=args.metric,
        bias=args.bias,
        fc=args.fc,
        f_idx=feature_range(args.f_idx),
        precision=args.precision,
    )


def train_config(args, epochs, real_images=False, lr_factor=1.0):
    """Return IDC's way of training: SGD whose learning rate drops to a fifth at 2/3 and at 5/6, DSA and CutMix.

    Args:
        args: what `resolve` returned.
        epochs: of the training.
        real_images: the epochs on real images between sweeps, at a constant learning rate with the augmentation of
            the matching (without cutout if CutMix is on), instead of an evaluation's.
        lr_factor: on the learning rate.
    """
    mixup = args.mixup_net if real_images else args.mixup
    cutmix = (args.mix_p, args.beta) if mixup == "cut" else None
    if real_images:
        dsa, milestones = DSA(without(args.aug_type, "cutout") if cutmix else args.aug_type, "idc"), ()
    else:
        dsa = DSA(args.dsa_strategy, "idc") if args.dsa else None
        milestones = ((2 * epochs // 3 - 1, 0.2), (5 * epochs // 6 - 1, 0.2))
    return TrainConfig(
        epochs,
        args.lr * lr_factor,
        args.momentum,
        args.weight_decay,
        args.batch_size,
        dsa,
        milestones,
        cutmix=cutmix,
        imagenet=None if args.dsa or real_images else "crop" if args.rrc else "no_crop",
        precision=args.precision,
    )


def network_title(args):
    """Return what folders and reports call the distillation's network."""
    return names.idc_model(vars(args))

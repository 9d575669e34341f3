"""The options of PDD+IDC, their presets and derived settings, and the folder names that follow from them.

Published settings come from three places: defaults, `--reproduce` presets, and rules that derive settings from the
data set. An option given on the command line wins over all three.
"""

import argparse
from pathlib import Path

import utils.options as o
from utils import datasets
from utils.augment import without
from utils.gradient_matching import METRICS

# Name on the command line: (name of the data set here, pixels, base pixels of the scaling of lr_img).
DATASETS = {
    "mnist": ("MNIST", 28, 28),
    "fashion": ("FashionMNIST", 28, 32),
    "svhn": ("SVHN", 32, 32),
    "cifar10": ("CIFAR10", 32, 32),
    "cifar100": ("CIFAR100", 32, 32),
    "tiny-imagenet": ("Tiny", 64, 32),
    "imagenet": ("ImageNet", 224, 224),
    "digits": ("Digits", 8, 8),
    "folder": ("folder", 224, 224),
}
SIZED = ("imagenet", "folder")  # their pictures are brought to --size pixels
CLASSES = {"cifar100": 100, "tiny-imagenet": 200}  # the others have 10, imagenet --nclass
SMALL = ("mnist", "fashion", "svhn", "cifar10", "cifar100", "digits")
# Channel statistics of IDC where they are not those of the data set elsewhere.
STATISTICS = {"tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))}

# --reproduce: what each data set sets besides PRESET_ALL.
PRESET_ALL = {"n_data": 500, "net_type": "convnet", "depth": 3}
PRESETS = {
    "cifar10": {"metric": "mse", "lr_img": 5e-3, "n_data": 2000},
    "cifar100": {"metric": "mse", "lr_img": 5e-3, "n_data": 2000},
    "svhn": {"metric": "mse", "lr_img": 5e-3},
    "mnist": {"metric": "l1", "lr_img": 1e-4},
    "fashion": {"metric": "l1", "lr_img": 1e-4},
    "imagenet": {"net_type": "resnet_ap", "depth": 10},
    "tiny-imagenet": {},
    "digits": {},
    "folder": {},
}
# The bundled digits are no data set of the paper: these settings are this project's, with or without --reproduce.
DIGITS = {"depth": 2, "width": 0.25, "metric": "mse", "lr_img": 0.05, "n_data": 500, "inner_loop": 10, "niter": 2}


def add(parser, start_interval):
    """Declare the options of both scripts; defaults stay out of the namespace, so that given ones can be told.

    Args:
        parser: `utils.options.Parser`.
        start_interval: help of --start-interval.

    Returns:
        {name: default}.
    """
    defaults = {}

    def group(title):
        return _Group(parser.add_argument_group(title), defaults)

    data = group("data")
    data("-d", "--dataset", default="cifar10", choices=tuple(DATASETS), help="data set; folder: own pictures")
    data("--data_dir", default="data", help="folder of the data set; downloaded there where possible")
    data("--imagenet_dir", default="data/imagenet", help="folder of ImageNet")
    data("--nclass", type=o.COUNT, default=10, help="classes of imagenet: 10 or 100 of the published list")
    data("--dseed", type=o.NATURAL, default=0, help="accepted for old commands; not used")
    data("--size", type=o.COUNT, default=224, help="pixels of imagenet and of own pictures (folder)")
    data("-l", "--load_memory", type=o.truth, default=True, help="accepted for old commands; data stay in memory")
    data("-j", "--workers", type=o.NATURAL, default=8, help="accepted for old commands; there are no loaders")
    network = group("network")
    network("-n", "--net_type", default="convnet", choices=("resnet", "resnet_ap", "convnet"), help="network")
    network("--norm_type", default="instance", choices=("batch", "instance", "sn", "none"), help="its normalisation")
    network("--depth", type=o.COUNT, default=10, help="its depth (convnet: 3)")
    network("--width", type=o.POSITIVE, default=1.0, help="factor on its channels")
    train = group("training of networks")
    train(
        "--epochs",
        type=o.COUNT,
        default=300,
        help="epochs on each union, of which a transition takes a fifth (default: distill_idc.py 1000, on imagenet "
        "3000 to 200, fewer for more pictures; evaluate_idc.py 500, with --last_only or --new_only 1000)",
    )
    train("--batch_size", type=o.COUNT, default=64, help="pictures in a minibatch")
    train("--lr", type=o.POSITIVE, default=0.01, help="learning rate")
    train("--momentum", type=o.RATE, default=0.9, help="momentum")
    train("--weight-decay", "--wd", dest="weight_decay", type=o.RATE, default=5e-4, help="weight decay")
    train("--mixup", default="cut", choices=("vanilla", "cut"), help="cut: CutMix on synthetic pictures; vanilla: none")
    train("--mixup_net", default="cut", choices=("vanilla", "cut"), help="the same on real pictures")
    train("--beta", type=o.POSITIVE, default=1.0, help="CutMix: lambda is drawn from Beta(beta, beta)")
    train("--mix_p", type=o.FRACTION, default=1.0, help="CutMix: probability (0.5 for pictures up to 32 pixels)")
    train(
        "--dsa",
        type=o.truth,
        default=False,
        help="DSA when training on synthetic pictures (True for those up to 32 pixels)",
    )
    train("--dsa_strategy", type=o.strategy, default=o.DSA_STRATEGY, help="its entries, joined by _, or none")
    train("--rrc", type=o.truth, default=True, help="random resized crops where DSA is off")
    form = group("synthetic images")
    form("-i", "--ipc", type=o.COUNT, default=-1, help="images of each class that every stage learns; has to be given")
    form("-f", "--factor", type=o.COUNT, default=1, help="pictures on each side of one image (multi-formation)")
    form("--decode_type", default="single", choices=("single", "multi", "bound"), help="how images are decoded")
    form(
        "--init",
        default="random",
        choices=("random", "noise", "mix"),
        help="what new images start from (mix where factor > 1)",
    )
    form("--num-intervals", dest="num_intervals", type=o.COUNT, default=5, help="stages P")
    form("--start-interval", dest="start_interval", type=o.NATURAL, default=0, help=start_interval)
    match = group("matching")
    match("-a", "--aug_type", type=o.strategy, default="color_crop_cutout", help="DSA of a pair of batches")
    match("--match", default="grad", choices=("feat", "grad"), help="what is matched")
    match("--metric", default="l1", choices=METRICS, help="distance")
    match("--bias", type=o.truth, default=False, help="match gradients of biases and normalisations, too")
    match("--fc", type=o.truth, default=False, help="match gradients of linear layers, too")
    match("--f_idx", type=o.NATURAL, default=4, help="block whose features are matched; the last where there are fewer")
    match(
        "--niter",
        type=iterations,
        default=500,
        help="length of a stage: niter x 100 sweeps, inner_loop of them in each outer iteration",
    )
    match("--inner_loop", type=o.COUNT, default=100, help="sweeps over the classes in one outer iteration")
    match("--early", type=o.NATURAL, default=0, help="real epochs of a network before its first sweep")
    match("--fix_iter", type=o.number(int, low=-1), default=-1, help="outer iterations with one network (-1: one)")
    match("--net_epoch", type=o.NATURAL, default=1, help="epochs on real pictures after each sweep")
    match("--n_data", type=o.COUNT, default=500, help="real pictures of these epochs")
    match(
        "--pt_from",
        type=o.number(int, low=-1),
        default=-1,
        help="start from networks pretrained for this many epochs (-1: from new ones)",
    )
    match("--pt_num", type=o.COUNT, default=1, help="number of pretrained networks")
    match("--batch_real", type=o.COUNT, default=64, help="real pictures of a class in one match")
    match("--batch_syn_max", type=o.COUNT, default=128, help="decoded pictures of a class in one match, at most")
    match(
        "--lr_img",
        type=o.POSITIVE,
        default=5e-3,
        help="learning rate of the images, scaled by ipc / 10 and (size / 32)^2; 224 instead of 32 for imagenet",
    )
    match("--mom_img", type=o.FRACTION, default=0.5, help="momentum of the images")
    match("--reproduce", action="store_true", help="settings of the paper for this data set")
    match("--seed", type=o.NATURAL, default=0, help="seed of every random decision")
    output = group("output")
    output("--tag", default="", help="put into the folder's name after the network")
    output("--name", default="", help="name of the folder in results/{dataset}, instead of the one that options give")
    output("--results", default="results", help="root folder of the results")
    output("--override-save-dir", dest="override_save_dir", default=None, help="the folder to write to, itself")
    output("--override-load-dir", dest="override_load_dir", default=None, help="the folder to read from, itself")
    output("-s", "--slct_type", default="idc", choices=("idc", "random"), help="train on distilled or random pictures")
    output("--repeat", type=o.COUNT, default=1, help="networks of an evaluation")
    output("--save_ckpt", type=o.truth, default=False, help="save the networks of the evaluation")
    output(
        "-p",
        "--print-freq",
        dest="print_freq",
        type=o.COUNT,
        default=10,
        help="outer iterations between two rows of the log",
    )
    # Published: each of several commands learned nclass_sub classes, with networks that knew no others.
    split = "accepted for old commands; not used: torchrun spreads the classes of one command over processes"
    output("--phase", type=o.number(int, low=-1), default=-1, help=split)
    output("--nclass_sub", type=o.number(int, low=-1), default=-1, help=split)
    output("--test", action="store_true", help="evaluate the initial images, too")
    output("--time", action="store_true", help="print the seconds of each outer iteration")
    o.add_wandb(parser.add_argument_group("machine"))
    return defaults


def iterations(text):
    """Parse --niter: a number > 0, whole where it is (folder names hold it); fractions make runs shorter than 1."""
    value = o.POSITIVE(text)
    return int(value) if value == int(value) else value


class _Group:
    """Adds arguments whose default is shown in the help but left out of the namespace."""

    def __init__(self, group, defaults):
        self.group, self.defaults = group, defaults

    def __call__(self, *names, default=None, help="", **keywords):
        if keywords.get("action") == "store_true":
            default = False
        if keywords.get("type") is o.truth:
            keywords["metavar"] = "{True,False}"
        shown = help if default in (None, "", -1) or "(default" in help else f"{help} (default: {default})"
        action = self.group.add_argument(*names, default=argparse.SUPPRESS, help=shown, **keywords)
        self.defaults[action.dest] = default


def resolve(given, defaults, parser):
    """Return the options of a run: what was `given`, then derived settings, then presets, then `defaults`.

    Args:
        given: namespace of the options on the command line.
        defaults: what `add` returned.
        parser: for refusals.

    Returns:
        Namespace; `lr_img` is as given, `lr_img_scaled` what the optimiser uses, `size` the pixels, `nclass` the
        classes and `data` the name of the data set in utils.datasets.
    """
    given = vars(given)
    options = argparse.Namespace(**defaults)
    options.__dict__.update(given)

    def derive(**settings):
        for name, value in settings.items():
            if name not in given:
                setattr(options, name, value)

    dataset = options.dataset
    if options.ipc < 1:
        parser.error("--ipc: expected the number of images that every stage learns, found none")
    options.data, pixels, base = DATASETS[dataset]
    if dataset not in SIZED:
        options.size = pixels
    if dataset != "imagenet":
        options.nclass = CLASSES.get(dataset, 10)
    elif options.nclass not in (10, 100):
        parser.error(f"--nclass: expected 10 or 100, found {options.nclass}")
    if dataset == "folder" and options.size <= 64:
        base = 32  # small pictures of one's own are treated like CIFAR's, large ones like ImageNet's
    many = options.nclass >= 100

    if options.reproduce:
        derive(**PRESET_ALL, **{k: v for k, v in PRESETS[dataset].items() if k not in PRESET_ALL})
        derive(**PRESETS[dataset])
        if dataset == "svhn" and options.factor == 1 and options.ipc == 1:
            derive(mixup="vanilla", dsa_strategy=without(options.dsa_strategy, "flip"))
        if dataset == "mnist" and options.factor > 1:
            derive(aug_type="color_crop", mixup="vanilla", mixup_net="vanilla", dsa_strategy="color_crop_scale_rotate")
        if dataset == "imagenet":
            derive(**({"metric": "l1", "lr_img": 1e-3} if many else {"metric": "l1", "lr_img": 3e-3, "early": 10}))
            if options.factor >= 3 and options.ipc >= 20:
                derive(decode_type="bound")
    if dataset == "digits":
        derive(**DIGITS)

    if options.factor > 1:
        derive(init="mix")
    if dataset in SMALL:
        derive(mix_p=0.5, dsa=True)
    if dataset in ("svhn", "mnist"):
        derive(dsa_strategy=without(options.dsa_strategy, "flip"))
    if options.mixup == "cut":
        derive(dsa_strategy=without(options.dsa_strategy, "cutout"))
    if dataset in ("imagenet", "tiny-imagenet") and options.net_type == "convnet":
        derive(net_type="resnet_ap", depth=10)
    if options.net_type == "convnet" and options.depth > 4:
        derive(depth=3)
    if dataset in ("imagenet", "tiny-imagenet") and many:
        derive(lr=0.1, weight_decay=1e-4)
        derive(batch_size=max(options.batch_size, 128), batch_real=max(options.batch_real, 128))
    derive(epochs=evaluation_epochs(dataset, options.factor**2 * options.ipc, many))
    options.lr_img_scaled = options.lr_img * (options.ipc / 10) * (options.size / base) ** 2
    if options.factor > options.size:
        parser.error(f"--factor {options.factor}: larger than the pictures of {options.size} pixels")
    return options


def evaluation_epochs(dataset, pictures, many):
    """Return the epochs of an evaluation on one union.

    Args:
        dataset: name.
        pictures: decoded pictures of each class that a stage learns (factor² · ipc).
        many: 100 classes or more.
    """
    if dataset != "imagenet":
        return 1000
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((epochs for limit, epochs in table if pictures <= limit), 300)
    return epochs * 2 // 3 // 100 * 100 if many else epochs


def model_tag(options):
    """Return the network's part of the folder's name: conv3in, resnet10apin, …"""
    norm = {"instance": "in", "batch": "bn", "sn": "sn", "none": "none"}[options.norm_type]
    kind = {
        "convnet": f"conv{options.depth}",
        "resnet": f"resnet{options.depth}",
        "resnet_ap": f"resnet{options.depth}ap",
    }[options.net_type]
    width = "" if options.width == 1 else f"_w{options.width}"
    return kind + norm + width


def folder_name(options):
    """Return the name of the result's folder by the published tag grammar."""
    parts = [model_tag(options)]

    def add(text, wanted=True):
        if wanted:
            parts.append(text)

    add(options.tag, options.tag)
    add(options.match)
    add("b", options.bias)
    add("fc", options.fc)
    add(options.metric)
    add(f"pt{options.pt_from}" + (f"_{options.pt_num}" if options.pt_num > 1 else ""), options.pt_from >= 0)
    add(f"fix{options.fix_iter}", options.fix_iter > 0)
    add(f"ely{options.early}", options.early > 0)
    if options.n_data > 0:
        add(f"nd{options.n_data}")
        add(f"inloop{options.inner_loop}", options.inner_loop != 100)
    add("cut", options.mixup_net == "cut")
    add(f"nlr{options.lr}", options.lr != 0.01)
    add(f"wd{options.weight_decay}", options.weight_decay != 5e-4)
    add(f"niter{options.niter}", options.niter != 500)
    if options.factor > 1:
        add(f"factor{options.factor}")
        add(options.decode_type, options.decode_type != "single")
    add(options.aug_type, options.aug_type != "color_crop_cutout")
    add(f"lr{options.lr_img}")
    add(f"mom{options.momentum}", options.momentum != 0.9)
    add(f"b_real{options.batch_real}", options.batch_real != 64)
    add(f"synmax{options.batch_syn_max}", options.batch_syn_max != 128)
    add(options.init)
    add(f"ipc{options.ipc}")
    return "_".join(parts)


def result_folder(options):
    """Return the folder that a distillation with these options writes."""
    return Path(options.results) / place(options) / (options.name or folder_name(options))


def place(options):
    """Return where results of a data set lie below the root of all results."""
    if options.dataset == "folder":
        return datasets.place("folder", options.data_dir, res=options.size)
    return subset(options) or options.dataset


def subset(options):
    """Return the name of the part of ImageNet, None for other data sets."""
    return f"imagenet{options.nclass}" if options.dataset == "imagenet" else None


def data_folder(options):
    """Return the folder of the data set."""
    return options.imagenet_dir if options.dataset == "imagenet" else options.data_dir

"""The options that name and describe a PDD+MTT experiment, shared by its scripts, and what they are turned into."""

import argparse
from pathlib import Path

from .. import sizes
from ..data import datasets, info
from ..results import names
from ..stages import evaluation_config
from ..trajectory_matching import TrajectoryMatchConfig
from . import CONFIG_DEFAULTS as _DEFAULTS
from . import (
    COUNT,
    DROP_EASY,
    DSA_STRATEGY,
    EVAL_MODE,
    FLAG,
    NATURAL,
    POSITIVE,
    RATE,
    SELECT_ON,
    UNUSED,
    WANDB,
    network_name,
    number,
    strategy,
    truth,
)


def _numbers(text, kind, separator=","):
    try:
        return tuple(kind(word) for word in text.split(separator))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}") from None


def ipc(text):
    """Parse --ipc: a whole number > 0, or several joined by commas."""
    return _numbers(text, COUNT) if "," in text else COUNT(text)


def factors(text):
    """Parse --stage_lr: numbers > 0 joined by commas."""
    return _numbers(text, POSITIVE)


def windows(text):
    """Parse --start_epochs: a:b for a <= epoch < b, one or several joined by commas; returns pairs (a, b)."""
    found = [_numbers(word, NATURAL, ":") for word in text.split(",")]
    if any(len(window) != 2 or window[0] >= window[1] for window in found):
        raise argparse.ArgumentTypeError(f"expected windows a:b with a < b joined by commas, found {text!r}")
    return tuple(found)


def check_stages(parser, args, first_ones=False):
    """Refuse options that have one value for each stage if their number is not that of the stages.

    `first_ones`: there may be more stages, of which the first ones are evaluated.
    """
    for option in ("ipc", "start_epochs", "stage_lr"):
        value = getattr(args, option, None)
        if not isinstance(value, tuple) or (option == "start_epochs" and len(value) == 1):  # one for all
            continue
        more = first_ones and option != "stage_lr" and len(value) > args.num_intervals
        if len(value) != args.num_intervals and not more:
            parser.error(f"--{option}: expected {args.num_intervals} values (--num_intervals), found {len(value)}")


def kept_steps(text):
    """Parse --kept_steps: auto or a whole number >= 0."""
    return text if text == "auto" else NATURAL(text)


DATA = [
    ("--dataset", info.NAMES, "CIFAR10", "data set; folder: your own images"),
    ("--subset", str, "imagenette", "of ImageNet: a name, or a file that lists class folders"),
    ("--res", COUNT, None, f"pixels of ImageNet and own images (default: {datasets.RES})"),
    ("--data_path", str, "data", "folder of the data set; downloaded there if possible"),
    ("--zca", FLAG, False, "ZCA whitening instead of mean and standard deviation"),
]
AUGMENTATION = [
    (
        "--dsa",
        truth,
        True,
        "differentiable Siamese augmentation (buffer_mtt.py without it: DC's crop, scale and rotate)",
    ),
    (
        "--dsa_strategy",
        strategy,
        DSA_STRATEGY,
        "operations, joined by _: color, crop, cutout, flip, scale, rotate, translate; or none",
    ),
]

# What names a PDD+MTT experiment's folder, for distillation and evaluation.
EXPERIMENT = [
    (
        "--model",
        network_name,
        "ConvNet",
        "network of the distillation: ConvNet, ConvNetD1 to D8, ConvNetW32 to W1024, VGG11, ResNet18, AlexNet, …",
    ),
    ("--ipc", ipc, 1, "images of each class that every stage learns; 4,3,3: one number for each stage"),
    ("--eval_mode", tuple("SMWDAPNC"), "S", EVAL_MODE),
    ("--expert_epochs", COUNT, 3, "expert epochs from start to target"),
    ("--syn_steps", COUNT, 20, "student steps in one iteration"),
    ("--max_start_epoch", COUNT, 25, "number of possible start epochs"),
    ("--lr_img", POSITIVE, 1000, "learning rate of the images"),  # an int: see experiment_folder
    (
        "--lr_lr",
        RATE,
        1e-05,
        "learning rate of syn_lr; for CIFAR10 at --ipc 1 always 1e-05 from stage 2 on (form plain), as published",
    ),
    ("--lr_teacher", POSITIVE, 0.01, "learning rate of the experts; where syn_lr starts"),
    ("--batch_real", COUNT, 256, UNUSED),
    ("--batch_syn", COUNT, None, "images in a student's minibatch (default: classes x ipc)"),
    ("--batch_train", COUNT, 256, "images in any other minibatch"),
    ("--texture", FLAG, False, "learn canvases that are shown in random windows"),
    ("--canvas_size", COUNT, 2, "images on each side of a canvas"),
    ("--canvas_samples", COUNT, 1, "windows of each canvas in a minibatch"),
    ("--tag", str, "", "end of the experiment folder's name"),
]


# Of distillation alone.
_EXPERTS = [
    ("--buffer_path", str, "./buffers", "buffers of the experts: their root or their folder"),
    ("--max_files", COUNT, None, "use this many buffer files, chosen at random (default: all)"),
    ("--max_experts", COUNT, None, "use this many experts of each file (default: all)"),
    ("--num_experts", COUNT, 100, f"{UNUSED}: all experts of the folder are matched"),
    ("--load_all", FLAG, False, "keep all buffer files in memory and draw experts with replacement"),
]
_STAGES = [
    ("--num_intervals", COUNT, 1, "stages P"),
    ("--start_interval", COUNT, 1, "begin at this stage (from 1)"),
    ("--pix_init", ("real", "noise"), "real", "what new images start from"),
]
_MATCHING = [
    ("--Iteration", COUNT, 5000, "matching iterations of each stage"),
    ("--start_sampling_epoch", NATURAL, 0, "first start epoch"),
    ("--no_aug", truth, False, "no DSA while matching", {"nargs": "?", "const": True}),
    ("--lr_init", POSITIVE, 0.01, UNUSED),
    ("--mom", RATE, 0.0, "momentum of SGD in a transition's real epochs"),
    ("--l2", RATE, 0.0, "weight decay of SGD in a transition's real epochs"),
    ("--kept_steps", kept_steps, "auto", "student steps whose graph is kept: auto (as many as fit half of the "
     "free memory) or a number; 0 needs the least memory"),
    ("--trajectories_per_iteration", COUNT, 1, "experts whose gradients are averaged in one iteration; 1 as published, "
     "more is another setting that sees as many times the experts"),
    ("--slice_size", COUNT, None, "images of a minibatch held at once (default: all)"),
    ("--compile", FLAG, False, "torch.compile for a ConvNet student's steps; meant for GPUs"),
    ("--bf16", FLAG, False, argparse.SUPPRESS),  # --precision bf16, as earlier versions spelled it
]  # fmt: skip
# From the methods that followed MTT; off by default.
_SUCCESSORS = [
    ("--soft_labels", FLAG, False, "learn soft labels with the images, probabilities of the classes (DATM)"),
    ("--soft_init", ("expert", "onehot"), "expert", "what they start from: an expert's softmax, or the classes"),
    ("--soft_temperature", POSITIVE, 1.0, "temperature of that softmax"),
    ("--lr_label", RATE, 10.0, "learning rate of soft labels"),
    ("--start_epochs", windows, None, "windows a:b of start epochs, a <= epoch < b, one for each stage joined by "
     "commas, or one for all, instead of --start_sampling_epoch and --max_start_epoch"),
    ("--grow_start_epoch", NATURAL, 0, "iterations of a stage over which its window grows from its first epoch to all "
     "(DATM)"),
    ("--syn_lr_form", ("plain", "exp"), "plain", "learn syn_lr itself, or its logarithm, with which it stays positive; "
     "then --lr_lr is the rate of the logarithm"),
    ("--clip_grad", POSITIVE, None, "longest gradient of the images, of soft labels, and of what --syn_lr_form learns; "
     "longer ones are scaled down (default: no limit)"),
    ("--ema", number(float, low=0.0, high=0.9999), 0.0, "keep and evaluate the running mean of the images with this "
     "decay (FTD: 0.999)"),
]  # fmt: skip
_STAGE_EVALUATION = [
    ("--num_eval", COUNT, 5, "networks of each evaluation"),
    ("--eval_it", COUNT, 100, "iterations between two evaluations"),
    ("--epoch_eval_train", COUNT, 1000, UNUSED),
    ("--override_epoch_eval_train", COUNT, 1000, "epochs on a union, of these networks and of every expert in a "
     "transition"),
    *SELECT_ON,
]  # fmt: skip
_OUTPUT = [
    ("--root_log_dir", str, "logged_files", "root folder of the results"),
    ("--save_dir", str, None, "folder for the experiment's folder (default: root_log_dir/dataset)"),
    ("--override_experiment_path", str, None, "the experiment's folder itself"),
    ("--save_interval", COUNT, 10, "trajectories in a buffer file"),
    ("--force_save", FLAG, False, "numbered files at every evaluation"),
    *WANDB,
]
DISTILLATION = {
    "data": DATA + AUGMENTATION,
    "experts": _EXPERTS,
    "stages": EXPERIMENT + _STAGES + DROP_EASY,
    "matching": _MATCHING,
    "from the methods that followed MTT": _SUCCESSORS,
    "evaluation in a stage": _STAGE_EVALUATION,
    "output": _OUTPUT,
}
# Of options that folders of earlier versions do not name.
CONFIG_DEFAULTS = _DEFAULTS | {option.lstrip("-"): default for option, _, default, *_ in _SUCCESSORS}


def load_data(args, device):
    """Load the data set that the options of DATA name."""
    antialias = args.dataset != "ImageNet"  # as published
    return datasets.load(
        args.dataset, args.data_path, device, args.zca, subset=args.subset, res=args.res, antialias=antialias
    )


def dataset_subdir(args):
    """Return where results of this data set lie below the root of all results."""
    return datasets.dataset_subdir(args.dataset, args.data_path, args.subset, args.res)


def experiment_folder(args, root):
    """Return the folder of the experiment below the root of all results.

    A default --lr_img is spelled img1000, one given on the command line img1000.0, as published; an experiment that
    exists is found by either.
    """
    config, parent = vars(args), Path(root) / dataset_subdir(args)
    other = float(args.lr_img) if isinstance(args.lr_img, int) else int(args.lr_img)
    folders = [parent / names.mtt_experiment(config)]
    if other == args.lr_img:
        folders.append(parent / names.mtt_experiment(config | {"lr_img": other}))
    return next((folder for folder in folders if folder.exists()), folders[0])


def match_config(args, real, dsa, stage=1):
    """Return how trajectories are matched in `stage` (from 1)."""
    start_epochs = sizes.mtt_start_epochs(vars(args), stage)
    return TrajectoryMatchConfig(
        batch_syn=args.batch_syn or real.info.num_classes * names.stage_ipcs(args.ipc, stage)[stage - 1],
        syn_steps=args.syn_steps,
        expert_epochs=args.expert_epochs,
        max_start_epoch=len(start_epochs),
        first_start_epoch=start_epochs.start,
        grow_iterations=args.grow_start_epoch,
        dsa=None if args.no_aug else dsa,
        window=real.info.im_size if args.texture else None,
        samples=args.canvas_samples,
        trajectories=args.trajectories_per_iteration,
        retained_graphs=args.kept_steps,
        slice_size=args.slice_size,
    )


def union_config(args, real, epochs, lr, dsa):
    """Return how networks are trained on a union for `epochs` epochs with learning rate `lr`."""
    window = real.info.im_size if args.texture else None
    return evaluation_config(epochs, lr, args.batch_train, dsa, window, args.canvas_samples, args.precision)

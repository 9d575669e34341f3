"""The options that name and describe a PDD+MTT experiment, shared by its scripts, and what they are turned into."""

from pathlib import Path

from ..data import datasets, info
from ..results import names
from ..stages import evaluation_config
from ..trajectory_matching import TrajectoryMatchConfig
from . import COUNT, DSA_STRATEGY, EVAL_MODE, FLAG, NATURAL, POSITIVE, RATE, UNUSED, network_name, strategy, truth


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
        "differentiable Siamese augmentation; experts without it see DC's crop, scale and rotate",
    ),
    ("--dsa_strategy", strategy, DSA_STRATEGY, "its entries, joined by _, or none"),
]

# What names a PDD+MTT experiment's folder, for distillation and evaluation.
EXPERIMENT = [
    (
        "--model",
        network_name,
        "ConvNet",
        "network of the distillation: ConvNet, ConvNetD1 to D8, ConvNetW32 to W1024, VGG11, ResNet18, AlexNet, …",
    ),
    ("--ipc", COUNT, 1, "images of each class that every stage learns"),
    ("--eval_mode", tuple("SMWDAPNC"), "S", EVAL_MODE),
    ("--expert_epochs", COUNT, 3, "expert epochs from start to target"),
    ("--syn_steps", COUNT, 20, "student steps in one iteration"),
    ("--max_start_epoch", COUNT, 25, "number of possible start epochs"),
    ("--lr_img", POSITIVE, 1000, "learning rate of the images"),  # an int: see experiment_folder
    ("--lr_lr", RATE, 1e-05, "learning rate of syn_lr; 1e-05 from stage 2 on for CIFAR10 at --ipc 1"),
    ("--lr_teacher", POSITIVE, 0.01, "learning rate of the experts; where syn_lr starts"),
    ("--batch_real", COUNT, 256, UNUSED),
    ("--batch_syn", COUNT, None, "images in a student's minibatch (default: classes x ipc)"),
    ("--batch_train", COUNT, 256, "images in any other minibatch"),
    ("--texture", FLAG, False, "learn canvases that are shown in random windows"),
    ("--canvas_size", COUNT, 2, "images on each side of a canvas"),
    ("--canvas_samples", COUNT, 1, "windows of each canvas in a minibatch"),
    ("--tag", str, "", "end of the experiment folder's name"),
]


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


def match_config(args, real, dsa):
    """Return how trajectories are matched."""
    return TrajectoryMatchConfig(
        batch_syn=args.batch_syn or real.info.num_classes * args.ipc,
        syn_steps=args.syn_steps,
        expert_epochs=args.expert_epochs,
        max_start_epoch=args.max_start_epoch,
        first_start_epoch=args.start_sampling_epoch,
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

"""The options that several scripts share, declared once, and a parser whose refusals are one line.

Names and defaults are those of the published code (MTT, IDC and PDD). Options declared here are only parsed by the
scripts; nothing else in utils/ reads them.
"""

import argparse
import math

import networks
from utils import datasets, distributed
from utils.errors import UserError

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"
# Options that may differ between a run and its continuation: they do not change the results.
FREE = (
    "device",
    "wandb",
    "checkpoint_minutes",
    "data_path",
    "buffer_path",
    "root_log_dir",
    "start_interval",
    "load_all",
    "override_experiment_path",
    "save_dir",
    "kept_steps",
    "slice_size",
    "compile",
    "dry_run",
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows every default and whose refusals are one line with exit status 2."""

    def __init__(self, description, epilog=None):
        super().__init__(description=description, epilog=epilog, formatter_class=_Formatter)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def _print_message(self, message, file=None):
        if distributed.is_first():
            super()._print_message(message, file)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and appends the default of each option that has one."""

    def _get_help_string(self, action):
        known = action.default in (None, "") or "(default" in (action.help or "")
        return action.help if known else super()._get_help_string(action)


def number(kind, low=None, high=None, above=None):
    """Return a parser of one int or float within bounds.

    Args:
        kind: int or float.
        low: smallest allowed value.
        high: largest allowed value.
        above: the value must be larger than this.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        wanted = "a whole number" if kind is int else "a number"
        if low is not None:
            wanted += f" >= {low}"
        if above is not None:
            wanted += f" > {above}"
        if high is not None:
            wanted += f" <= {high}"
        wrong = not math.isfinite(value)
        wrong = wrong or (low is not None and value < low) or (high is not None and value > high)
        if wrong or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
        return value

    return parse


COUNT = number(int, low=1)
NATURAL = number(int, low=0)
RATE = number(float, low=0.0)
POSITIVE = number(float, above=0.0)
FRACTION = number(float, low=0.0, high=1.0)


def truth(text):
    """Parse True or False, as the published scripts spell their switches."""
    if str(text).lower() in ("true", "1", "yes"):
        return True
    if str(text).lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def network_name(text):
    """Parse the name of a network of the MTT family."""
    if text not in networks.NAMES:
        raise argparse.ArgumentTypeError(f"unknown network {text!r}; known: {', '.join(networks.NAMES)}")
    return text


def network_list(text):
    """Parse names of networks of both families joined by commas; `self` is the distillation's own."""
    known = ("self", *networks.NAMES, *networks.IDC_NAMES)
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown network {unknown[0]!r}; known: {', '.join(known)}")
    return names


def strategy(text):
    """Parse a DSA strategy: names joined by underscores, or none."""
    known = DSA_STRATEGY.split("_")
    if text.lower() == "none" or all(name in known for name in text.lower().split("_")):
        return text.lower()
    raise argparse.ArgumentTypeError(f"expected names out of {', '.join(known)} joined by _, found {text!r}")


def add_data(parser):
    """Declare which pictures are used; returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="CIFAR10", choices=datasets.NAMES, help="data set; folder: own pictures")
    group.add_argument("--subset", default="imagenette", help="of ImageNet: a name, or a file that lists class folders")
    group.add_argument("--res", type=COUNT, help=f"pixels of ImageNet and own pictures (default: {datasets.RES})")
    group.add_argument("--data_path", default="data", help="folder of the data set; downloaded there where possible")
    group.add_argument("--zca", action="store_true", help="ZCA whitening instead of mean and standard deviation")
    return group


def load_data(options, device):
    """Load the data set that `add_data`'s options name."""
    return datasets.load(
        options.dataset, options.data_path, device, options.zca, subset=options.subset, res=options.res
    )


def place(options):
    """Return where results of this data set lie below the root of all results."""
    return datasets.place(options.dataset, options.data_path, options.subset, options.res)


def add_augmentation(group):
    """Declare differentiable Siamese augmentation (DSA)."""
    group.add_argument("--dsa", type=truth, default=True, help="differentiable Siamese augmentation")
    group.add_argument("--dsa_strategy", type=strategy, default=DSA_STRATEGY, help="its entries, joined by _, or none")


def add_selection(group):
    """Declare the pictures that accuracies inside a stage are measured on."""
    group.add_argument(
        "--select_on",
        choices=("test", "val"),
        default="test",
        help="accuracies inside a stage: on the test set, as published, or on held-out training pictures",
    )
    group.add_argument(
        "--val_fraction", type=FRACTION, default=0.1, help="share of the training pictures held out by --select_on val"
    )


def select(options, real):
    """Return `real` with the pictures held out that --select_on asks for."""
    return real.held_out(options.val_fraction) if options.select_on == "val" else real


def add_machine(parser, minutes=True):
    """Declare device, seed and how the run reports and saves itself; returns the group."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a device name")
    group.add_argument("--seed", type=NATURAL, default=0, help="seed of every random decision")
    if minutes:
        group.add_argument(
            "--checkpoint_minutes", type=RATE, default=10.0, help="minutes between two saves of the run's state"
        )
    group.add_argument("--dry_run", action="store_true", help="print options, inputs, outputs and sizes, then stop")
    return group


def add_wandb(group):
    """Declare the optional logging to Weights & Biases."""
    group.add_argument(
        "--wandb", default="disabled", choices=("disabled", "online", "offline"), help="log to Weights & Biases"
    )


def check_network(name, real):
    """Build network `name` once for the pictures of `real`, to refuse impossible pairs before any work.

    Raises:
        UserError: the pictures are too small for it.
    """
    try:
        networks.get_network(name, real.channel, real.num_classes, real.im_size)
    except ValueError as error:
        raise UserError(f"network {name} on {real.name}: {error}") from None


def kept_steps(text):
    """Parse --kept_steps: auto or a whole number >= 0."""
    return text if text == "auto" else NATURAL(text)


def add_eval_mode(group, default):
    """Declare the pools of networks to evaluate with."""
    group.add_argument(
        "--eval_mode",
        default=default,
        choices=tuple("SMWDAPNC"),
        help="networks to evaluate with: S the same, M many, W widths, D depths, A activations, P poolings, "
        "N normalisations, C the same and ConvNet",
    )


def add_eval_models(group):
    """Declare a list of networks to evaluate with."""
    group.add_argument(
        "--eval_models",
        type=network_list,
        help="networks to evaluate with, joined by commas, instead of a pool: self (the distillation's own), "
        f"{', '.join(networks.IDC_NAMES)}, or a name that --model knows",
    )


def add_experiment(group):
    """Declare the options of PDD+MTT that name the experiment's folder, for distillation and evaluation."""
    group.add_argument(
        "--model",
        type=network_name,
        default="ConvNet",
        help="network of the distillation: ConvNet, ConvNetD1 to D8, ConvNetW32 to W1024, VGG11, ResNet18, AlexNet, …",
    )
    group.add_argument("--ipc", type=COUNT, default=1, help="pictures of each class that every stage learns")
    add_eval_mode(group, "S")
    group.add_argument("--expert_epochs", type=COUNT, default=3, help="expert epochs from start to target")
    group.add_argument("--syn_steps", type=COUNT, default=20, help="student steps in one iteration")
    group.add_argument("--max_start_epoch", type=COUNT, default=25, help="number of possible start epochs")
    group.add_argument("--lr_img", type=POSITIVE, default=1000.0, help="learning rate of the pictures")
    group.add_argument(
        "--lr_lr",
        type=RATE,
        default=1e-05,
        help="learning rate of syn_lr; 1e-05 from stage 2 on for CIFAR10 at --ipc 1",
    )
    group.add_argument("--lr_teacher", type=POSITIVE, default=0.01, help="of the experts; where syn_lr starts")
    group.add_argument("--batch_real", type=COUNT, default=256, help="accepted for old commands; not used")
    group.add_argument("--batch_syn", type=COUNT, help="pictures in a student's minibatch (default: classes x ipc)")
    group.add_argument("--batch_train", type=COUNT, default=256, help="pictures in any other minibatch")

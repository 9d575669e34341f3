"""Command-line options: a parser whose refusals are one line, value types, and the options that scripts share.

Names and defaults are those of the published code (MTT, IDC and PDD). An option is a row of a table:
(names, type, default, help); the type is a function of the text, a tuple of choices, or FLAG.
"""

import argparse
import difflib
import math
import sys

import torch

import networks
from networks.precision import PRECISIONS

from .. import training
from ..augment import OPERATIONS
from ..run import distributed
from ..run.errors import UserError
from ..run.files import human_bytes
from ..run.log import log0

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"
FEW_STEPS, SMALL_BATCH = 10, 16  # of an epoch; images that a minibatch can have without a warning
UNUSED = "unused"  # start of the help of options that change nothing, which --help leaves out
# Options that may change between a run and its continuation, because results do not depend on them.
RESUMABLE_CHANGES = (
    "device", "wandb", "checkpoint_minutes", "dry_run",
    # PDD+MTT
    "data_path", "buffer_path", "root_log_dir", "start_interval", "override_experiment_path", "save_dir", "save_path",
    "kept_steps", "slice_size", "compile",
    # PDD+IDC
    "data_dir", "imagenet_dir", "results", "override_save_dir", "override_load_dir", "workers", "print_freq", "time",
    "name", "transition_batch", "pretrain", "phase", "nclass_sub",
)  # fmt: skip
# Raised when a change of the code gives a run of the same options another result; a run is not continued across it.
BEHAVIOUR = 2
# Of options that folders of earlier versions do not name.
CONFIG_DEFAULTS = {"select_on": "test", "bf16": False, "precision": "fp32", "drop_easy": 0.0}
# The same options under other names in other scripts.
COUNTERPARTS = (
    ("--res", "--size"), ("--data_path", "--data_dir"), ("--model", "--net_type"), ("--pix_init", "--init"),
    ("--root_log_dir", "--save_path"), ("--root_log_dir", "--results"), ("--save_path", "--results"),
    ("--num_eval", "--repeat"), ("--Iteration", "--niter"),
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows every default and whose refusals are one line with exit status 2.

    Names of options may be spelled with - or _, whichever their tables use.
    """

    def __init__(self, description=None, **settings):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def _print_message(self, message, file=None):
        if distributed.is_rank0():
            super()._print_message(message, file)

    def parse_known_args(self, args=None, namespace=None):
        declared = {name.replace("-", "_"): name for name in self._option_string_actions if name.startswith("--")}

        def respell(word):
            name, equals, value = word.partition("=")
            return declared.get(name.replace("-", "_"), name) + equals + value

        return super().parse_known_args([*map(respell, sys.argv[1:] if args is None else args)], namespace)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
            near = [other for pair in COUNTERPARTS if name in pair for other in pair if other != name]
            near = [other for other in near if other in self._option_string_actions]
            near = near or difflib.get_close_matches(name, self._option_string_actions, 1, cutoff=0.7)
            meant = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found

    def add_options(self, title, rows):
        """Add a group of options from a table; a fifth column holds further arguments of `add_argument`."""
        group = self.add_argument_group(title)
        for names, kind, default, text, *more in rows:
            if kind is FLAG:
                settings = {"action": "store_true"}
            elif isinstance(kind, tuple):
                settings = {"choices": kind, "default": default}
            else:
                settings = {"type": kind, "default": default}
            if kind is truth:
                settings["metavar"] = "{True,False}"
            if text.startswith(UNUSED):
                text = argparse.SUPPRESS
                self.epilog = (
                    "Options of the published code that change nothing are accepted; scripts/README.md lists them."
                )
            group.add_argument(*names.split(), help=text, **settings, **(more[0] if more else {}))

    def given(self):
        """Return the options that stand on the command line, as a dict."""
        absent = object()
        found = self.parse_args(namespace=argparse.Namespace(**{action.dest: absent for action in self._actions}))
        return {name: value for name, value in vars(found).items() if value is not absent}

    def refuse(self, names, where):
        """Refuse the options `names` on the command line: they would change nothing, `where` says when."""
        for name in self.given():
            if name in names:
                self.error(f"--{name}: changes nothing {where}; leave it out")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and appends the default of each option that has one."""

    def _get_help_string(self, action):
        known = action.default in (None, "", -1) or "(default" in (action.help or "")
        return action.help if known else super()._get_help_string(action)


# Types ----------------------------------------------------------------------------------------------------------------

FLAG = "flag"


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """Return a parser of one int or float (`kind`) in [low, high] that is larger than `above`."""
    bounds = [f"{sign} {bound}" for sign, bound in ((">=", low), (">", above), ("<=", high)) if math.isfinite(bound)]
    wanted = " ".join(["a whole number" if kind is int else "a number", *bounds])

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
        return value

    return parse


COUNT = number(int, low=1)
NATURAL = number(int, low=0)
FROM_MINUS_ONE = number(int, low=-1)
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


def network_name(text, known=tuple(networks.NAMES)):
    """Parse the name of a network of the MTT family, in any case of its letters."""
    names = [name for name in known if name.lower() == text.lower()]
    if not names:
        raise argparse.ArgumentTypeError(f"unknown network {text!r}; known: {', '.join(known)}")
    return text if text in names else names[0]


def network_list(text):
    """Parse names of networks of both families joined by commas; `self` is the distillation's own."""
    known = ("self", *networks.NAMES, *networks.IDC_NAMES)
    return list(dict.fromkeys(network_name(name, known) for name in text.split(",")))


def lengths(text):
    """Parse numbers of epochs joined by commas; returns a list of int."""
    return sorted({COUNT(word) for word in text.split(",")})


def strategy(text):
    """Parse a DSA strategy: names joined by underscores, or none."""
    if text.lower() == "none" or all(name in OPERATIONS for name in text.lower().split("_")):
        return text.lower()
    raise argparse.ArgumentTypeError(f"expected names out of {', '.join(OPERATIONS)} joined by _, found {text!r}")


# Tables that several scripts share ------------------------------------------------------------------------------------

MACHINE = [
    ("--device", str, "auto", "auto (cuda, then mps, then cpu) or a device name"),
    ("--precision", PRECISIONS, "fp32", "bf16: convolutions and the tensors between layers in bfloat16, quicker if the "
     "device has units for it and no longer exact"),
    ("--checkpoint_minutes", RATE, 10.0, "minutes between two saves of a learning loop's state"),
    ("--dry_run", FLAG, False, "print options, inputs, outputs and sizes, then stop"),
]  # fmt: skip
SEED = [("--seed", NATURAL, 0, "seed of every random decision")]
WANDB = [("--wandb", ("disabled", "online", "offline"), "disabled", "log to Weights & Biases")]

SELECT_ON = [
    (
        "--select_on",
        ("test", "val"),
        "test",
        "accuracies inside a stage: on the test set, as published, or on held-out training images",
    ),
    ("--val_fraction", FRACTION, 0.1, "share of the training images held out by --select_on val"),
]

DROP_EASY = [
    (
        "--drop_easy",
        FRACTION,
        0.0,
        "share of each class's real images, the easiest by forgetting events, that the last stage does without; "
        "earlier stages in proportion, the first none",
    )
]

EVAL_MODE = (
    "networks to evaluate with: S the same, M many, W widths, D depths, A activations, P poolings, N normalisations, "
    "C the same and ConvNet"
)
EVALUATION = [
    (
        "--eval_models",
        network_list,
        None,
        "networks to evaluate with, joined by commas, instead of a pool: self (the distillation's own), "
        f"{', '.join(networks.IDC_NAMES)}, or a name that --model of buffer_mtt.py knows",
    ),
    ("--skip_random", FLAG, False, "no row for random real images"),
    ("--skip_full", FLAG, False, "no row for the full training set"),
    ("--eval_epochs", lengths, None, "other numbers of epochs on every union to evaluate with, joined by commas"),
    ("--full_epochs", COUNT, 50, "epochs on the full training set"),
    ("--full_networks", COUNT, 1, "networks trained on the full training set"),
]

# What the scripts do with these options -------------------------------------------------------------------------------


def refuse_other_behaviour(folder, content, complete):
    """Refuse to continue a run that an earlier version of the code began.

    Args:
        folder: the run's.
        content: what its config.json holds.
        complete: nothing is left to do.

    Raises:
        UserError: it would be continued with another meaning of the same options.
    """
    if not complete and content.get("behaviour", 1) != BEHAVIOUR:
        raise UserError(
            f"{folder}: begun by an earlier version, which trained, augmented and initialised in other ways for "
            "these options; choose another folder or --tag, or remove this one to begin anew"
        )


def config_of(args):
    """Return the options that results depend on, as a dict."""
    return {name: value for name, value in vars(args).items() if name not in RESUMABLE_CHANGES}


def held_out_fraction(args):
    """Return which fraction of the training images --select_on holds out."""
    return args.val_fraction if args.select_on == "val" else 0.0


def held_out(args, real):
    """Return `real` with the images held out that --select_on asks for.

    Raises:
        UserError: it asks for none of them.
    """
    if args.select_on == "val" and not args.val_fraction:
        raise UserError("--select_on val: expected --val_fraction above 0, found 0; leave it out for a tenth")
    return real.held_out(held_out_fraction(args))


def smallest_batch(sets, batch_size):
    """Return how many images the smallest minibatch of an epoch on one of `sets` has."""
    return min(len(images) % batch_size or batch_size for images in sets)


def check_network(spec, real, title=None, smallest=None):
    """Build a network once for the images of `real`, to refuse impossible pairs before any work.

    Args:
        spec: as for `training.new_network`.
        title: of the network, for the message, if `spec` is not its name.
        smallest: images of the smallest minibatch that it will be trained on, if they can be too few.

    Raises:
        UserError: the images are too small for it, or too few.
    """
    try:
        network = training.new_network(spec, real, 0)
        if smallest:
            with torch.no_grad():
                network.train()(real.train.batch(slice(min(smallest, 2)))[0])  # two are enough for any
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"network {title or spec} on {real.info.name}: {error}") from None


def warn_of_few_images(real, batch_size=None, ipc=None):
    """Warn if an epoch has very few steps, or if the stages learn more images than a class has.

    Args:
        real: `RealData`.
        batch_size: real images in a minibatch; None leaves the first warning out.
        ipc: images of each class that all stages learn together; None leaves the second one out.
    """
    steps = -(-len(real.train) // batch_size) if batch_size else FEW_STEPS
    if steps < FEW_STEPS and batch_size > SMALL_BATCH:
        log0(
            f"warning: an epoch of {len(real.train)} images has {steps} steps: experts learn slowly and matching may "
            "diverge; lower --batch_train (16, say), raise --train_epochs, and distil with --lr_lr 1e-06 --lr_img 100"
        )
    if ipc and ipc > (fewest := real.smallest_class):
        log0(f"warning: the stages learn {ipc} images of each class, more than the {fewest} real ones that a class has")


def dry_run(args, inputs, output, size):
    """Return what a run would do, in lines: its options, `inputs` {what: path}, `output` folder and `sizes.Size`."""
    lines = [f"option  {name} = {value}" for name, value in vars(args).items()]
    lines += [f"input   {what}: {path}" for what, path in inputs.items()]
    return "\n".join([*lines, f"output  {output}", f"steps   {size.steps}", f"disk    {human_bytes(size.disk)}"])

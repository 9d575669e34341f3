"""The options of PDD+DM: those of PDD+IDC but for its networks, which are experts of buffer_mtt.py, and its matching.

Images are normalised as the experts saw them.
"""

from pathlib import Path

from ..augment import DSA
from ..data import datasets
from ..feature_matching import METRICS, FeatureMatchConfig
from ..results import names
from . import COUNT, FRACTION, POSITIVE, RATE, UNUSED, idc, network_name
from .idc import data_folder, dataset_subdir, subset, train_config  # noqa: F401 - of this method, too

NETWORK = [
    ("--model", network_name, "ConvNet", "network"),
    ("--buffer_path", str, "./buffers", "root folder of the experts that buffer_mtt.py recorded"),
]
MATCHING = [
    idc.AUG_TYPE,
    ("--metric", METRICS, "mean", "distance of features: of their means, or of their characteristic functions"),
    ("--cf_alpha", FRACTION, 0.5, "--metric cf: weight of the amplitudes; the rest is that of the phases"),
    (
        "--calibration",
        RATE,
        0.0,
        "weight of the synthetic images' cross-entropy under a finished expert; 0.5 in scripts/reproduce.py",
    ),
    ("--window", ("all", "stage"), "all", "epochs of the experts that a stage sees: all, or its part of them"),
    (
        "--transition",
        ("experts", "union"),
        "experts",
        "networks to match with: between two epochs of an expert, or trained on the earlier unions as PDD+IDC's",
    ),
    ("--Iteration", COUNT, 1000, "iterations of a stage"),
    ("--eval_it", COUNT, 1000, "iterations between two evaluations in a stage"),
    ("--inner_loop", COUNT, 100, "--transition union: iterations with one network"),
    *[(names, kind, default, f"--transition union: {text}") for names, kind, default, text in idc.STUDENT],
    idc.BATCH_REAL,
    ("--lr_img", POSITIVE, 0.01, "learning rate of the images (Adam), which falls to 0 as a cosine"),
]
SPEED = [(names, kind, default, f"--transition union: {text}") for names, kind, default, text in idc.SPEED]
OF_UNIONS = ("inner_loop", *(names.lstrip("-") for names, *_ in idc.STUDENT + idc.SPEED))


def add_options(parser):
    """Declare the options that distillation and evaluation share."""
    replaced = {"network": NETWORK, "matching": [*MATCHING, *idc.SEED]}
    for title, rows in (idc.OPTIONS | replaced).items():
        parser.add_options(title, [row for row in rows if row[0] != "--time" and not row[3].startswith(UNUSED)])


def resolve(parser):
    """Parse the command line; returns the namespace with derived settings in it, as PDD+IDC's `resolve` does."""
    args, derive = idc.resolve_data(parser)
    idc.resolve_training(args, derive)
    derive(epochs=idc.evaluation_epochs(args.dataset, args.factor**2 * args.ipc, args.nclass >= 100))
    return args


def load_data(args, device):
    """Load the data set that the options name, normalised as for buffer_mtt.py."""
    antialias = args.dataset != "imagenet"  # as the experts saw them
    return datasets.load(args.data, data_folder(args), device, subset=subset(args), res=args.size, antialias=antialias)


def expert_subdir(args):
    """Return where the experts of the data set lie below --buffer_path."""
    return datasets.dataset_subdir(args.data, data_folder(args), subset(args), args.size)


def result_folder(args):
    """Return the folder that a distillation with these options writes."""
    if args.override_save_dir:
        return Path(args.override_save_dir)
    root = Path(args.results)
    return root / "test" if args.test else root / dataset_subdir(args) / (args.name or names.dm_folder(vars(args)))


def network_spec(args):
    """Return the name of the distillation's network."""
    return args.model


network_title = network_spec  # what reports call it


def match_config(args):
    """Return how features are matched."""
    return FeatureMatchConfig(
        augment=DSA(args.aug_type, "idc"),
        factor=args.factor,
        decode_type=args.decode_type,
        batch_real=args.batch_real,
        metric=args.metric,
        cf_alpha=args.cf_alpha,
        precision=args.precision,
        calibration=args.calibration,
    )

"""Evaluate PDD+IDC or PDD+DM: train networks on the decoded union of stage 1, then of stage 2, …, and test them.

    python evaluate_idc.py --reproduce -d cifar10 -f 2 --ipc 2 --data_dir data --tag progressive --niter 2000

    # PDD+DM
    python evaluate_idc.py --method dm -d cifar10 -f 2 --ipc 2 --metric cf --calibration 0.5

Takes the options of the distillation, whose folder it finds by them, or --override-load-dir FOLDER; published
`interval_*_data.pt` files are read as they are. Prints a table and writes report.json and accuracy.png beside them.
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
import itertools
from pathlib import Path

import networks
from utils import multi_formation, options, sizes, stages, training
from utils.evaluation import EvalModel, Evaluation, evaluate_and_report
from utils.options import FLAG, Parser, dm, idc
from utils.results import known, names
from utils.results.other_methods import LOADERS
from utils.results.provenance import check_result
from utils.run import files
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.run.log import print0
from utils.run.main import run_script
from utils.synthetic import SyntheticSet, idc_path, load_idc

SLOW_FROM = 5  # from the union of this index on the learning rate is halved, if another one follows it
OOM_ADVICE = "--batch_size, other --eval_models or a smaller --width"
# Networks to evaluate with if none are named, by data set.
POOL = ["self", "resnet10", "resnet18", "densenet"]
POOLS = {"imagenet": ["self", "resnet18", "efficientnet"], "tiny-imagenet": ["self", "resnet18"], "digits": ["self"]}

METHODS = {"idc": idc, "dm": dm}
EVALUATION = [
    ("--method", tuple(METHODS), "idc", "base method of the distillation"),
    ("--new_only", FLAG, False, "train on the newest subset of each stage only"),
    ("--last_only", FLAG, False, "train on the last union only"),
    ("--same_compute", options.truth, False, "divide the epochs by factor^2, so that packed images take no more steps"),
    ("--checks", options.COUNT, 50, "test accuracies measured in each stage: the last and the best are reported"),
    ("--eval_mode", tuple("SMWDAPNC"), None, options.EVAL_MODE),
]  # fmt: skip


def parse():
    parser, first = Parser(__doc__), Parser(add_help=False)
    first.add_options("", EVALUATION[:1])
    method = METHODS[first.parse_known_args()[0].method]  # which other options there are
    method.add_options(parser)
    parser.add_options("evaluation", options.EVALUATION + EVALUATION)
    parser.add_options("machine", options.MACHINE)
    args = method.resolve(parser)
    if args.slct_type in LOADERS and not args.override_load_dir:
        parser.error(f"-s {args.slct_type}: expected its file with --override-load-dir FILE, found none")
    if args.new_only and args.last_only:
        parser.error("--new_only together with --last_only: choose one")
    if "epochs" not in parser.given():
        args.epochs = 1000 if args.last_only or args.new_only else 500
    if not args.eval_models:
        pool = networks.eval_pool(args.eval_mode, "self") if args.eval_mode else POOLS.get(args.dataset, POOL)
        args.eval_models = pool
    return args


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    method = METHODS[args.method]
    real = method.load_data(args, device)
    read = read_other if args.slct_type in LOADERS else read_idc
    inputs, unions, datasets, select_on = read(args, real, device)
    folder = report_folder(args)
    trained_on = [*datasets] if args.skip_full else [*datasets, real.train]
    smallest = options.smallest_batch(trained_on, args.batch_size)
    models = [eval_model(name, args, real, unions, smallest) for name in args.eval_models]
    if args.dry_run:
        size = sizes.idc_evaluation(vars(args), real.info, len(real.train))
        inputs = {"data": idc.data_folder(args)} | inputs
        print0(options.dry_run(args, inputs, folder / "report.json", size))
        return
    totals = [len(union) // real.info.num_classes for union in unions]
    begins = itertools.accumulate([0, *totals]) if args.new_only else [0] * len(totals)
    ranges = [(begin, begin + total) for begin, total in zip(begins, totals, strict=False)]
    if args.slct_type == "random":
        datasets = stages.random_unions(real, ranges, args.seed, ("selected",))
    evaluation = Evaluation(
        real=real,
        unions=datasets,
        ipc_totals=totals,
        random_ranges=ranges,
        stages=list(range(args.num_intervals + 1 - len(totals), args.num_intervals + 1)),
        folder=folder,
        seed=args.seed,
        config=options.config_of(args),
        random=not args.skip_random,
        full_networks=0 if args.skip_full else args.full_networks,
        checks=args.checks,
    )
    dataset, own = names.dataset_title(args.data, idc.dataset_subdir(args)), method.network_title(args)
    with files.locked(folder):
        evaluate_and_report(evaluation, models, own, dataset=dataset, select_on=select_on, keeps="last")


def result_folder(args):
    """Return the folder of the result."""
    if args.slct_type in LOADERS:  # a file of another method
        path = Path(args.override_load_dir)
        return path.with_name(f"{path.stem}_evaluation")
    return Path(args.override_load_dir) if args.override_load_dir else METHODS[args.method].result_folder(args)


def report_folder(args):
    """Return the folder that receives the report; random real images in place of a result have one beside it."""
    folder = result_folder(args)
    return folder.absolute().with_name(f"{folder.absolute().name}_random") if args.slct_type == "random" else folder


def read_idc(args, real, device):
    """Read the unions of a result; returns ({what: file}, unions, decoded datasets, what they were selected on)."""
    folder = result_folder(args)
    names.check_stages(folder, names.idc_stages(folder), args.num_intervals)
    check_result(folder, real.info)
    known.refuse_other_making(folder, method=args.method, factor=args.factor, decode_type=args.decode_type)
    if "self" in args.eval_models and args.slct_type != "random":
        network = ["model"] if args.method == "dm" else ["net_type", "depth", "width", "norm_type"]
        try:
            known.refuse_other_making(folder, **{name: getattr(args, name) for name in network})
        except UserError as error:
            raise UserError(f"{error}, or name other networks with --eval_models") from None
    learned = range(args.num_intervals if args.last_only else 1, args.num_intervals + 1)
    ipc = args.ipc if args.ipc > 0 else None
    unions = [load_idc(folder, stage, real.info, ipc, device) for stage in learned]
    if args.ipc < 1:  # not needed to find the folder
        args.ipc = len(unions[0]) // real.info.num_classes // learned[0]
    if args.new_only:
        unions = [union.subset(stage) for stage, union in zip(learned, unions, strict=True)]
    select_on = names.selected_on([names.read_idc_stage(folder, stage) for stage in learned])
    inputs = {f"stage {stage}": idc_path(folder, stage) for stage in learned}
    return inputs, unions, [decoded(union, args, real) for union in unions], select_on


def read_other(args, real, device):
    """Read the set of another method (-s dsa, kip) from its file; returns what `read_idc` does."""
    images, labels = LOADERS[args.slct_type](Path(args.override_load_dir), real.info)
    union = SyntheticSet(images.to(device), labels.to(device))
    args.ipc, args.num_intervals = len(union) // real.info.num_classes, 1
    data = real.pixel_dataset(real.info.to_pixels(union.images), union.labels)
    return {args.slct_type: args.override_load_dir}, [union], [data], "unknown"


def decoded(union, args, real):
    """Return the decoded images of a `SyntheticSet` to train on; as published, `bound` ones are decoded as `single`."""
    kind = "single" if args.decode_type == "bound" else args.decode_type
    images = union.by_class(real.info.num_classes)
    return real.pixel_dataset(*multi_formation.decode_union(images, args.factor, kind))


def eval_model(name, args, real, unions, smallest=None):
    """Return the `EvalModel` of one architecture."""
    if name == "self":
        title, spec = METHODS[args.method].network_title(args), METHODS[args.method].network_spec(args)
    else:
        title = spec = name
    options.check_network(spec, real, title, smallest)
    # Random real images are not packed: as many epochs are as much work.
    packed = args.same_compute and args.slct_type != "random"
    epochs = max(1, args.epochs // args.factor**2) if packed else args.epochs

    def configs(epochs):
        slow = [index >= SLOW_FROM and len(unions) > SLOW_FROM + 1 for index in range(len(unions))]
        return [idc.train_config(args, epochs, lr_factor=0.5 if late else 1.0) for late in slow]

    def save(k, network):
        files.save(report_folder(args) / f"evaluated_{title}_{k}.pt", training.state_on_cpu(network))

    return EvalModel(
        name=title,
        network=lambda k: training.new_network(spec, real, args.seed, "evaluated", title, k),
        count=args.repeat,
        configs={
            "distilled": configs(epochs),
            "random": configs(args.epochs),
            "full": [idc.train_config(args, args.full_epochs)],
            **{f"{other} epochs": configs(other) for other in args.eval_epochs or ()},
        },
        save=save if args.save_ckpt else None,
    )


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

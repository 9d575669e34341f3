"""Evaluate PDD+MTT: train networks on the union of stage 1, then of stage 2, … P, and test them after each.

    python evaluate_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 \\
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 \\
        --override_load_path CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca \\
        --save_path logged_files --epoch_eval_train 500

Prints a table and writes report.json and accuracy.png into the experiment's folder. Beside each network stand two
reference rows: the same network trained on as many random real images, and on the full training set. Sets with soft
labels have two more: their images with hard labels, and the random real images with an expert's soft labels.

Networks of the distillation's architecture start as the experts that were matched, as published; so they are also
evaluated from random initialisations (fresh start, the headline), and on the last union alone, for as many epochs as
all stages take.
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
import dataclasses
import functools
import itertools

import networks
from networks.reparam import set_flat
from utils import options, sizes, training
from utils.augment import DSA
from utils.evaluation import EvalModel, Evaluation, evaluate_and_report
from utils.options import COUNT, FLAG, RATE, UNUSED, Parser, mtt
from utils.results import known, names
from utils.results.provenance import check_data, check_result
from utils.run import files
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.run.log import log0, print0
from utils.run.main import run_script
from utils.stages import evaluation_config, soft_labels_of_stages
from utils.synthetic import load_mtt
from utils.trajectories import Experts, find_buffers, recorded_fingerprint

OOM_ADVICE = "--batch_train or a narrower --model"

STAGES = [
    ("--num_intervals", COUNT, 2, "stages P"),
    ("--save_path", str, "logged_files", "root folder of the results"),
    ("--override_load_path", str, None, "name of the experiment's folder, instead of the one that the options give"),
    ("--override_interval_names", str, None, "names of the stages' folders, joined by dots"),
]
EVALUATION = [
    ("--num_experts", COUNT, 100, "networks of the distillation's architecture for each row"),
    ("--num_eval", COUNT, 5, "networks of every other architecture for each row"),
    ("--epoch_eval_train", COUNT, 1000, "epochs on every union"),
    ("--dsa_strategy", options.strategy, options.DSA_STRATEGY, "augmentation; none for none"),
    ("--buffer_path", str, "buffers", "experts whose first parameters the networks start from"),
    ("--stage_lr", mtt.factors, None, "factors on syn_lr of each stage, joined by commas (SeqMatch; default: 1)"),
    ("--skip_fresh", FLAG, False, "no rows for fresh starts beside matched ones, and for the last union alone"),
    ("--mom", RATE, 0.0, UNUSED),
    ("--l2", RATE, 0.0, UNUSED),
    ("--save_interval", COUNT, 10, UNUSED),
    ("--save_model", FLAG, False, "save the trained networks' parameters"),
    ("--save_model_prefix", str, "model", "start of their file names"),
]


def parse():
    parser = Parser(__doc__)
    parser.add_options("data", mtt.DATA)
    parser.add_options("experiment", mtt.EXPERIMENT + STAGES)
    parser.add_options("evaluation", options.EVALUATION + EVALUATION)
    parser.add_options("machine", options.MACHINE + options.SEED)
    args = parser.parse_args()
    mtt.check_stages(parser, args, first_ones=True)
    return args


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    experiment = experiment_folder(args)
    given = args.override_interval_names.split(".") if args.override_interval_names else None
    folders = names.find_mtt_stages(experiment, args.num_intervals, given)
    real = mtt.load_data(args, device)
    check_result(experiment, real.info)
    known.refuse_other_making(experiment, zca=args.zca, model=args.model)
    canvas = args.canvas_size if args.texture else 1
    unions = [load_mtt(folder, "best", device, real.info, canvas) for folder in folders]
    totals = [len(union) // real.info.num_classes for union in unions]
    if not given:
        check_ipc(args, experiment, totals)
    pool, trained_on = pool_of(args), unions if args.skip_full else [*unions, real.train]
    for model in pool:
        options.check_network(model, real, smallest=options.smallest_batch(trained_on, args.batch_train))
    summaries = [names.read_mtt_stage(folder) for folder in folders]
    if args.dry_run:
        inputs = {"data": args.data_path} | {f"stage {stage}": folder for stage, folder in enumerate(folders, 1)}
        size = sizes.mtt_evaluation(vars(args), real.info, len(real.train), pool)
        print0(options.dry_run(args, inputs, experiment / "report.json", size))
        return
    with files.locked(experiment):
        starts = find_starts(args, real)
        evaluation = Evaluation(
            real=real,
            unions=[union.dataset() for union in unions],
            ipc_totals=totals,
            # A canvas has the pixels of several images.
            random_ranges=[(0, total * canvas**2) for total in totals],
            stages=list(range(1, len(unions) + 1)),
            folder=experiment,
            seed=args.seed,
            config={**options.config_of(args), "starts": starts_digest(starts)},
            random=not args.skip_random,
            full_networks=0 if args.skip_full else args.full_networks,
        )
        if unions[-1].soft is not None:
            hard = [union.hard().dataset() for union in unions]
            soften = soft_labels_of(args, real, starts, folders, totals, summaries[-1])
            evaluation = dataclasses.replace(evaluation, hard_unions=hard, soften=soften)
        dataset = names.dataset_title(args.dataset, mtt.dataset_subdir(args))
        select_on = names.selected_on(summaries)
        models = [eval_model(name, args, real, unions, starts, experiment) for name in pool]
        evaluate_and_report(evaluation, models, args.model, dataset=dataset, select_on=select_on, keeps="best")


def check_ipc(args, experiment, totals):
    """Refuse an --ipc that is not that of a result whose unions hold `totals` images per class.

    Raises:
        UserError: it is not.
    """
    if [*itertools.accumulate(names.stage_ipcs(args.ipc, len(totals))[: len(totals)])] != totals:
        ipcs = [total - before for before, total in zip([0, *totals], totals, strict=False)]
        made = ipcs[0] if len(set(ipcs)) == 1 else ",".join(map(str, ipcs))
        given = ",".join(map(str, names.stage_ipcs(args.ipc, 1)))
        raise UserError(f"{experiment}: made with --ipc {made}, found --ipc {given}; give --ipc {made}")


def pool_of(args):
    """Return the names of the networks to evaluate with."""
    if args.eval_models:
        return list(dict.fromkeys(args.model if name == "self" else name for name in args.eval_models))
    return networks.eval_pool(args.eval_mode, args.model)


def experiment_folder(args):
    folder = mtt.experiment_folder(args, args.save_path)
    return folder.parent / args.override_load_path if args.override_load_path else folder


def find_starts(args, real):
    """Return the experts whose first parameters the networks start from; None if there are no buffers."""
    try:
        folder = find_buffers(args.buffer_path, mtt.dataset_subdir(args), args.model, args.zca)
    except UserError as error:
        log0(f"note: networks start from random initialisations ({error})")
        return None
    check_data(folder, recorded_fingerprint(folder), real.info)
    network = training.new_network(args.model, real, args.seed, "shape")
    return Experts(folder, [parameter.shape for parameter in network.parameters()], 1, args.model)


def starts_digest(starts):
    """Return what tells the experts `starts` (None: none) from others."""
    return files.digest([starts.parameters(k, 0) for k in range(len(starts))])[:12] if starts else "random"


def soft_labels_of(args, real, starts, folders, totals, summary):
    """Return the function of images that gives them labels as the learned ones started from; None without one."""
    if summary.get("soft_init") == "onehot":
        return None  # those are the hard labels
    temperature = summary.get("soft_temperature")
    missing = "note: no row of random real images with soft labels: it needs stage.json and the experts"
    if not starts or not isinstance(temperature, (int, float)):
        log0(f"{missing} (--buffer_path)")
        return None
    teacher = training.new_network(args.model, real, args.seed, "teacher")
    shapes = [parameter.shape for parameter in teacher.parameters()]
    try:
        experts = [starts, *(Experts(folder, shapes, 1, args.model) for folder in folders[:-1])]
    except UserError as error:
        log0(f"{missing} ({error})")
        return None

    vectors = [of_stage.parameters(0, of_stage.entries - 1) for of_stage in experts]
    return functools.partial(soft_labels_of_stages, teacher, vectors, totals, temperature)


def eval_model(name, args, real, unions, starts, experiment):
    """Return the `EvalModel` of one architecture."""
    dsa, own = DSA(args.dsa_strategy), name == args.model

    def fresh(k):
        return training.new_network(name, real, args.seed, "start", name, k)

    def network(k):
        network = fresh(k)
        if own and starts:
            set_flat(network, starts.parameters(k % len(starts), 0))
        return network

    def save(k, network):
        files.save(experiment / f"{args.save_model_prefix}_{name}_{k}.pt", training.snapshot(network))

    def union_configs(epochs, factors=args.stage_lr):
        lrs = [union.syn_lr * factor for union, factor in zip(unions, factors or [1] * len(unions), strict=True)]
        return [mtt.union_config(args, real, epochs, lr, dsa) for lr in lrs]

    def real_config(epochs):
        return evaluation_config(epochs, args.lr_teacher, args.batch_train, dsa, precision=args.precision)

    configs = {
        "distilled": union_configs(args.epoch_eval_train),
        "random": [real_config(args.epoch_eval_train)] * len(unions),
        "full": [dataclasses.replace(real_config(args.full_epochs), epochs=args.full_epochs)],
    }
    if own and starts and not args.skip_fresh:
        configs["fresh"] = configs["distilled"]
    if own and len(unions) > 1 and not args.skip_fresh:
        together = sum(config.epochs for config in configs["distilled"])
        configs["last union"] = union_configs(together - 1, factors=None)[-1:]  # one epoch more is run
    return EvalModel(
        name=name,
        network=network,
        count=args.num_experts if own else args.num_eval,
        configs=configs | {f"{epochs} epochs": union_configs(epochs) for epochs in args.eval_epochs or ()},
        save=save if args.save_model else None,
        fresh=fresh,
    )


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

"""Evaluate PDD+IDC: train networks on the decoded union of stage 0, then of stage 1, …, and test them after each.

    python evaluate_idc.py --reproduce -d cifar10 -f 2 --ipc 2 --data_dir data --tag progressive --niter 2000

Takes the options of the distillation, whose folder it finds by them, or --override-load-dir FOLDER; published
`interval_*_data.pt` files are read as they are. Prints a table and writes report.json and accuracy.png beside them.
"""

from pathlib import Path

import networks
import utils.options as o
from utils import distributed, files, formation, idc, idc_options, progressive, report, training
from utils.evaluation import Contender, Evaluation, evaluate_and_report
from utils.runtime import choose_device, versions

SLOW_FROM = 5  # from this stage on (counted from 0) the learning rate is halved

# Networks to evaluate with where none are named, by data set.
POOL = ["self", "resnet10", "resnet18", "densenet"]
POOLS = {"imagenet": ["self", "resnet18", "efficientnet"], "tiny-imagenet": ["self", "resnet18"], "digits": ["self"]}
MEMORY = "--batch_size, other --eval_models or a smaller --width"  # lower it


def parse():
    parser = o.Parser(__doc__)
    defaults = idc_options.add(parser, "accepted, for the distillation's own words; all stages are evaluated")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--new_only", action="store_true", help="train on the newest subset of each stage only")
    evaluation.add_argument("--last_only", action="store_true", help="train on the last union only")
    evaluation.add_argument(
        "--same_compute",
        type=o.truth,
        default=False,
        help="scale the epochs so that all stages see as many pictures as training on the last union alone",
    )
    o.add_eval_mode(evaluation, None)
    o.add_eval_models(evaluation)
    evaluation.add_argument("--skip_random", action="store_true", help="no row for random real pictures")
    evaluation.add_argument("--skip_full", action="store_true", help="no row for the full training set")
    evaluation.add_argument("--full_epochs", type=o.COUNT, default=50, help="epochs on the full training set")
    evaluation.add_argument("--full_networks", type=o.COUNT, default=1, help="networks trained on the full set")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a device name")
    machine.add_argument("--checkpoint_minutes", type=o.RATE, default=10.0, help="minutes between two saves")
    machine.add_argument("--dry_run", action="store_true", help="print options, inputs, outputs and sizes, then stop")
    given = parser.parse_args()
    own_epochs = "epochs" in given
    options = idc_options.resolve(given, defaults, parser)
    if options.new_only and options.last_only:
        parser.error("--new_only together with --last_only: choose one")
    if not own_epochs:
        options.epochs = 1000 if options.last_only or options.new_only else 500
    if not options.eval_models:
        pool = networks.eval_pool(options.eval_mode, "self") if options.eval_mode else POOLS.get(options.dataset, POOL)
        options.eval_models = pool
    return options


def main():
    options = parse()
    device = choose_device(options.device)
    folder = Path(options.override_load_dir) if options.override_load_dir else idc_options.result_folder(options)
    stages = (
        range(options.num_intervals - 1, options.num_intervals) if options.last_only else range(options.num_intervals)
    )
    real = idc.load_data(options, device)
    unions = [idc.load_union(folder, stage, real) for stage in stages]
    select_on = progressive.selected_on([idc.read_summary(folder, stage) for stage in stages])
    contenders = [contender(options, real, unions, name) for name in options.eval_models]
    if options.dry_run:
        inputs = {"data": idc_options.data_folder(options)} | {f"stage {s}": idc.union_path(folder, s) for s in stages}
        report.dry_run(
            options,
            inputs,
            folder / "report.json",
            f"{len(unions)} stages of {options.epochs} epochs for "
            f"{options.repeat} networks of each of {', '.join(options.eval_models)}",
            1e6,
        )
        return
    sources = [source(options, real, union, device) for union in unions]
    totals = [union.shape[1] * union.shape[2] for union in unions]
    if options.new_only:
        totals = [union.shape[1] for union in unions]
    if options.slct_type == "random":
        sources = progressive.random_unions(real, totals, options.seed, ("selected",))
    with files.locked(folder):
        checkpoint = files.Checkpoint(folder / "evaluation_checkpoint.pt", options.checkpoint_minutes)
        evaluation = Evaluation(
            real,
            sources,
            totals,
            options.seed,
            checkpoint,
            0 if options.skip_random else options.repeat,
            0 if options.skip_full else options.full_networks,
        )
        free = (*o.FREE, *idc.FREE)
        evaluate_and_report(
            folder,
            options.data,
            evaluation,
            contenders,
            {key: value for key, value in vars(options).items() if key not in free},
            versions(),
            select_on,
            keeps="last",
        )


def source(options, real, union, device):
    """Return the decoded pictures of a union (K, n, stages, C, H, W) to train on."""
    if options.new_only:
        union = union[:, :, -1:]
    images = union.flatten(1, 2).flatten(0, 1).to(device)
    return real.source(*formation.decode_union(images, real.num_classes, options.factor, options.decode_type))


def contender(options, real, unions, name):
    """Return the `Contender` of one evaluation network."""
    title = idc_options.model_tag(options) if name == "self" else name
    if name == "self":
        idc.check_network(options, real)
    else:
        o.check_network(name, real)
    epochs = options.epochs
    if options.same_compute:
        sizes = [union.shape[2] for union in unions]
        epochs = max(1, round(epochs * sizes[-1] / sum(sizes)))

    def network(k):
        if name == "self":
            return idc.new_network(options, real, "evaluated", title, k)
        return training.new_network(name, real, options.seed, "evaluated", title, k)

    def recipe(stage):
        return progressive.idc_recipe(options, epochs, lr_factor=0.5 if stage >= SLOW_FROM else 1.0)

    def keep(k, network):
        if options.save_ckpt:
            files.save(idc.save_folder(options) / f"evaluated_{title}_{k}.pt", idc.on_cpu(network.state_dict()))

    return Contender(
        name=title,
        count=options.repeat,
        network=network,
        recipe=recipe,
        random_recipe=recipe,
        full_recipe=progressive.idc_recipe(options, options.full_epochs),
        keep=keep,
    )


if __name__ == "__main__":
    distributed.run(main, MEMORY)

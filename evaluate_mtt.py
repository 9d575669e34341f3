"""Evaluate PDD+MTT: train networks on the union of stage 1, then of stage 2, … P, and test them after each.

    python evaluate_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 \\
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 \\
        --override_load_path CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca \\
        --save_path logged_files --epoch_eval_train 500

Prints a table and writes report.json and accuracy.png into the experiment's folder. Beside each network stand two
rows for scale: the same network trained on as many random real pictures, and on the full training set.
"""

from pathlib import Path

import networks
import utils.options as o
from utils import augment, distributed, files, progressive, report, synset, training
from utils.errors import UserError
from utils.evaluation import Contender, Evaluation, evaluate_and_report
from utils.reparam import FlatNetwork, set_flat
from utils.runtime import choose_device, versions
from utils.trajectories import Experts, find_buffers

MEMORY = "--batch_train or a narrower --model"  # lower it


def parse():
    parser = o.Parser(__doc__)
    data = o.add_data(parser)
    data.add_argument("--dsa_strategy", type=o.strategy, default=o.DSA_STRATEGY, help="augmentation; none for none")
    data.add_argument("--buffer_path", default="buffers", help="experts whose first parameters the networks start from")
    experiment = parser.add_argument_group("experiment")
    o.add_experiment(experiment)
    experiment.add_argument("--num_intervals", type=o.COUNT, default=2, help="stages P")
    experiment.add_argument("--texture", action="store_true", help="the pictures are canvases")
    experiment.add_argument("--canvas_size", type=o.COUNT, default=2, help="pictures on each side of a canvas")
    experiment.add_argument("--canvas_samples", type=o.COUNT, default=1, help="windows of each canvas in a minibatch")
    experiment.add_argument("--tag", default="", help="end of the experiment folder's name")
    experiment.add_argument("--save_path", default="logged_files", help="root folder of the results")
    experiment.add_argument(
        "--override_load_path", help="name of the experiment's folder, instead of the one that the options give"
    )
    experiment.add_argument("--override_interval_names", help="names of the stages' folders, joined by dots")
    evaluation = parser.add_argument_group("evaluation")
    o.add_eval_models(evaluation)
    evaluation.add_argument(
        "--num_experts", type=o.COUNT, default=100, help="networks of the distillation's architecture"
    )
    evaluation.add_argument("--num_eval", type=o.COUNT, default=5, help="networks of every other architecture")
    evaluation.add_argument("--epoch_eval_train", type=o.COUNT, default=1000, help="epochs on every union")
    evaluation.add_argument("--mom", type=o.RATE, default=0.0, help="accepted for old commands; not used")
    evaluation.add_argument("--l2", type=o.RATE, default=0.0, help="accepted for old commands; not used")
    evaluation.add_argument("--save_interval", type=o.COUNT, default=10, help="accepted for old commands; not used")
    evaluation.add_argument("--skip_random", action="store_true", help="no row for random real pictures")
    evaluation.add_argument("--skip_full", action="store_true", help="no row for the full training set")
    evaluation.add_argument("--full_epochs", type=o.COUNT, default=50, help="epochs on the full training set")
    evaluation.add_argument("--full_networks", type=o.COUNT, default=1, help="networks trained on the full set")
    evaluation.add_argument("--save_model", action="store_true", help="save the trained networks' parameters")
    evaluation.add_argument("--save_model_prefix", default="model", help="start of their file names")
    o.add_machine(parser)
    return parser.parse_args()


def main():
    options = parse()
    device = choose_device(options.device)
    experiment = experiment_folder(options)
    names = options.override_interval_names.split(".") if options.override_interval_names else None
    folders = progressive.find_stages(experiment, options.num_intervals, names)
    real = o.load_data(options, device)
    pool = pool_of(options)
    for model in pool:
        o.check_network(model, real)
    unions = [synset.load_set(folder, device=device) for folder in folders]
    select_on = progressive.selected_on([progressive.read_stage(folder) for folder in folders])
    for folder, union in zip(folders, unions, strict=True):
        synset.check_set(folder, union, real, options.canvas_size if options.texture else 1)
    if options.dry_run:
        inputs = {"data": options.data_path} | {f"stage {n}": folder for n, folder in enumerate(folders, 1)}
        count = options.num_experts if pool == [options.model] else options.num_eval
        report.dry_run(
            options,
            inputs,
            experiment / "report.json",
            f"{len(unions)} stages of "
            f"{options.epoch_eval_train} epochs for {count} networks of each of {', '.join(pool)}",
            1e6,
        )
        return
    with files.locked(experiment):
        checkpoint = files.Checkpoint(experiment / "evaluation_checkpoint.pt", options.checkpoint_minutes)
        evaluation = Evaluation(
            real,
            [progressive.synthetic_source(union) for union in unions],
            [len(union) // real.num_classes for union in unions],
            options.seed,
            checkpoint,
            0 if options.skip_random else options.num_eval,
            0 if options.skip_full else options.full_networks,
        )
        contenders = Contenders(options, real, unions, experiment)
        evaluate_and_report(
            experiment,
            options.dataset,
            evaluation,
            [contenders.make(model) for model in pool],
            {key: value for key, value in vars(options).items() if key not in o.FREE},
            versions(),
            select_on,
        )


def pool_of(options):
    """Return the names of the networks to evaluate with."""
    if options.eval_models:
        return list(dict.fromkeys(options.model if name == "self" else name for name in options.eval_models))
    return networks.eval_pool(options.eval_mode, options.model)


def experiment_folder(options):
    name = options.override_load_path or progressive.experiment_name(options)
    return Path(options.save_path) / o.place(options) / name


class Contenders:
    """Makes the networks of an evaluation and says how they are trained."""

    def __init__(self, options, real, unions, experiment):
        self.options, self.real, self.unions, self.experiment = options, real, unions, experiment
        self.dsa = augment.DSA(options.dsa_strategy)
        self.starts = self.find_starts()

    def find_starts(self):
        """Return the experts whose first parameters the networks start from, None where there are no buffers."""
        options = self.options
        try:
            folder = find_buffers(options.buffer_path, o.place(options), options.model, options.zca)
        except UserError:
            report.say(f"no experts below {options.buffer_path}: networks start from random initialisations")
            return None
        network = training.new_network(options.model, self.real, options.seed, "shape")
        return Experts(folder, FlatNetwork(network).shapes, 1, options.model)

    def make(self, model):
        """Return the `Contender` of one architecture."""
        options = self.options
        window = self.real.im_size if options.texture else None

        def recipe(epochs, lr, window=None):
            return training.evaluation_recipe(epochs, lr, options.batch_train, self.dsa, window, options.canvas_samples)

        return Contender(
            name=model,
            count=options.num_experts if model == options.model else options.num_eval,
            network=lambda k: self.network(model, k),
            recipe=lambda stage: recipe(options.epoch_eval_train, self.unions[stage].syn_lr, window),
            random_recipe=lambda stage: recipe(options.epoch_eval_train, options.lr_teacher),
            full_recipe=recipe(options.full_epochs, options.lr_teacher),
            keep=lambda k, network: self.keep(model, k, network),
        )

    def network(self, model, k):
        """Return network k at its start: from expert k where its experts are there, else from a random stream."""
        network = training.new_network(model, self.real, self.options.seed, "start", model, k)
        if model == self.options.model and self.starts and k < len(self.starts):
            set_flat(network, self.starts.parameters(k, 0))
        return network

    def keep(self, model, k, network):
        """Save the trained network where --save_model asks for it."""
        if self.options.save_model:
            path = self.experiment / f"{self.options.save_model_prefix}_{model}_{k}.pt"
            files.save(path, [parameter.detach().cpu() for parameter in network.parameters()])


if __name__ == "__main__":
    distributed.run(main, MEMORY)

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
from utils import augment, datasets, errors, files, progressive, report, synset, training
from utils.errors import UserError
from utils.reparam import FlatNetwork, set_parameters
from utils.runtime import choose_device, versions
from utils.trajectories import Experts, find_buffers


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
    experiment.add_argument("--override_load_path", help="name of the experiment's folder; wins over all options")
    experiment.add_argument("--override_interval_names", help="names of the stages' folders, joined by dots")
    evaluation = parser.add_argument_group("evaluation")
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
    real = datasets.load(options.dataset, options.data_path, device, options.zca)
    pool = networks.eval_pool(options.eval_mode, options.model)
    for model in pool:
        o.check_network(model, real)
    unions = [synset.load_set(folder, device=device) for folder in folders]
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
        result = Evaluation(options, real, unions, experiment).run(pool)
        picture = report.write_report(experiment, result)
    print(report.table(result))
    print(f"report: {experiment / 'report.json'}\npicture: {picture}")


def experiment_folder(options):
    name = options.override_load_path or progressive.experiment_name(options)
    return Path(options.save_path) / options.dataset / name


class Evaluation:
    """Staged evaluation of one experiment for a pool of networks."""

    def __init__(self, options, real, unions, experiment):
        self.options, self.real, self.unions, self.experiment = options, real, unions, experiment
        self.dsa = augment.DSA(options.dsa_strategy)
        self.starts = self.find_starts()
        self.checkpoint = files.Checkpoint(experiment / "evaluation_checkpoint.pt", options.checkpoint_minutes)
        self.configured = {key: value for key, value in vars(options).items() if key not in o.FREE}

    def find_starts(self):
        """Return the experts whose first parameters the networks start from, None where there are no buffers."""
        options = self.options
        try:
            folder = find_buffers(options.buffer_path, options.dataset, options.model, options.zca)
        except UserError:
            report.say(f"no experts below {options.buffer_path}: networks start from random initialisations")
            return None
        network = training.new_network(options.model, self.real, options.seed, "shape")
        return Experts(folder, FlatNetwork(network).shapes, 1, options.model)

    def run(self, pool):
        """Evaluate every network of `pool`; returns the report."""
        options = self.options
        models = {}

        with self.checkpoint.loop("models", sorted(self.configured.items()), lambda: {"models": models}) as saved:
            models |= saved["models"] if saved else {}
            for model in pool:
                if model not in models:
                    models[model] = self.evaluate(model)
        self.checkpoint.clear()
        first = models[pool[0]]
        return {
            "dataset": options.dataset,
            "model": pool[0],
            **first,
            "models": models,
            "config": {**vars(options), "versions": versions()},
        }

    def evaluate(self, model):
        """Return {"stages", "random", "full"} of one architecture."""
        options = self.options
        runs, parts = [], {}
        with self.checkpoint.loop("model", model, lambda: {"runs": runs, "parts": parts}) as saved:
            if saved:
                runs += saved["runs"]
                parts |= saved["parts"]
            sources = [progressive.synthetic_source(union) for union in self.unions]
            count = options.num_experts if model == options.model else options.num_eval
            progress = report.Progress(count, f"{model}, network", len(runs))
            for k in range(len(runs), count):
                network = self.network(model, k)
                runs.append(
                    progressive.staged_accuracies(
                        network,
                        sources,
                        lambda stage: self.recipe(self.unions[stage].syn_lr),
                        self.real.test,
                        options.seed,
                        ("distilled", model, k),
                        self.checkpoint,
                    )
                )
                if options.save_model:
                    path = self.experiment / f"{options.save_model_prefix}_{model}_{k}.pt"
                    files.save(path, [parameter.detach().cpu() for parameter in network.parameters()])
                progress.update(accuracy=runs[-1][-1])
            progress.close()
            if "random" not in parts:
                parts["random"] = None if options.skip_random else self.random_row(model)
            if "full" not in parts:
                parts["full"] = None if options.skip_full else self.full_row(model)
        totals = [len(union) // self.real.num_classes for union in self.unions]
        return {"stages": report.stage_rows(totals, runs), **parts}

    def network(self, model, k):
        """Return network k at its start: from expert k where its experts are there, else from a random stream."""
        network = training.new_network(model, self.real, self.options.seed, "start", model, k)
        if model == self.options.model and self.starts and k < len(self.starts):
            vector = self.starts.parameters(k, 0).to(next(network.parameters()).device)
            parts = vector.split([parameter.numel() for parameter in network.parameters()])
            set_parameters(network, [p.view_as(q) for p, q in zip(parts, network.parameters(), strict=True)])
        return network

    def recipe(self, lr, window=True):
        options = self.options
        size = self.real.im_size if options.texture and window else None
        return training.evaluation_recipe(
            options.epoch_eval_train, lr, options.batch_train, self.dsa, size, options.canvas_samples
        )

    def random_row(self, model):
        """The same networks through the same stages on random real pictures, with the experts' learning rate."""
        options = self.options
        ipc = len(self.unions[0]) // self.real.num_classes
        runs = []
        with self.checkpoint.loop("random", model, lambda: {"runs": runs}) as saved:
            runs += saved["runs"] if saved else []
            for k in range(len(runs), options.num_eval):
                sources = progressive.random_unions(self.real, ipc, len(self.unions), options.seed, (k,))
                runs.append(
                    progressive.staged_accuracies(
                        self.network(model, k),
                        sources,
                        lambda stage: self.recipe(options.lr_teacher, window=False),
                        self.real.test,
                        options.seed,
                        ("random", model, k),
                        self.checkpoint,
                    )
                )
        return report.summary([run[-1] for run in runs])

    def full_row(self, model):
        """The same network trained on all real pictures, with the experts' learning rate and momentum 0.9."""
        options = self.options
        recipe = training.evaluation_recipe(options.full_epochs, options.lr_teacher, options.batch_train, self.dsa)
        results = []
        with self.checkpoint.loop("full", model, lambda: {"results": results}) as saved:
            results += saved["results"] if saved else []
            for k in range(len(results), options.full_networks):
                network = self.network(model, k)
                progress = report.Progress(options.full_epochs, f"{model}, full training set, epoch")

                def shown(_epoch, loss, progress=progress):
                    progress.update(loss=loss)

                training.train(
                    network,
                    self.real.train,
                    recipe,
                    options.seed,
                    ("full", model, k),
                    each_epoch=shown,
                    checkpoint=self.checkpoint,
                )
                results.append(training.accuracy(network, self.real.test))
        return report.summary(results)


if __name__ == "__main__":
    errors.run(main)

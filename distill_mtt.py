"""Distil a data set in stages by matching expert trajectories: PDD+MTT.

    # CIFAR-10, 10 images per class in 5 stages of 2
    python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 \\
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5

Each stage learns ipc pictures of every class while those of the earlier stages stay frozen, then the expert networks
are trained on the union so far and record the trajectories of the next stage. The same command again continues an
interrupted run; --start_interval p begins at stage p from what is on disk.

    # all GPUs of a machine: every minibatch is split over them, networks of transitions and evaluations are spread
    torchrun --standalone --nproc_per_node=gpu distill_mtt.py …
"""

from pathlib import Path

import torch

import networks
import utils.options as o
from utils import augment, distributed, errors, files, matching, progressive, report, results, synset, training
from utils.reparam import FlatNetwork, set_flat
from utils.runtime import choose_device, stream, to_device
from utils.trajectories import Experts, find_buffers, held_out_share

IMAGE_MOMENTUM = 0.5  # of both optimisers, pictures and syn_lr (MTT)
MEMORY = "--kept_steps 0, --slice_size, --batch_syn, --batch_train, --num_eval or a narrower --model"  # lower it


def parse():
    parser = o.Parser(__doc__)
    data = o.add_data(parser)
    o.add_augmentation(data)
    data.add_argument("--no_aug", type=o.truth, nargs="?", const=True, default=False, help="no DSA while matching")
    data.add_argument("--buffer_path", default="./buffers", help="buffers of the experts: their root or their folder")
    data.add_argument("--max_files", type=o.COUNT, help="use this many buffer files (default: all)")
    data.add_argument("--max_experts", type=o.COUNT, help="use this many experts of each file (default: all)")
    data.add_argument("--num_experts", type=o.COUNT, default=100, help="use this many experts in all")
    data.add_argument("--load_all", action="store_true", help="keep all buffer files in memory")
    stages = parser.add_argument_group("stages")
    o.add_experiment(stages)
    stages.add_argument("--num_intervals", type=o.COUNT, default=1, help="stages P")
    stages.add_argument("--start_interval", type=o.COUNT, default=1, help="begin at this stage (from 1)")
    stages.add_argument("--pix_init", choices=("real", "noise"), default="real", help="what new pictures start from")
    stages.add_argument("--texture", action="store_true", help="learn canvases that are shown in random windows")
    stages.add_argument("--canvas_size", type=o.COUNT, default=2, help="pictures on each side of a canvas")
    stages.add_argument("--canvas_samples", type=o.COUNT, default=1, help="windows of each canvas in a minibatch")
    match = parser.add_argument_group("matching")
    match.add_argument("--Iteration", type=o.COUNT, default=5000, help="matching iterations of each stage")
    match.add_argument("--start_sampling_epoch", type=o.NATURAL, default=0, help="first start epoch")
    match.add_argument("--lr_init", type=o.POSITIVE, default=0.01, help="accepted for old commands; not used")
    match.add_argument("--mom", type=o.RATE, default=0.0, help="momentum of SGD in a transition's real epochs")
    match.add_argument("--l2", type=o.RATE, default=0.0, help="weight decay of SGD in a transition's real epochs")
    match.add_argument(
        "--kept_steps",
        type=o.kept_steps,
        default="auto",
        help="student steps whose graph is kept: "
        "auto (as many as fit half of the free memory) or a number; 0 needs the least memory",
    )
    match.add_argument(
        "--trajectories_per_iteration",
        type=o.COUNT,
        default=1,
        help="experts whose gradients are averaged in one iteration; 1 as published, more is another setting that "
        "sees as many times the experts",
    )
    match.add_argument("--slice_size", type=o.COUNT, help="pictures of a minibatch held at once (default: all)")
    match.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for a ConvNet student's steps; meant for GPUs",
    )
    match.add_argument(
        "--bf16",
        action="store_true",
        help="the student's convolutions and products in bfloat16: no longer exact; meant for GPUs",
    )
    test = parser.add_argument_group("evaluation in a stage")
    test.add_argument("--num_eval", type=o.COUNT, default=5, help="networks of each evaluation")
    test.add_argument("--eval_it", type=o.COUNT, default=100, help="iterations between two evaluations")
    test.add_argument("--epoch_eval_train", type=o.COUNT, default=1000, help="accepted for old commands; not used")
    test.add_argument(
        "--override_epoch_eval_train",
        type=o.COUNT,
        default=1000,
        help="epochs on a union, of these networks and of every expert in a transition",
    )
    o.add_selection(test)
    output = parser.add_argument_group("output")
    output.add_argument("--root_log_dir", default="logged_files", help="root folder of the results")
    output.add_argument("--tag", default="", help="appended to the folder's name")
    output.add_argument("--save_dir", help="folder for the experiment's folder (default: root_log_dir/dataset)")
    output.add_argument("--override_experiment_path", help="the experiment's folder itself")
    output.add_argument("--save_interval", type=o.COUNT, default=10, help="trajectories in a buffer file")
    output.add_argument("--force_save", action="store_true", help="numbered files at every evaluation")
    o.add_wandb(output)
    o.add_machine(parser)
    options = parser.parse_args()
    if options.bf16 and options.compile:
        parser.error("--compile and --bf16: expected one of them; the compiled steps are made for whole precision")
    if options.zca and options.texture:
        parser.error("--zca together with --texture: whitening mixes the pixels that windows take apart; choose one")
    if options.start_interval > options.num_intervals:
        parser.error(f"--start_interval {options.start_interval} is beyond --num_intervals {options.num_intervals}")
    return options


def main():
    options = parse()
    device = choose_device(options.device)
    experiment = experiment_folder(options)
    real = o.select(options, o.load_data(options, device))
    for name in {options.model, *networks.eval_pool(options.eval_mode, options.model)}:
        o.check_network(name, real)
    run = Run(options, real, experiment)
    run.check()
    run.warn()
    if options.dry_run:
        report.dry_run(
            options,
            run.inputs(),
            experiment,
            f"{options.num_intervals} stages of {options.Iteration} iterations of {options.syn_steps} student steps",
            run.disk(),
        )
        return
    files.need_disk(experiment, run.disk(), "the buffers of the transitions")
    with files.locked(experiment):
        distributed.first(lambda: files.claim(experiment, vars(options), free=o.FREE, since=progressive.SINCE))
        distributed.first(lambda: results.save_facts(experiment, real))
        for stage in range(options.start_interval, options.num_intervals + 1):
            run.stage(stage)
    report.show(f"{experiment}: done, {options.num_intervals} stages")


def experiment_folder(options):
    if options.override_experiment_path:
        return Path(options.override_experiment_path)
    root = Path(options.save_dir) if options.save_dir else Path(options.root_log_dir) / o.place(options)
    return root / progressive.experiment_name(options)


class Run:
    """The stages of one experiment."""

    def __init__(self, options, real, experiment):
        self.options, self.real, self.experiment = options, real, experiment
        self.device = real.train.images.device
        self.dsa = augment.DSA(options.dsa_strategy) if options.dsa else None
        self.canvas = options.canvas_size if options.texture else 1
        network = training.new_network(options.model, real, options.seed, "student")
        self.student = FlatNetwork(network, options.compile, report.say, options.bf16)
        # Statistics of a batch would be those of a part of it.
        splits = not any(True for _ in self.student.network.buffers())
        if not splits and distributed.size() > options.trajectories_per_iteration:
            report.say(f"note: {options.model} has batch statistics: its minibatches are not split over the ranks")
        self.team, self.own_trajectories = distributed.form_teams(options.trajectories_per_iteration, splits)
        self.kept_steps = None

    def folder(self, stage):
        return progressive.stage_folder(
            self.experiment, stage, self.options.num_intervals, self.options.max_start_epoch
        )

    def buffers(self, stage):
        """Return the folder of the experts of `stage`: the recorded ones, then those of the transition before."""
        options = self.options
        if stage == 1:
            return find_buffers(options.buffer_path, o.place(options), options.model, options.zca)
        return self.folder(stage - 1)

    def experts(self, stage):
        options = self.options
        entries = options.start_sampling_epoch + options.max_start_epoch + options.expert_epochs
        return Experts(
            self.buffers(stage),
            self.student.shapes,
            entries,
            options.model,
            options.max_files,
            options.max_experts,
            options.num_experts,
            options.load_all,
        )

    def union(self, stage):
        """Return the best union of the stages before `stage` (from 1)."""
        if stage == 1:
            return synset.empty_set(self.real, self.canvas)
        folder = self.folder(stage - 1)
        union = synset.load_set(folder, device=self.device)
        synset.check_set(folder, union, self.real, self.canvas)
        return union

    def check(self):
        """Refuse what cannot work before anything is written."""
        first = self.options.start_interval
        self.experts(first)
        self.union(first)
        synset.new_subset(self.real, self.options.ipc, self.options.pix_init, self.options.seed, first, self.canvas)

    def warn(self):
        """Say where the experts of the first stage to learn have seen pictures that are held out now."""
        options = self.options
        if options.select_on != "val":
            return
        folder = self.buffers(options.start_interval)
        if options.start_interval > 1:
            share = progressive.read_stage(folder).get("val_fraction", 0.0)
        else:
            share = held_out_share(folder)
        if share < options.val_fraction:
            report.say(
                f"warning: {folder}: these experts have seen pictures that are held out now, so accuracies in a stage "
                f"are too high; record experts with buffer_mtt.py --val_fraction {options.val_fraction:g}"
            )

    def inputs(self):
        return {"data": self.options.data_path, "experts": self.buffers(self.options.start_interval)}

    def disk(self):
        """Return the bytes that the transitions write."""
        options = self.options
        entries = options.max_start_epoch + options.expert_epochs + 2
        experts = len(self.experts(options.start_interval))
        return 4 * self.student.numel * entries * experts * (options.num_intervals - options.start_interval)

    def evaluation(self, epochs, syn_lr):
        """Return the recipe of networks trained on a union."""
        options = self.options
        window = self.real.im_size if options.texture else None
        return training.evaluation_recipe(epochs, syn_lr, options.batch_train, self.dsa, window, options.canvas_samples)

    def network_at(self, vector):
        """Return a network of the distillation's architecture with flat parameters `vector`."""
        network = training.new_network(self.options.model, self.real, self.options.seed, "student")
        set_flat(network, vector)
        return network

    def stage(self, stage):
        """Learn the subset of `stage`, then make the experts of the next one."""
        options, folder = self.options, self.folder(stage)
        known = progressive.read_stage(folder)
        if known.get("complete"):
            self.union(stage + 1)
            report.say(
                f"stage {stage}: done already, {known['best_accuracy']:.2f} % at iteration {known['best_iteration']}"
            )
            return
        checkpoint = files.Checkpoint(folder / "checkpoint.pt", options.checkpoint_minutes, vars(options), o.FREE)
        experts = self.experts(stage)
        if not known:
            best = self.learn(stage, folder, experts, checkpoint)
            known = {
                "stage": stage,
                **progressive.selection(options),
                "best_accuracy": best["accuracy"],
                "best_iteration": best["iteration"],
                "complete": False,
            }
            self.write_stage(folder, known)
            checkpoint.clear()
        report.say(f"stage {stage}: best {known['best_accuracy']:.2f} % at iteration {known['best_iteration']}")
        if stage < options.num_intervals:
            self.make_experts(stage, folder, experts, checkpoint)
            checkpoint.clear()
        self.write_stage(folder, known | {"complete": True})

    def write_stage(self, folder, known):
        """Write what is known of a stage; all its files are there for every rank when this returns."""
        distributed.first(lambda: files.write_json(folder / progressive.STAGE, known))

    def learn(self, stage, folder, experts, checkpoint):
        """Match trajectories for `Iteration` iterations; returns {"accuracy", "iteration"} of the best union."""
        options = self.options
        subset, labels = synset.new_subset(self.real, options.ipc, options.pix_init, options.seed, stage, self.canvas)
        synthetic = self.union(stage).extend(subset, labels, torch.tensor(options.lr_teacher, device=self.device))
        lr_lr = 1e-5 if options.dataset == "CIFAR10" and options.ipc == 1 and stage > 1 else options.lr_lr
        learned, syn_lr = synthetic.learned, synthetic.syn_lr
        optimizers = [
            torch.optim.SGD([learned], lr=options.lr_img, momentum=IMAGE_MOMENTUM),
            torch.optim.SGD([syn_lr], lr=lr_lr, momentum=IMAGE_MOMENTUM),
        ]
        best = {"accuracy": -1.0, "iteration": None}
        iteration, log, self.kept_steps = 0, None, None

        def state():
            return {
                "iteration": iteration,
                "learned": learned.clone(),
                "syn_lr": syn_lr,
                "best": best,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "rows": log.rows,
                "wandb": log.run_id,
            }

        with checkpoint.loop("matching", stage, state) as saved:
            if saved:
                learned.copy_(saved["learned"])
                syn_lr.copy_(saved["syn_lr"])
                best |= saved["best"]
                for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict(values)
            first = saved["iteration"] if saved else 0
            log = report.Log(
                folder / "metrics.jsonl",
                saved["rows"] if saved else 0,
                options.wandb,
                vars(options),
                saved["wandb"] if saved else None,
            )
            progress = report.Progress(options.Iteration, f"stage {stage}/{options.num_intervals}, iteration", first)
            for iteration in range(first, options.Iteration + 1):
                checkpoint.tick()
                if iteration % options.eval_it == 0 or iteration == options.Iteration:
                    accuracy, std = self.evaluate(stage, iteration, synthetic, experts, checkpoint)
                    log.write(stage=stage, iteration=iteration, accuracy_mean=accuracy, accuracy_std=std)
                    progress.say(
                        f"stage {stage}, iteration {iteration}: {progressive.SHOWN[options.select_on]} accuracy "
                        f"{accuracy:.2f} ± {std:.2f} %, syn_lr {float(syn_lr):.5f}"
                    )
                    is_best = accuracy > best["accuracy"]
                    if is_best:
                        best |= {"accuracy": accuracy, "iteration": iteration}
                        self.save(folder, "best", synthetic)
                    if is_best or iteration % 1000 == 0 or options.force_save:
                        self.save(folder, iteration, synthetic)
                if iteration == options.Iteration:
                    break
                loss, learned.grad, syn_lr.grad = self.match(stage, iteration, synthetic, experts)
                for optimizer in optimizers:
                    optimizer.step()
                matching.refuse_if_broken(iteration, loss, learned, syn_lr)
                log.write(stage=stage, iteration=iteration, loss=float(loss), syn_lr=float(syn_lr))
                progress.update(loss=loss, accuracy=best["accuracy"])
            progress.close()
            log.close()
        return best

    def match(self, stage, iteration, synthetic, experts):
        """Match the trajectories of one iteration, spread over the ranks.

        Returns:
            (loss 0-dim, gradient of the learned pictures, gradient of syn_lr 0-dim): means over the trajectories.
        """
        options, count = self.options, self.options.trajectories_per_iteration
        total = [torch.zeros_like(value) for value in (synthetic.syn_lr, synthetic.learned, synthetic.syn_lr)]
        for trajectory in self.own_trajectories:
            start, target, steps = self.plan(stage, iteration * count + trajectory, synthetic, experts)
            if self.kept_steps is None:
                self.kept_steps = matching.choose_kept_steps(
                    options.kept_steps,
                    self.student,
                    start,
                    synthetic.images,
                    synthetic.labels,
                    steps,
                    options.slice_size,
                    self.device,
                    self.team,
                )
            loss, *gradients = matching.match(
                self.student,
                start,
                target,
                synthetic.syn_lr,
                synthetic.images,
                synthetic.labels,
                steps,
                synthetic.first_learned,
                self.kept_steps,
                options.slice_size,
                self.team,
            )
            # Every rank of a team has the whole loss.
            found = [loss / self.team.count, *gradients]
            total = [whole.add_(part) for whole, part in zip(total, found, strict=True)]
        return [distributed.sum_(value).div_(count) for value in total]

    def plan(self, stage, number, synthetic, experts):
        """Draw one trajectory to match: expert, start epoch, minibatches and their augmentation.

        Args:
            number: of the trajectory in this stage, from 0; that of the iteration where each has one.

        Returns:
            (start parameters, target parameters, list of `matching.Step`).
        """
        options = self.options
        rng = stream(options.seed, "matching", stage, number)
        turn, position = divmod(number, len(experts))
        expert = experts.order(stream(options.seed, "experts", stage, turn))[position]
        epoch = options.start_sampling_epoch + int(rng.integers(options.max_start_epoch))
        start = experts.parameters(expert, epoch).to(self.device, non_blocking=True)
        target = experts.parameters(expert, epoch + options.expert_epochs).to(self.device, non_blocking=True)
        batch = options.batch_syn or self.real.num_classes * options.ipc
        steps = []
        for index in matching.plan_batches(len(synthetic), batch, options.syn_steps, rng):
            window = rng.integers(2**63) if options.texture else None
            count = len(index) * (options.canvas_samples if options.texture else 1)
            draw = self.dsa.draw(count, rng) if self.dsa and not options.no_aug else []

            def augmented(x, window=window, draw=draw):
                if window is not None:
                    x = augment.random_windows(x, stream(window), self.real.im_size, options.canvas_samples)
                return self.dsa.apply(x, draw) if draw else x

            steps.append(matching.Step(to_device(index, self.device), augmented))
        return start, target, steps

    def evaluate(self, stage, iteration, synthetic, experts, checkpoint):
        """Train the evaluation networks on the union; returns mean and standard deviation of their accuracies."""
        options = self.options
        if not float(synthetic.syn_lr) > 0:
            raise errors.UserError(
                f"iteration {iteration}: syn_lr became {float(synthetic.syn_lr):.3g}, expected > 0; the files of the "
                "last good evaluation are kept; lower --lr_lr"
            )
        recipe = self.evaluation(options.override_epoch_eval_train, synthetic.syn_lr)
        done = []
        with checkpoint.loop("pool", (stage, iteration), lambda: {"done": done}) as saved:
            done += saved["done"] if saved else []
            for name in networks.eval_pool(options.eval_mode, options.model)[len(done) :]:
                keys = ("evaluation", stage, iteration, name)

                def made(k, name=name, keys=keys):
                    if name == options.model:
                        return self.network_at(experts.parameters(k % len(experts), 0))
                    return training.new_network(name, self.real, options.seed, *keys, k)

                done.append(
                    progressive.accuracies(
                        made, options.num_eval, synthetic, recipe, self.real.selection, options.seed, keys, checkpoint
                    )
                )
        results = [accuracy for network in done for accuracy in network]
        return report.mean_std(results)

    def make_experts(self, stage, folder, experts, checkpoint):
        """The transition to the next stage."""
        options = self.options
        union = synset.load_set(folder, device=self.device)
        recipe = self.evaluation(options.override_epoch_eval_train, union.syn_lr)
        real_recipe = training.Recipe(
            options.max_start_epoch + options.expert_epochs + 1,
            options.lr_teacher,
            options.mom,
            options.l2,
            options.batch_train,
            self.dsa,
        )
        shared = len(distributed.share(range(len(experts))))
        progress = report.Progress(shared, f"stage {stage}, transition, expert")
        progressive.transition(
            self.network_at,
            experts,
            union,
            recipe,
            self.real,
            real_recipe,
            folder,
            options.save_interval,
            options.seed,
            stage,
            checkpoint,
            lambda _k, _count: progress.update(),
        )
        progress.close()

    def save(self, folder, tag, synthetic):
        """Write the union's tensors and its picture."""
        if not distributed.is_first():
            return
        synset.save_set(folder, tag, synthetic)
        pixels = self.pixels(synthetic.images)
        if self.options.zca and tag != "best":
            files.save(folder / f"images_zca_{tag}.pt", pixels.cpu())
        report.save_grid(folder / f"images_{tag}.png", pixels, synthetic.labels)

    def pixels(self, images):
        """Return pictures for the eye."""
        with torch.no_grad():
            return self.real.to_pixels(images)


if __name__ == "__main__":
    distributed.run(main, MEMORY)

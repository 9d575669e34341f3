"""Distil a data set in stages by matching expert trajectories: PDD+MTT.

    # CIFAR-10, 10 images per class in 5 stages of 2
    python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 \\
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5

Each stage learns ipc images of every class while those of the earlier stages stay frozen, then the expert networks
are trained on the union so far and record the trajectories of the next stage. The same command again continues an
interrupted run; --start_interval p begins at stage p from what is on disk.

    # all GPUs of a machine: every minibatch is split over them, networks of transitions and evaluations are spread
    torchrun --standalone --nproc_per_node=gpu distill_mtt.py …
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

import networks
from networks.kernels import explicit
from networks.layers import has_batch_statistics
from networks.reparam import ReparamModule, set_flat
from utils import forgetting, options, sizes, stages, training
from utils.augment import DSA
from utils.options import Parser, mtt
from utils.results import known, names, report
from utils.results.provenance import DATA, check_data, check_result
from utils.run import distributed, files
from utils.run.checkpoint import Checkpoint, forget_finished
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.run.log import Log, Progress, log0, print0
from utils.run.main import run_script
from utils.run.streams import stream
from utils.synthetic import PARTS, empty_set, init_subset, load_mtt, save_mtt
from utils.trajectories import Experts, find_buffers, recorded_fingerprint, warn_of_seen_images
from utils.trajectory_matching import TrajectoryMatcher, check_finite

CHECKPOINT = "checkpoint.pt"
SYN_MOMENTUM = 0.5  # of both optimisers, images and syn_lr (MTT)
OOM_ADVICE = "--kept_steps 0, --slice_size, --batch_syn, --batch_train, --num_eval or a narrower --model"


def parse():
    parser = Parser(__doc__)
    for title, rows in mtt.DISTILLATION.items():
        parser.add_options(title, rows)
    parser.add_options("machine", options.MACHINE + options.SEED)
    args = parser.parse_args()
    args.precision = "bf16" if args.bf16 else args.precision
    args.bf16 = args.precision == "bf16"
    if args.bf16 and args.compile:
        parser.error("--compile with --precision bf16: expected one of them; compiled steps are in full precision")
    if args.zca and args.texture:
        parser.error("--zca together with --texture: whitening mixes the pixels that windows take apart; choose one")
    if args.soft_labels and args.texture:
        parser.error("--soft_labels together with --texture: a canvas shows several images under one label; choose one")
    if not args.soft_labels:
        parser.refuse(("soft_init", "soft_temperature", "lr_label"), "without --soft_labels")
    mtt.check_stages(parser, args)
    if args.start_interval > args.num_intervals:
        parser.error(f"--start_interval {args.start_interval} is beyond --num_intervals {args.num_intervals}")
    return args


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    real = options.held_out(args, mtt.load_data(args, device))
    for name in {args.model, *networks.eval_pool(args.eval_mode, args.model)}:
        options.check_network(name, real)
    run = Run(args, real)
    size = run.check_inputs()
    if args.dry_run:
        distributed.on_rank0(run.check_config)
        inputs = {"data": args.data_path, "experts": run.buffers(args.start_interval)}
        print0(options.dry_run(args, inputs, run.experiment, size))
        return
    to_make = [run.folder(stage) for stage in range(args.start_interval, args.num_intervals + 1)]
    there = sum(path.lstat().st_size for folder in to_make for path in folder.glob("*.pt"))
    files.need_disk(run.experiment, max(0, size.disk - there), "the trajectories of the transitions and the images")
    with files.locked(run.experiment):
        distributed.on_rank0(run.check_config)
        for stage in range(args.start_interval, args.num_intervals + 1):
            distil_stage(stage, run)
    print0(f"{run.experiment}: done, {args.num_intervals} stages")


def distil_stage(stage, run):
    """Learn the subset of `stage` (from 1), then make the experts of the next one."""
    summary, folder = names.read_mtt_stage(run.folder(stage)), run.folder(stage)
    if not summary:
        summary = learn_subset(stage, run)
        distributed.on_rank0(lambda: files.write_json(folder / names.STAGE_FILE, summary))
    if distributed.is_rank0():
        (folder / CHECKPOINT).unlink(missing_ok=True)
    forget_finished(folder, "evaluation")
    done = "done already" if summary["complete"] else "best"
    log0(f"stage {stage}: {done}, {summary['best_accuracy']:.2f} % at iteration {summary['best_iteration']}")
    if summary["complete"]:
        run.union(stage)  # its files must still be there
        return
    if summary["best_iteration"] == 0:
        log0(
            f"warning: stage {stage}: matching made the images no better than their initialisation, which is kept; "
            "change --lr_img or raise --Iteration"
        )
    if stage < run.args.num_intervals:
        transition(stage, run)
    distributed.on_rank0(lambda: files.write_json(folder / names.STAGE_FILE, summary | {"complete": True}))


def learn_subset(stage, run):
    """Match trajectories for `Iteration` iterations; returns the summary of the best union, which is on disk."""
    args, experts = run.args, run.experts(stage)
    synthetic = run.union(stage - 1).extended(*run.new_subset(stage, experts))
    config = mtt.match_config(args, run.real, run.dsa, stage)
    matcher = TrajectoryMatcher(run.student, experts, synthetic, config, args.seed, stage)
    published = args.dataset == "CIFAR10" and set(run.ipcs) == {1} and args.syn_lr_form == "plain"
    lr_lr = 1e-5 if published and stage > 1 else args.lr_lr
    # `learned` is a view of the union's images: a step of its optimiser moves them.
    optimizers = {
        "images_sgd": SGD([synthetic.learned], args.lr_img, SYN_MOMENTUM),
        "syn_lr_sgd": SGD([synthetic.syn_lr], lr_lr, SYN_MOMENTUM),
    }
    if args.soft_labels:
        optimizers["labels_sgd"] = SGD([synthetic.learned_soft], args.lr_label, SYN_MOMENTUM)
    shown = synthetic.copy() if args.ema else synthetic  # what is evaluated and kept: the running mean of the images
    best = {"accuracy": -1.0, "iteration": None, "models": {}}
    log = Log(run.folder(stage) / names.LOG, args.wandb, vars(args))
    state = {"learned": synthetic.learned, "syn_lr": synthetic.syn_lr, **optimizers, "best": best, "log": log}
    state |= {"mean": shown.learned} if args.ema else {}
    state |= {"labels": synthetic.learned_soft} if args.soft_labels else {}
    path = run.folder(stage) / CHECKPOINT
    with Checkpoint(path, args.checkpoint_minutes, options.config_of(args), **state) as checkpoint:
        log.begin()
        run.keep_best(stage, best["iteration"])
        progress = Progress(args.Iteration, f"stage {stage}/{args.num_intervals}, iteration", checkpoint.iteration)
        for it in checkpoint.iterations(args.Iteration + 1):
            if it % args.eval_it == 0 or it == args.Iteration:
                accuracies = evaluate(stage, it, shown, experts, matcher.loaded_experts(it), run)
                mean, std = keep_if_best(stage, it, shown, accuracies, best, run)
                log.write(stage=stage, iteration=it, accuracy_mean=mean, accuracy_std=std)
                measured, count = names.MEASURED_ON[args.select_on], sum(map(len, accuracies.values()))
                found = f"{measured} accuracy {report.accuracy_text(mean, std, count)} %"
                log0(f"stage {stage}, iteration {it}: {found}, syn_lr {float(synthetic.syn_lr):.5f}")
            if it == args.Iteration:
                break
            loss = matcher.backward(it)
            step(synthetic, optimizers, args)
            if args.ema:
                shown.learned.lerp_(synthetic.learned, 1 - args.ema)
            check_finite(it, loss, synthetic)
            log.write(stage=stage, iteration=it, loss=float(loss), syn_lr=float(synthetic.syn_lr))
            progress.update(loss=loss)
        progress.close()
        log.close()
    summary = {"stage": stage, **names.selection(vars(args))}
    if args.soft_labels:
        summary |= {"soft_init": args.soft_init, "soft_temperature": args.soft_temperature}
    return summary | {"best_accuracy": best["accuracy"], "best_iteration": best["iteration"], "complete": False}


def step(synthetic, optimizers, args):
    """Move what is learned along the gradients that `TrajectoryMatcher.backward` has left."""
    before, soft = synthetic.syn_lr.clone(), synthetic.learned_soft
    if args.syn_lr_form == "exp":
        synthetic.syn_lr.grad *= before  # the gradient of log syn_lr
    if soft is not None:
        soft.grad -= soft.grad.mean(1, keepdim=True)  # along the plane of rows whose sum is 1
    if args.clip_grad:
        for value in synthetic.parameters:
            clip_grad_norm_(value, args.clip_grad)
    for optimizer in optimizers.values():
        optimizer.step()
    if soft is not None:
        soft.clamp_(min=0).div_(soft.sum(1, keepdim=True))
    if args.syn_lr_form == "exp":  # the step that SGD has made belongs to log syn_lr
        synthetic.syn_lr.copy_(before * (synthetic.syn_lr - before).exp())


def evaluate(stage, iteration, synthetic, experts, starts, run):
    """Train the evaluation networks on the union; returns {architecture: list of accuracies}.

    Networks of the distillation's architecture start where the experts `starts` did.
    """
    args = run.args
    if not float(synthetic.syn_lr) > 0:
        raise UserError(
            f"iteration {iteration}: syn_lr became {float(synthetic.syn_lr):.3g}, expected > 0; the files of the last "
            "good evaluation are kept; lower --lr_lr or take --syn_lr_form exp"
        )

    def accuracies_of(name):
        keys, config = ("evaluation", stage, iteration, name), run.union_config(synthetic.syn_lr)

        def network(k):
            if name == args.model:
                return run.network_at(experts.parameters(starts[k % len(starts)], 0))
            return training.new_network(name, run.real, args.seed, *keys, k)

        images, test = synthetic.dataset(), run.real.selection
        return stages.train_and_test(network, args.num_eval, images, config, test, args.seed, keys, run.folder(stage))

    return {name: accuracies_of(name) for name in networks.eval_pool(args.eval_mode, args.model)}


def keep_if_best(stage, iteration, synthetic, accuracies, best, run):
    """Save the union if the mean of any architecture is a new best, as published; returns mean and std over all."""
    mean, std = report.mean_std([value for values in accuracies.values() for value in values])
    means = {name: report.mean_std(values)[0] for name, values in accuracies.items()}
    is_best = any(value > best["models"].get(name, -1.0) for name, value in means.items())
    if is_best:
        best["models"] = {name: max(value, best["models"].get(name, -1.0)) for name, value in means.items()}
        best |= {"accuracy": mean, "iteration": iteration}
        run.save(stage, "best", synthetic)
    if is_best or iteration % 1000 == 0 or run.args.force_save:
        run.save(stage, iteration, synthetic)
    return mean, std


def transition(stage, run):
    """Train every expert on the best union of `stage`, then on real data: trajectories of the next stage's experts."""
    args, union, real = run.args, run.union(stage), run.real_data(stage + 1).train
    epochs = sizes.mtt_start_epochs(vars(args), stage + 1).stop + args.expert_epochs + 1
    real_config = training.TrainConfig(
        epochs, args.lr_teacher, args.mom, args.l2, args.batch_train, run.dsa, precision=args.precision
    )
    on_union = union.dataset(), run.union_config(union.syn_lr)
    files_of = run.folder(stage), args.save_interval
    stages.transition(run.network_at, run.experts(stage), *on_union, real, real_config, *files_of, args.seed, stage)


class Run:
    """One experiment: its options, its data, and where its files are."""

    def __init__(self, args, real):
        self.args, self.real, self.device = args, real, real.train.images.device
        experiment = mtt.experiment_folder(args, args.root_log_dir)
        if args.save_dir:
            experiment = Path(args.save_dir) / experiment.name
        self.experiment = Path(args.override_experiment_path or experiment)
        self.dsa = DSA(args.dsa_strategy) if args.dsa else None
        self.canvas = args.canvas_size if args.texture else 1
        self.ipcs = names.stage_ipcs(args.ipc, args.num_intervals)
        network = training.new_network(args.model, real, args.seed, "student")
        self.student = ReparamModule(network, args.compile, log0, args.precision)

    def check_inputs(self):
        """Refuse what cannot work before anything is written; returns the run's size."""
        args, first = self.args, self.args.start_interval
        batch_statistics = has_batch_statistics(self.student.network)
        if batch_statistics and args.slice_size:
            raise UserError(
                f"--slice_size with {args.model}: expected a network without batch statistics, whose minibatches can "
                "be taken in slices; leave --slice_size out"
            )
        buffers = self.buffers(first)
        if first == 1:
            check_data(buffers, recorded_fingerprint(buffers), self.real.info)
        if (self.experiment / DATA).exists():
            check_result(self.experiment, self.real.info)
        experts = self.experts(first)
        self.union(first - 1)
        if first > 1 and not names.read_mtt_stage(self.folder(first - 1)).get("complete", True):
            raise UserError(
                f"{self.folder(first - 1)}: expected a finished stage, found it interrupted; continue it by the same "
                "command without --start_interval"
            )
        last = args.num_intervals
        largest = max(range(first, last + 1), key=lambda p: (self.ipcs[p - 1], p))
        for stage in range(first, last + 1) if args.drop_easy else [largest]:
            self.initial_images(forgetting.as_many(self.real, args.drop_easy, stage, last), stage)
        options.warn_of_few_images(self.real, ipc=sum(self.ipcs))
        forgetting.note_one_stage(args.drop_easy, last)
        if args.compile and not explicit.applies(self.student.network, self.real.train.batch(slice(1))[0]):
            log0(f"note: --compile changes nothing for {args.model} and these images; it is made for plain ConvNets")
        warn_of_seen_images(buffers, options.held_out_fraction(args))
        if batch_statistics and distributed.size() > args.trajectories_per_iteration:
            log0(f"note: {args.model} has batch statistics: its minibatches are not split over the ranks")
        return sizes.mtt_distillation(vars(args), self.real.info, len(self.real.train), len(experts))

    def check_config(self):
        """Tie the experiment's folder to this run's options and data."""
        free, defaults = options.RESUMABLE_CHANGES, mtt.CONFIG_DEFAULTS
        begun = {"defaults": defaults, "behaviour": options.BEHAVIOUR}
        content = files.check_config(self.experiment, vars(self.args), free, **begun)
        last = names.read_mtt_stage(self.folder(self.args.num_intervals))
        options.refuse_other_behaviour(self.experiment, content, last.get("complete"))
        if not self.args.dry_run:
            known.save_info(self.experiment, self.real.info)

    def folder(self, stage):
        return names.mtt_stage(self.experiment, stage, self.args.num_intervals, self.args.max_start_epoch)

    def buffers(self, stage):
        """Return the folder of the experts of `stage`: the recorded ones, then those of the transition before."""
        if stage > 1:
            return self.folder(stage - 1)
        return find_buffers(self.args.buffer_path, mtt.dataset_subdir(self.args), self.args.model, self.args.zca)

    def experts(self, stage):
        args = self.args
        entries = sizes.mtt_start_epochs(vars(args), stage).stop + args.expert_epochs
        # A transition goes on with those that were chosen, so it leaves nothing more to choose.
        most = (args.max_files, args.max_experts) if stage == 1 else (None, None)
        chosen = *most, args.load_all, stream(args.seed, "files", stage)
        return Experts(self.buffers(stage), self.student.shapes, entries, args.model, *chosen)

    def real_data(self, stage):
        """Return the real data of `stage`: all, or with --drop_easy the images that are harder to learn."""
        args = self.args
        fraction = forgetting.dropped_fraction(args.drop_easy, stage, args.num_intervals)
        if not fraction:
            return self.real
        experts, network = self.experts(1), training.new_network(args.model, self.real, args.seed, "student")
        path = self.buffers(1) / forgetting.FILE
        data = self.real.train, self.real.info.fingerprint, options.held_out_fraction(args)
        scores = distributed.on_rank0(lambda: forgetting.cached_expert_scores(path, network, experts, *data))
        return forgetting.without_easy(self.real, scores, fraction)

    def initial_images(self, real, stage):
        """Return the images and labels that `stage` starts from, taken from `real`."""
        rng = stream(self.args.seed, "subset", stage)
        return init_subset(real, self.ipcs[stage - 1], self.args.pix_init, rng, self.canvas)

    def new_subset(self, stage, experts):
        """Return what `stage` learns, at its start: images, labels, syn_lr, soft labels or None."""
        images, labels = self.initial_images(self.real_data(stage), stage)
        syn_lr, soft = torch.tensor(self.args.lr_teacher, device=self.device), None
        if self.args.soft_labels and self.args.soft_init == "expert":
            expert = self.network_at(experts.parameters(0, experts.entries - 1))
            soft = stages.soft_labels(expert, images, self.args.soft_temperature)
        elif self.args.soft_labels:
            soft = F.one_hot(labels, self.real.info.num_classes).float()
        return images, labels, syn_lr, soft

    def network_at(self, vector):
        """Return a network of the distillation's architecture with flat parameters `vector`."""
        network = training.new_network(self.args.model, self.real, self.args.seed, "student")
        set_flat(network, vector)
        return network

    def union_config(self, syn_lr):
        """Return how networks are trained on a union."""
        return mtt.union_config(self.args, self.real, self.args.override_epoch_eval_train, syn_lr, self.dsa)

    def union(self, stage):
        """Return the best union of `stage`; an empty one of stage 0."""
        if stage == 0:
            return empty_set(self.real, self.canvas)
        return load_mtt(self.folder(stage), "best", self.device, self.real.info, self.canvas, self.ipcs[:stage])

    def save(self, stage, tag, synthetic):
        """Write the union's tensors and a PNG of them."""
        if not distributed.is_rank0():
            return
        folder, pixels = self.folder(stage), self.real.info.to_pixels(synthetic.images)
        save_mtt(folder, tag, synthetic)
        if self.args.zca and tag != "best":
            files.save(folder / f"images_zca_{tag}.pt", pixels.cpu())
        report.save_grid(folder / f"images_{tag}.png", pixels, synthetic.labels)

    def keep_best(self, stage, iteration):
        """Make the best union that of `iteration`, if a run that was killed went on and found another."""
        if iteration is not None and distributed.is_rank0():
            for name in ("images_{}.png", *(f"{part}_{{}}.pt" for part in PARTS)):
                if (path := self.folder(stage) / name.format(iteration)).exists():
                    with files.atomic(path.with_name(name.format("best"))) as file:
                        file.write(path.read_bytes())


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

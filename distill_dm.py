"""Distil a data set in stages by matching distributions of features: PDD+DM.

    # CIFAR-10, 10 images per class in 5 stages of 2, with the experts of buffer_mtt.py
    python buffer_mtt.py --dataset CIFAR10 --num_experts 2 --train_epochs 8 --lr_teacher 0.02 --mom 0.9
    python distill_dm.py -d cifar10 -f 2 --ipc 2 --metric cf --calibration 0.5
    python evaluate_idc.py --method dm -d cifar10 -f 2 --ipc 2 --metric cf --calibration 0.5

Each stage learns ipc images of every class while those of earlier stages stay frozen: they take part in the means that
are matched. The features are those of networks between two epochs of an expert, or with --transition union of networks
that are trained on the earlier unions. The same command again continues an interrupted run. The files are those of
distill_idc.py.

    # all GPUs of a machine: the classes of every iteration and the networks of evaluations are spread
    torchrun --standalone --nproc_per_node=gpu distill_dm.py …
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
import math

import torch
from torch.optim import Adam

from networks.reparam import set_flat
from utils import options, sizes
from utils.feature_matching import FeatureMatcher
from utils.idc_runs import Run, learn_stages, record
from utils.options import Parser, dm
from utils.results.provenance import check_data
from utils.run.device import setup_device
from utils.run.log import Progress
from utils.run.main import run_script
from utils.run.streams import stream
from utils.trajectories import Experts, find_buffers, mixture, recorded_fingerprint, warn_of_seen_images, window

OOM_ADVICE = "--batch_real, --batch_size or a narrower --model"


def parse():
    parser = Parser(__doc__)
    dm.add_options(parser)
    parser.add_options("evaluation in a stage", options.SELECT_ON)
    parser.add_options("real images", options.DROP_EASY)
    parser.add_options("speed", dm.SPEED)
    parser.add_options("machine", options.MACHINE)
    args = dm.resolve(parser)
    if args.transition == "union":
        parser.refuse(("window",), "with --transition union")
    else:
        parser.refuse(dm.OF_UNIONS, "without --transition union")
    if args.metric != "cf":
        parser.refuse(("cf_alpha",), "without --metric cf")
    return args


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    real = options.held_out(args, dm.load_data(args, device))
    options.check_network(args.model, real)
    run = DmRun(args, real, dm)
    run.check()
    inputs = {"data": dm.data_folder(args)} | ({"experts": run.buffers} if run.buffers else {})
    learn_stages(run, learn_subset, inputs, sizes.dm_distillation(vars(args), real.info, len(real.train)))


def learn_subset(stage, run):
    """Learn the images of `stage` (from 1) and write its union."""
    args, real = run.args, run.real_of(stage)
    synthetic = run.union(stage - 1).extended(*run.init_subset(stage, real))
    matcher = FeatureMatcher(real, synthetic, dm.match_config(args), args.seed, stage - 1)
    # `learned` is a view of the union's images: a step of its optimiser moves them.
    optimizer = Adam([synthetic.learned], args.lr_img)
    mixtures = Mixtures(stage, run) if run.buffers else None
    student = None
    if args.transition == "union":
        student = run.student(stage, synthetic.union(stage - 1), real, math.ceil(args.Iteration / args.inner_loop))
    log, loss, done = run.log(stage), torch.zeros((), device=run.device), {"iteration": 0}
    state = {"images": synthetic.learned, "adam": optimizer, "loss": loss, "done": done, "log": log}
    state |= {"student": student} if student else {}
    with run.checkpoint(stage, state) as checkpoint:
        log.begin()
        if not checkpoint.iteration:
            run.save_grid(stage, "init", synthetic)
        progress = Progress(args.Iteration, f"stage {stage}/{args.num_intervals}, iteration", checkpoint.iteration)
        for it in checkpoint.iterations(args.Iteration + 1):
            due, last = it % args.eval_it == 0, it == args.Iteration
            if it > done["iteration"] and (due or last or it % args.print_freq == 0):
                record(run, stage, it, loss, synthetic, log, due, last)
                done["iteration"] = it
            if last:
                break
            network = student_of(it, student, args.inner_loop) if student else mixtures.at(it)
            loss.copy_(matcher.backward(network, it, mixtures.finished(it) if args.calibration else None))
            optimizer.param_groups[0]["lr"] = args.lr_img * (1 + math.cos(math.pi * it / args.Iteration)) / 2
            optimizer.step()
            synthetic.learned.clamp_(0, 1)
            if student:
                student.train_on_real(*divmod(it, args.inner_loop))
            progress.update(loss=loss)
        progress.close()
        log.close()
    run.finish(stage, args.Iteration)


def student_of(iteration, student, inner_loop):
    """Return the network of `iteration`, trained on the earlier unions and since then on real images."""
    outer, inner = divmod(iteration, inner_loop)
    if inner == 0:
        student.begin(outer)
    student.broadcast()
    return student.network


class Mixtures:
    """The networks that one stage matches with: between two neighbouring snapshots of an expert.

    Args:
        stage: from 1.
        run: `DmRun`.
    """

    def __init__(self, stage, run):
        self.experts, self.seed, self.stage = run.experts, run.args.seed, stage - 1
        self.span = window(run.args.window, stage, run.args.num_intervals, self.experts.entries - 1)
        self.network, self.end = (run.new_network("mixture").requires_grad_(False) for _ in range(2))

    def _expert(self, iteration):
        order = self.experts.order(stream(self.seed, "experts", self.stage, iteration // len(self.experts)))
        return order[iteration % len(self.experts)]

    def at(self, iteration):
        """Return the network of `iteration` (from 0)."""
        position = stream(self.seed, "mixture", self.stage, iteration).uniform(*self.span)
        set_flat(self.network, mixture(self.experts, self._expert(iteration), position))
        return self.network

    def finished(self, iteration):
        """Return the same expert at its end."""
        set_flat(self.end, self.experts.parameters(self._expert(iteration), self.experts.entries - 1))
        return self.end


class DmRun(Run):
    """A run with experts, if it needs any."""

    buffers = experts = None

    def check(self):
        super().check()
        args = self.args
        if args.transition == "union" and not args.calibration:
            return
        self.buffers = find_buffers(args.buffer_path, dm.expert_subdir(args), args.model, zca=False)
        check_data(self.buffers, recorded_fingerprint(self.buffers), self.real.info)
        shapes = [parameter.shape for parameter in self.new_network("mixture").parameters()]
        self.experts = Experts(self.buffers, shapes, 2, args.model)
        warn_of_seen_images(self.buffers, options.held_out_fraction(args))


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

"""Where the time of a row of the paper's tables goes on this device.

    python benchmarks/breakdown.py --device cuda
    python benchmarks/breakdown.py --rows tiny-mtt-ipc10 --precision bf16

A few units of each kind of work (a minibatch, a student step, a sweep, a test) are timed at the row's settings on
random pixels and multiplied by how many the scripts do. Reading data, saving and starting processes are left out.
`scripts/reproduce.py --list` shows the sums on this machine from then on.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import networks
from benchmarks import harness
from distill_idc import SAVE_EVERY
from evaluate_mtt import pool_of
from networks.precision import PRECISIONS
from networks.reparam import ReparamModule, flatten
from scripts import reproduce
from utils import multi_formation, sizes, training
from utils.augment import DSA
from utils.data.datasets import ImageDataset
from utils.data.info import KNOWN
from utils.gradient_matching import GradientMatcher
from utils.options import idc
from utils.run import files
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.stages import evaluation_config
from utils.synthetic import SyntheticSet
from utils.trajectory_matching import Step, match

TEST_IMAGES = sizes.TEST_IMAGES
STUDENT_STEPS = 4  # that are timed, of an iteration


class Units:
    """Seconds of single units of work on the images of one data set, measured when they are asked for."""

    def __init__(self, info, device, repeats):
        self.info, self.device, self.repeats = info, device, repeats
        self.known = {}

    def seconds(self, work):
        """Return the median seconds of `work`, after a first call that does not count."""
        found = []
        for turn in range(self.repeats + 1):
            begun = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            found += [time.perf_counter() - begun] if turn else []
        return statistics.median(found)

    def images(self, count):
        info = self.info
        pixels = torch.randint(256, (count, info.channel, info.im_size, info.im_size), dtype=torch.uint8)
        labels = torch.arange(count) % info.num_classes
        return ImageDataset(pixels.to(self.device), labels.to(self.device), (info.mean, info.std))

    def network(self, spec):
        if isinstance(spec, dict):
            return networks.idc_network(**self.info.network_shape, **spec).to(self.device)
        return networks.get_network(spec, **self.info.network_shape).to(self.device)

    def epoch(self, spec, config, count):
        """Return the seconds of one epoch on `count` images with network `spec`, from one minibatch."""
        size = min(config.batch_size, count)
        key = str((spec, size, config.precision, config.imagenet))
        if key not in self.known:
            network, images, rng = self.network(spec), self.images(size), np.random.default_rng(0)
            optimizer = training.sgd(network, config)
            self.known[key] = self.seconds(lambda: training.train_epoch(network, optimizer, images, config, rng))
        return self.known[key] * count / size

    def test(self, spec):
        """Return the seconds of one measurement of the accuracy."""
        key = f"test {spec}"
        if key not in self.known:
            network, batch = self.network(spec), training.testing_batch(self.info.im_size)
            images = self.images(batch)
            self.known[key] = self.seconds(lambda: training.accuracy(network, images)) * TEST_IMAGES / batch
        return self.known[key]


def matching_iteration(units, args, count):
    """Return the seconds of one iteration of distill_mtt.py with `count` images in a minibatch."""
    student = ReparamModule(units.network(args.model), precision=args.precision)
    union, dsa, rng = units.images(count), DSA(args.dsa_strategy), np.random.default_rng(0)
    images, labels = union.batch(slice(None))
    start, lr = flatten(student.network.parameters()), torch.tensor(args.lr_teacher, device=units.device)
    index = torch.arange(count, device=units.device)
    kept = 0 if args.kept_steps == 0 else STUDENT_STEPS

    def step():
        draw = dsa.draw(len(index), rng)
        return Step(index, lambda x: dsa.apply(x, draw))

    def work():
        match(student, start, start + 1, lr, images, labels, [step() for _ in range(STUDENT_STEPS)], 0, kept)

    return units.seconds(work) * args.syn_steps / STUDENT_STEPS


def mtt_parts(steps, info, train_images, device, repeats):
    """Return {(script, part): seconds} of a row of PDD+MTT."""
    experts, args, evaluation = (step.args for step in steps)
    units, dsa, model = Units(info, device, repeats), DSA(args.dsa_strategy), args.model
    stages, unions = args.num_intervals, [args.ipc * info.num_classes * p for p in range(1, args.num_intervals + 1)]
    real_config = training.TrainConfig(1, 0.01, batch_size=args.batch_train, dsa=dsa, precision=args.precision)

    def on_unions(model, epochs, counts):
        config = evaluation_config(epochs, 0.01, args.batch_train, dsa, precision=args.precision)
        return sum(config.epochs * units.epoch(model, config, count) for count in counts)

    def evaluated(model, epochs):
        return on_unions(model, epochs, unions) + stages * units.test(model)

    real_epoch = units.epoch(model, real_config, train_images)
    pool, evaluations = networks.eval_pool(args.eval_mode, model), args.Iteration // args.eval_it + 1
    batches = [min(args.batch_syn or unions[0], count) for count in unions]
    iterations = {count: matching_iteration(units, args, count) for count in set(batches)}
    trajectory = args.start_sampling_epoch + args.max_start_epoch + args.expert_epochs + 1
    found = {
        ("buffer_mtt.py", "experts"): experts.num_experts * experts.train_epochs * real_epoch,
        ("distill_mtt.py", "matching"): args.Iteration * sum(iterations[count] for count in batches),
        ("distill_mtt.py", "in-stage evaluation"): sum(
            evaluations * args.num_eval * evaluated(name, args.override_epoch_eval_train) for name in pool
        ),
        ("distill_mtt.py", "transitions"): experts.num_experts * (
            on_unions(model, args.override_epoch_eval_train, unions[:-1]) + (stages - 1) * trajectory * real_epoch
        ),
    }  # fmt: skip
    final, epochs = 0.0, evaluation.epoch_eval_train
    for name in pool_of(evaluation):
        own = name == evaluation.model
        trained = (1 + (own and not evaluation.skip_fresh) + (not evaluation.skip_random)) * evaluated(name, epochs)
        if own and stages > 1 and not evaluation.skip_fresh:  # on the last union at once
            trained += on_unions(name, stages * epochs, unions[-1:]) + units.test(name)
        final += (evaluation.num_experts if own else evaluation.num_eval) * trained
        if not evaluation.skip_full:
            in_all = evaluation.full_networks * evaluation.full_epochs
            final += in_all * units.epoch(name, real_config, train_images)
    return found | {("evaluate_mtt.py", "final evaluation"): final}


def idc_parts(steps, info, train_images, device, repeats):
    """Return {(script, part): seconds} of a row of PDD+IDC."""
    args, evaluation = (step.args for step in steps)
    units, spec, stages = Units(info, device, repeats), idc.network_spec(args), args.num_intervals
    decoded = [
        info.num_classes * len(multi_formation.origins(args.ipc * p, args.factor, args.decode_type, args.batch_syn_max))
        for p in range(1, stages + 1)
    ]
    outer = sizes.idc_iterations(vars(args))
    sweeps = [outer * args.inner_loop * sweep(units, args, stage) for stage in sorted({1, stages})]
    real = idc.train_config(args, args.net_epoch, real_images=True)
    images = (args.n_data // args.batch_size + 1) * min(args.batch_size, train_images)

    def on_unions(name, epochs, counts):
        config = idc.train_config(args, epochs)
        return sum(epochs * units.epoch(name, config, count) for count in counts)

    transitions, starts = max(1, args.epochs // 5), args.transition_pool or outer
    evaluations = -(-outer // SAVE_EVERY) * args.repeat * (not args.test)
    found = {
        ("distill_idc.py", "sweeps"): stages * statistics.mean(sweeps),
        ("distill_idc.py", "network updates"):
            stages * outer * args.inner_loop * args.net_epoch * units.epoch(spec, real, images),
        ("distill_idc.py", "earlier-union training"): sum(
            starts * on_unions(spec, transitions, decoded[:p]) for p in range(stages)
        ),
        ("distill_idc.py", "in-stage evaluation"): sum(
            evaluations * (on_unions(spec, args.epochs, decoded[:p]) + p * units.test(spec))
            for p in range(1, stages + 1)
        ),
    }  # fmt: skip
    final, trained = 0.0, decoded[-1:] if evaluation.last_only else decoded
    for name in evaluation.eval_models:
        which = spec if name == "self" else name
        one = on_unions(which, evaluation.epochs, trained) + len(trained) * evaluation.checks * units.test(which)
        final += evaluation.repeat * one * (1 if evaluation.skip_random else 2)
        if not evaluation.skip_full:
            epochs = evaluation.full_networks * evaluation.full_epochs
            final += epochs * units.epoch(which, idc.train_config(evaluation, epochs), train_images)
    return found | {("evaluate_idc.py", "final evaluation"): final}


def sweep(units, args, stage):
    """Return the seconds of one sweep in `stage` (from 1)."""
    info, count = units.info, args.ipc * stage
    shape = info.num_classes * count, info.channel, info.im_size, info.im_size
    labels = torch.arange(info.num_classes, device=units.device).repeat_interleave(count)
    union = SyntheticSet(torch.rand(shape, device=units.device), labels, counts=[len(labels) // stage] * stage)
    real = units.images(args.batch_real * info.num_classes)
    indices = [np.arange(args.batch_real) * info.num_classes + label for label in range(info.num_classes)]
    data = argparse.Namespace(info=info, train=real, class_indices=indices)
    matcher, number = GradientMatcher(data, union, idc.match_config(args)), itertools.count()
    network = units.network(idc.network_spec(args))
    return units.seconds(lambda: matcher.sweep(network, next(number)))


def measure(row, scale, device, precision, repeats):
    """Return {(script, part): seconds} of a row of scripts/reproduce.py."""
    options = argparse.Namespace(scale=scale, data_path=None, buffer_path=None, root_log_dir=None, preset=None)
    steps = reproduce.steps_of(row, options, {"precision": [precision]})
    name = getattr(steps[0].args, "data", steps[0].args.dataset)
    parts = mtt_parts if "mtt" in row else idc_parts
    return parts(steps, dataclasses.replace(KNOWN[name]), reproduce.TRAIN_IMAGES[name], device, repeats)


def main():
    options = harness.parse(
        __doc__,
        ("--rows", str, "cifar10-mtt-ipc10,cifar10-idc-ipc10", "rows of scripts/reproduce.py, joined by commas"),
        ("--scale", str, "full", "of scripts/reproduce.py: full or small"),
        ("--device", str, "cpu", "cpu or cuda"),
        ("--precision", str, "fp32", f"{' or '.join(PRECISIONS)}"),
        ("--threads", int, torch.get_num_threads(), "CPU threads"),
        ("--repeats", int, 3, "timings of each unit"),
        pairs=False,
    )
    repeats, scale = (1, "small") if options.smallest else (options.repeats, options.scale)
    device = setup_device(options.device, options.precision)
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    wanted = options.rows.split(",")
    if unknown := [row for row in wanted if row not in reproduce.ROWS or "-dm-" in row]:
        raise UserError(f"--rows {unknown[0]}: expected rows of PDD+MTT or PDD+IDC; scripts/reproduce.py --list")
    for row in wanted:
        parts = measure(row, scale, device, options.precision, repeats)
        total = sum(parts.values())
        rows = [
            {"label": part, "script": script, "seconds": seconds, "share": seconds / total}
            for (script, part), seconds in parts.items()
        ]
        lines = [
            (found["script"], found["label"], f"{found['seconds']:.0f}", f"{100 * found['share']:.1f} %")
            for found in rows
        ]
        about = f"{machine}, {options.precision}; torch {torch.__version__}"
        title = f"{row} --scale {scale}: {total / 3600:.3g} hours, estimated"
        harness.show(title, about, ("script", "part", "seconds", "share"), lines, rows, options)
        if not options.smallest:
            seconds = dict.fromkeys((script for script, _ in parts), 0.0)
            for (script, _), part in parts.items():
                seconds[script] += part
            reproduce.SPEED.parent.mkdir(parents=True, exist_ok=True)
            known = reproduce.measured_speed() | {f"{row} {scale}": {"on": about, "seconds": seconds}}
            files.write_json(reproduce.SPEED, known)


if __name__ == "__main__":
    harness.run(main)

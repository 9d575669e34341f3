"""Distil a data set in stages by matching gradients class by class: PDD+IDC.

    # CIFAR-10, 10 images per class in 5 stages of 2
    python -u distill_idc.py --reproduce -d cifar10 -f 2 --ipc 2 --data_dir data --tag progressive --niter 2000

Each stage learns ipc images of every class while those of earlier stages stay frozen: they are part of every synthetic
batch, and the networks whose gradients are matched are first trained on the earlier unions. The same command again
continues an interrupted run; --start-interval i begins at stage i (from 0) from what is on disk. The files are
results/{dataset}/{folder}/interval_{i}_data.pt: [images (N, C, H, W) in [0, 1], labels (N,)], class after class.

    # all GPUs of a machine: the classes of every sweep and the networks of transitions and evaluations are spread
    torchrun --standalone --nproc_per_node=gpu distill_idc.py …
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
import time
from pathlib import Path

import torch

from utils import options, sizes
from utils.gradient_matching import GradientMatcher
from utils.idc_runs import Run, learn_stages, record
from utils.options import FLAG, Parser
from utils.options import idc as idc_options
from utils.pretrained import find_pretrained, load_pretrained, pretrain
from utils.results import names
from utils.run.device import setup_device
from utils.run.log import Progress, log0, print0
from utils.run.main import run_script
from utils.run.streams import stream

SAVE_EVERY = 50  # outer iterations
OOM_ADVICE = "--batch_syn_max, --batch_real, --batch_size, --transition_batch 1 or a smaller --width"

PRETRAIN = [("--pretrain", FLAG, False, "make the networks of --pt_from and --pt_num, then stop")]


def parse():
    parser = Parser(__doc__)
    idc_options.add_options(parser)
    parser.add_options("evaluation in a stage", options.SELECT_ON)
    parser.add_options("real images", options.DROP_EASY)
    parser.add_options("speed", idc_options.SPEED + PRETRAIN)
    parser.add_options("machine", options.MACHINE)
    args = idc_options.resolve(parser)
    if args.pretrain and args.pt_from < 1:
        parser.error("--pretrain: expected --pt_from EPOCHS, the epochs to train, found none")
    if args.pt_from >= 0 and not args.early:  # nothing is trained before the first sweep
        parser.refuse(("transition_batch", "transition_pool"), "with --pt_from and without --early")
    return args


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    if args.phase >= 0 or args.nclass_sub >= 0:
        log0(
            "note: --phase and --nclass_sub change nothing: one command learns all classes, over many processes if "
            "torchrun starts it"
        )
    real = options.held_out(args, idc_options.load_data(args, device))
    spec, smallest = idc_options.network_spec(args), args.ipc * args.factor**2
    options.check_network(spec, real, idc_options.network_title(args), smallest)
    run = IdcRun(args, real, idc_options)
    if args.pretrain and args.dry_run:
        size = sizes.idc_pretraining(vars(args), real.info, len(real.train), run.pretrained_epochs)
        print0(options.dry_run(args, {"data": idc_options.data_folder(args)}, run.pretrained, size))
        return
    if args.pretrain:
        config = idc_options.train_config(args, run.pretrained_epochs[-1], real_images=True)
        network = run.new_network("pretrain", args.seed)
        pretrain(run.pretrained, network, real, config, args.seed, run.pretrained_epochs, run.held_out_suffix)
        return
    run.check()
    size = sizes.idc_distillation(vars(args), real.info, len(real.train))
    learn_stages(run, learn_subset, {"data": idc_options.data_folder(args)}, size)


def learn_subset(stage, run):
    """Learn the images of `stage` (from 1) and write its union."""
    args = run.args
    real = run.real_of(stage)
    synthetic = run.union(stage - 1).extended(*run.init_subset(stage, real))
    matcher = GradientMatcher(real, synthetic, idc_options.match_config(args), args.seed, stage - 1)
    student = run.student_of(stage, synthetic.union(stage - 1), real)
    log, loss, done = run.log(stage), torch.zeros((), device=run.device), {"outer": 0}
    state = {"images": synthetic.learned, "momentum": matcher.momentum_buffer, "student": student, "loss": loss,
             "done": done, "log": log}  # fmt: skip
    with run.checkpoint(stage, state) as checkpoint:
        log.begin()
        if not checkpoint.iteration:
            run.save_grid(stage, "init", synthetic)
        sweeps = run.outer_iterations * args.inner_loop
        progress = Progress(sweeps, f"stage {stage}/{args.num_intervals}, sweep", checkpoint.iteration)
        begun = time.monotonic()
        for number in checkpoint.iterations(sweeps + 1):
            outer, inner = divmod(number, args.inner_loop)
            if inner == 0 and outer > done["outer"]:
                last, due = outer == run.outer_iterations, outer % SAVE_EVERY == 0
                record(run, stage, outer, loss / args.inner_loop, synthetic, log, due, last)
                done["outer"] = outer
            if outer == run.outer_iterations:
                break
            if inner == 0:
                begun = time.monotonic()
                loss.zero_()
                synthetic.learned.clamp_(0, 1)
                student.begin(outer)
            student.broadcast()
            loss += matcher.sweep(student.network, number)
            student.train_on_real(outer, inner)
            progress.update(loss=loss / (inner + 1))
            if args.time and inner == args.inner_loop - 1:
                log0(f"outer iteration {outer}: {time.monotonic() - begun:.2f} s")
        progress.close()
        log.close()
    run.finish(stage, run.outer_iterations)


class IdcRun(Run):
    """A run whose networks may start from pretrained ones."""

    unit = "outer iteration"

    def __init__(self, args, real, method):
        super().__init__(args, real, method)
        self.outer_iterations = sizes.idc_iterations(vars(args))
        self.pretrained = Path("pretrained") / idc_options.dataset_subdir(args) / names.idc_model(vars(args))
        self.pretrained_epochs = range(args.pt_from, args.pt_from + args.pt_num)
        self.held_out_suffix = f"_val{args.val_fraction:g}" if args.select_on == "val" else ""

    def check(self):
        super().check()
        if self.args.pt_from >= 0:
            for path in self.find_pretrained():
                load_pretrained(path, self.new_network("check"))

    def find_pretrained(self):
        return find_pretrained(self.pretrained, self.pretrained_epochs, self.held_out_suffix)

    def student_of(self, stage, earlier, real):
        """Return the `Student` of `stage` (from 1), conditioned on the union before or on pretrained networks."""

        def start(number):
            keys, paths = ("student", stage - 1, number), self.find_pretrained()
            chosen = paths[int(stream(self.args.seed, "pretrained", *keys).integers(len(paths)))]
            return load_pretrained(chosen, self.new_network(*keys))

        start = start if self.args.pt_from >= 0 else None
        return self.student(stage, earlier, real, self.outer_iterations, start)


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

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

from utils import forgetting, multi_formation, options, sizes, training
from utils.gradient_matching import GradientMatcher
from utils.options import COUNT, FLAG, NATURAL, Parser
from utils.options import idc as idc_options
from utils.pretrained import find_pretrained, load_pretrained, pretrain
from utils.results import known, names, report
from utils.results.provenance import DATA, check_result
from utils.run import distributed, files
from utils.run.checkpoint import Checkpoint, finish_each, forget_finished
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.run.log import Log, Progress, log0, print0, read_rows
from utils.run.main import run_script
from utils.run.streams import stream
from utils.stages import staged_accuracies
from utils.students import Student, StudentConfig
from utils.synthetic import empty_set, init_subset, load_idc, save_idc

FORGETTING_EPOCHS = 10  # of a network that --drop_easy trains
SAVE_EVERY = 50  # outer iterations
OOM_ADVICE = "--batch_syn_max, --batch_real, --batch_size, --transition_batch 1 or a smaller --width"

SPEED = [
    ("--transition_batch", COUNT, 1, "outer iterations whose networks are trained on the earlier unions together"),
    ("--transition_pool", NATURAL, 0, "train this many networks on the earlier unions once and use them in turn; 0 "
     "trains a new one for every outer iteration, as published"),
    ("--pretrain", FLAG, False, "make the networks of --pt_from and --pt_num, then stop"),
]  # fmt: skip


def parse():
    parser = Parser(__doc__)
    idc_options.add_options(parser, "begin at this stage (from 0)")
    parser.add_options("evaluation in a stage", options.SELECT_ON)
    parser.add_options("real images", options.DROP_EASY)
    parser.add_options("speed", SPEED)
    parser.add_options("machine", options.MACHINE)
    args = idc_options.resolve(parser)
    if args.start_interval >= args.num_intervals:
        parser.error(f"--start-interval {args.start_interval}: expected less than --num-intervals {args.num_intervals}")
    if args.pretrain and args.pt_from < 1:
        parser.error("--pretrain: expected --pt_from EPOCHS, the epochs to train, found none")
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
    idc_options.check_network(args, real)
    run = Run(args, real)
    if args.pretrain:
        config = idc_options.train_config(args, run.pretrained_epochs[-1], real_images=True)
        network = run.new_network("pretrain", args.seed)
        pretrain(run.pretrained, network, real, config, args.seed, run.pretrained_epochs, run.held_out_suffix)
        return
    size = run.check()
    if args.dry_run:
        print0(options.dry_run(args, {"data": idc_options.data_folder(args)}, run.folder, size))
        return
    files.need_disk(run.folder, size.disk, "the results")
    with files.locked(run.folder):
        distributed.on_rank0(run.claim)
        for stage in range(args.start_interval + 1, args.num_intervals + 1):
            if names.read_idc_stage(run.folder, stage):
                run.union(stage)
                run.remove_checkpoint(stage)
                log0(f"stage {stage}: done already")
            else:
                learn_subset(stage, run)
        for name in ("evaluation", "starts"):
            forget_finished(run.folder, name)
    print0(f"{run.folder}: done, {args.num_intervals} stages")


def learn_subset(stage, run):
    """Learn the images of `stage` (from 1) and write its union."""
    args = run.args
    for before in range(1, stage):
        if run.log_path(before).exists():  # log.txt will hold its rows
            read_rows(run.log_path(before))
    real = run.real_of(stage)
    synthetic = run.union(stage - 1).extended(*run.init_subset(stage, real))
    matcher = GradientMatcher(real, synthetic, idc_options.match_config(args), args.seed, stage - 1)
    student = run.student(stage, synthetic.union(stage - 1), real)
    log, loss, done = Log(run.log_path(stage), args.wandb, vars(args)), torch.zeros((), device=run.device), {"outer": 0}
    state = {"images": synthetic.learned, "momentum": matcher.momentum_buffer, "student": student, "loss": loss,
             "done": done, "log": log}  # fmt: skip
    with run.checkpoint(stage, state) as checkpoint:
        if not checkpoint.iteration:
            run.save_grid(stage, "init", synthetic)
        sweeps = run.outer_iterations * args.inner_loop
        progress = Progress(sweeps, f"stage {stage}/{args.num_intervals}, sweep", checkpoint.iteration)
        begun = time.monotonic()
        for number in checkpoint.iterations(sweeps + 1):
            outer, inner = divmod(number, args.inner_loop)
            if inner == 0 and outer > done["outer"]:
                finish_outer(stage, outer, loss / args.inner_loop, synthetic, log, run)
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
                progress.say(f"outer iteration {outer}: {time.monotonic() - begun:.2f} s")
        progress.close()
        log.close()
    run.finish(stage)


def finish_outer(stage, done, loss, synthetic, log, run):
    """Save, evaluate and log what `done` outer iterations have learned, each when it is time."""
    args, last = run.args, done == run.outer_iterations
    if not bool(torch.isfinite(loss)) or not bool(synthetic.learned.isfinite().all()):
        raise UserError(
            f"stage {stage}, outer iteration {done - 1}: the loss or an image became NaN or infinite; the files saved "
            "before are kept; lower --lr_img or --lr"
        )
    accuracies = None
    if done % SAVE_EVERY == 0 or last:
        run.save(stage, done, synthetic)
        accuracies = None if args.test else evaluate(stage, done, synthetic.clamped(), run)
    if done % args.print_freq == 0 or last:
        log.write(stage=stage - 1, iteration=done, loss=float(loss))
    if accuracies:
        mean, std = report.mean_std(accuracies)
        log.write(stage=stage - 1, iteration=done, accuracy_mean=mean, accuracy_std=std)
        distributed.on_rank0(run.write_log)
        log0(f"stage {stage}, outer iteration {done}: {run.measured} accuracy {mean:.2f} ± {std:.2f} %")


def evaluate(stage, done, synthetic, run):
    """Train `repeat` networks through the unions in order; returns their accuracies after the last."""
    args = run.args
    unions = [run.decoded(synthetic.union(last)) for last in range(1, stage + 1)]
    config = idc_options.train_config(args, args.epochs)

    def train(k):
        keys = ("evaluation", stage - 1, done, k)
        network = run.new_network(*keys)
        test = run.real.selection
        accuracies = staged_accuracies(network, unions, lambda _: config, test, args.seed, keys, carry=False)
        if args.save_ckpt:
            path = run.folder / f"interval_{stage - 1}_network_{k}.pt"
            files.save(path, training.state_on_cpu(network))
        return accuracies[-1][-1]

    key = [options.config_of(args), stage, done, synthetic.images]
    return finish_each(run.folder, "evaluation", key, list(range(args.repeat)), train)


class Run:
    """One distillation: its options, its data, and where its files are. Random streams count stages from 0."""

    def __init__(self, args, real):
        self.args, self.real, self.device = args, real, real.train.images.device
        self.folder = idc_options.result_folder(args)
        self.measured = names.MEASURED_ON[args.select_on]
        self.outer_iterations = sizes.idc_iterations(vars(args))
        self.pretrained = Path("pretrained") / idc_options.dataset_subdir(args) / names.idc_model(vars(args))
        self.pretrained_epochs = range(args.pt_from, args.pt_from + args.pt_num)
        self.held_out_suffix = f"_val{args.val_fraction:g}" if args.select_on == "val" else ""

    def check(self):
        """Refuse what cannot work before anything is written; returns the run's size."""
        args, first = self.args, self.args.start_interval + 1
        if (self.folder / DATA).exists():
            check_result(self.folder, self.real.info)
        self.union(first - 1)
        if args.pt_from >= 0:
            for path in find_pretrained(self.pretrained, self.pretrained_epochs, self.held_out_suffix):
                load_pretrained(path, self.new_network("check"))
        self.init_subset(first, self.real)
        options.warn_of_few_images(self.real, ipc=args.ipc * args.num_intervals)
        return sizes.idc_distillation(vars(args), self.real.info, len(self.real.train))

    def claim(self):
        """Tie the folder to this run's options and data; write args.txt: one line for each option."""
        args, folder = self.args, self.folder
        begun = {"defaults": options.CONFIG_DEFAULTS, "behaviour": options.BEHAVIOUR}
        content = files.check_config(folder, vars(args), options.RESUMABLE_CHANGES, **begun)
        options.refuse_other_behaviour(folder, content, names.read_idc_stage(folder, args.num_intervals))
        known.save_info(folder, self.real.info)
        if not (folder / "args.txt").exists():
            with files.atomic(folder / "args.txt", "w") as file:
                file.writelines(f"{name}: {value}\n" for name, value in vars(args).items())

    def real_of(self, stage):
        """Return the real data of `stage`: all, or with --drop_easy the images that are harder to learn."""
        args = self.args
        fraction = forgetting.dropped_fraction(args.drop_easy, stage, args.num_intervals)
        if not fraction:
            return self.real
        config = idc_options.train_config(args, FORGETTING_EPOCHS, real_images=True)
        key = [self.real.info.fingerprint, options.config_of(args)]

        def compute():
            return forgetting.training_scores(
                lambda k: self.new_network("forgetting", k), config, self.real.train, args.seed
            )

        path, count = self.folder / forgetting.FILE, len(self.real.train)
        scores = distributed.on_rank0(lambda: forgetting.cached(path, key, count, compute))
        return forgetting.without_easy(self.real, scores, fraction)

    def init_subset(self, stage, real):
        """Return the images that `stage` starts from, and their labels."""
        args, rng = self.args, stream(self.args.seed, "subset", stage - 1)
        return init_subset(real, args.ipc, args.init, rng, factor=args.factor, pixels=True)

    def union(self, stage):
        """Return the union of `stage`; an empty one of stage 0."""
        if stage == 0:
            return empty_set(self.real)
        return load_idc(self.folder, stage, self.real.info, self.args.ipc, self.device)

    def new_network(self, *keys):
        return training.new_network(idc_options.network_spec(self.args), self.real, self.args.seed, *keys)

    def student(self, stage, earlier, real):
        """Return the `Student` of `stage` (from 1), conditioned on the union before."""
        args, config = self.args, idc_options.train_config

        def new_network(number):
            keys = ("student", stage - 1, number)
            if args.pt_from < 0:
                return self.new_network(*keys)
            paths = find_pretrained(self.pretrained, self.pretrained_epochs, self.held_out_suffix)
            chosen = paths[int(stream(args.seed, "pretrained", *keys).integers(len(paths)))]
            return load_pretrained(chosen, self.new_network(*keys))

        settings = StudentConfig(
            earlier=config(args, max(1, args.epochs // 5)),
            early=config(args, args.early, real_images=True) if args.early else None,
            real=config(args, args.net_epoch, real_images=True),
            n_data=args.n_data,
            fix_iter=args.fix_iter,
            pool=args.transition_pool,
            batch=args.transition_batch,
        )
        # A pretrained network replaces one that earlier unions have taught.
        unions = [] if args.pt_from >= 0 else [self.decoded(earlier.union(before)) for before in range(1, stage)]
        key = [options.config_of(args), stage, earlier.images]
        loops = self.outer_iterations, args.inner_loop
        return Student(new_network, unions, real.train, settings, *loops, args.seed, stage - 1, self.folder, key)

    def decoded(self, union):
        """Return the decoded images of a `SyntheticSet` to train on."""
        images = union.by_class(self.real.info.num_classes)
        decoded = multi_formation.decode_union(images, self.args.factor, self.args.decode_type)
        return self.real.pixel_dataset(*decoded)

    def checkpoint(self, stage, state):
        path = self.folder / f"interval_{stage - 1}_checkpoint.pt"
        return Checkpoint(path, self.args.checkpoint_minutes, options.config_of(self.args), **state)

    def log_path(self, stage):
        return self.folder / f"interval_{stage - 1}_metrics.jsonl"

    def save(self, stage, done, synthetic):
        """Write the union and the picture of its newest images; pixels are in [0, 1]."""
        if distributed.is_rank0():
            save_idc(self.folder, stage, synthetic.clamped(), self.real.info.num_classes)
        self.save_grid(stage, f"img{done}", synthetic)

    def save_grid(self, stage, name, synthetic):
        if distributed.is_rank0():
            labels = synthetic.labels[synthetic.first_learned :]
            report.save_grid(self.folder / f"interval_{stage - 1}_{name}.png", synthetic.learned, labels)

    def write_log(self):
        """Write log.txt: the rows of all stages' metrics as plain lines."""
        paths = sorted(self.folder.glob("interval_*_metrics.jsonl"), key=lambda path: int(path.name.split("_")[1]))
        rows = [row for path in paths for row in read_rows(path)]
        with files.atomic(self.folder / "log.txt", "w") as file:
            file.writelines("  ".join(f"{name} {value:.6g}" for name, value in row.items()) + "\n" for row in rows)

    def finish(self, stage):
        """Write that `stage` is complete; the state of its loop goes."""
        done = {"stage": stage - 1, **names.selection(vars(self.args)), "iterations": self.outer_iterations}
        distributed.on_rank0(lambda: files.write_json(names.idc_summary(self.folder, stage), done | {"complete": True}))
        self.remove_checkpoint(stage)

    def remove_checkpoint(self, stage):
        if distributed.is_rank0():
            (self.folder / f"interval_{stage - 1}_checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

"""What the runs of PDD+IDC and PDD+DM share: stages that learn pixels, a folder of class-major files, evaluations.

The files are results/{dataset}/{folder}/interval_{i}_data.pt: [images (N, C, H, W) in [0, 1], labels (N,)], class after
class, and what stands beside them.
"""

import contextlib

import torch

from . import forgetting, multi_formation, options, training
from .idc_student import Student, StudentConfig
from .results import known, names, report
from .results.provenance import DATA, check_result
from .run import distributed, files
from .run.checkpoint import Checkpoint, finish_each, forget_finished
from .run.errors import UserError
from .run.log import Log, Progress, log0, print0, read_rows
from .run.streams import stream
from .stages import staged_accuracies
from .synthetic import empty_set, init_subset, load_idc, save_idc

FORGETTING_EPOCHS = 10  # of a network that --drop_easy trains


class Run:
    """One distillation: its options, its data, and where its files are. Random streams count stages from 0.

    Args:
        args: the options.
        real: `RealData`.
        method: module of the base method's options (utils/options/idc.py, dm.py).
    """

    unit = "iteration"  # what the log and its messages count

    def __init__(self, args, real, method):
        self.args, self.real, self.method, self.device = args, real, method, real.train.images.device
        self.folder = method.result_folder(args)
        self.measured = names.MEASURED_ON[args.select_on]

    def check(self):
        """Refuse what cannot work before anything is written."""
        args, first = self.args, self.args.start_interval + 1
        if (self.folder / DATA).exists():
            check_result(self.folder, self.real.info)
        self.union(first - 1)
        if first > 1 and not names.idc_learned(self.folder, first - 1):
            raise UserError(
                f"{self.folder}: expected stage {first - 1} finished, found it interrupted; continue it by the same "
                "command without --start-interval"
            )
        last = args.num_intervals  # which has the fewest real images
        forgetting.note_one_stage(args.drop_easy, last)
        self.init_subset(last, forgetting.as_many(self.real, args.drop_easy, last, last))
        options.warn_of_few_images(self.real, ipc=args.ipc * args.num_intervals)

    def claim(self):
        """Tie the folder to this run's options and data; write args.txt: one line for each option."""
        args, folder = self.args, self.folder
        begun = {"defaults": options.CONFIG_DEFAULTS, "behaviour": options.BEHAVIOUR}
        content = files.check_config(folder, vars(args), options.RESUMABLE_CHANGES, **begun)
        options.refuse_other_behaviour(folder, content, names.read_idc_stage(folder, args.num_intervals))
        if args.dry_run:
            return
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
        config = self.method.train_config(args, FORGETTING_EPOCHS, real_images=True)
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
        return training.new_network(self.method.network_spec(self.args), self.real, self.args.seed, *keys)

    def student(self, stage, earlier, real, outer_iterations, new_network=None):
        """Return the `Student` of `stage` (from 1).

        Args:
            earlier: the union before, whose unions its networks are trained on.
            new_network: as `Student` takes it, for networks that no earlier union teaches.
        """
        args, config = self.args, self.method.train_config
        settings = StudentConfig(
            earlier=config(args, max(1, args.epochs // 5)),
            early=config(args, args.early, real_images=True) if args.early else None,
            real=config(args, args.net_epoch, real_images=True),
            n_data=args.n_data,
            fix_iter=args.fix_iter,
            pool=args.transition_pool,
            batch=args.transition_batch,
        )
        unions = [] if new_network else [self.decoded(earlier.union(before)) for before in range(1, stage)]
        new_network = new_network or (lambda number: self.new_network("student", stage - 1, number))
        key, loops = [options.config_of(args), stage, earlier.images], (outer_iterations, args.inner_loop)
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

    def log(self, stage):
        """Return the `Log` of `stage`; those of earlier stages must be whole, since log.txt will hold their rows."""
        for before in range(1, stage):
            if self.log_path(before).exists():
                read_rows(self.log_path(before))
        return Log(self.log_path(stage), self.args.wandb, vars(self.args))

    def save(self, stage, done, synthetic):
        """Write the union and a grid of its newest images; pixels are in [0, 1]."""
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

    def finish(self, stage, iterations):
        """Write that `stage` is complete; the state of its loop goes."""
        done = {"stage": stage - 1, **names.selection(vars(self.args)), "iterations": iterations, "complete": True}
        distributed.on_rank0(lambda: files.write_json(names.idc_summary(self.folder, stage), done))
        self.remove_checkpoint(stage)

    def remove_checkpoint(self, stage):
        if distributed.is_rank0():
            (self.folder / f"interval_{stage - 1}_checkpoint.pt").unlink(missing_ok=True)


def learn_stages(run, learn_subset, inputs, size):
    """Learn every stage that is not on disk yet; with --dry_run say what that takes.

    Args:
        run: `Run`.
        learn_subset: function of (stage, run).
        inputs: {what: path} of the run's inputs.
        size: `sizes.Size` of the run.
    """
    args = run.args
    if args.dry_run:
        distributed.on_rank0(run.claim)
        print0(options.dry_run(args, inputs, run.folder, size))
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


def record(run, stage, done, loss, synthetic, log, evaluates, last):
    """Save, evaluate and log what `done` iterations of `stage` have learned, each when it is time.

    Args:
        loss: of the last iteration (0-dim).
        evaluates: it is time to save and to evaluate.
        last: the stage ends.

    Raises:
        UserError: the loss or an image is NaN or infinite.
    """
    args = run.args
    if not bool(torch.isfinite(loss)) or not bool(synthetic.learned.isfinite().all()):
        raise UserError(
            f"stage {stage}, {run.unit} {done - 1}: the loss or an image became NaN or infinite; the files saved "
            "before are kept; lower --lr_img or --lr"
        )
    accuracies = None
    if evaluates or last:
        run.save(stage, done, synthetic)
        accuracies = None if args.test else evaluate(run, stage, done, synthetic.clamped())
    if done % args.print_freq == 0 or last:
        log.write(stage=stage - 1, iteration=done, loss=float(loss))
    if accuracies:
        mean, std = report.mean_std(accuracies)
        log.write(stage=stage - 1, iteration=done, accuracy_mean=mean, accuracy_std=std)
        distributed.on_rank0(run.write_log)
        found = report.accuracy_text(mean, std, args.repeat)
        log0(f"stage {stage}, {run.unit} {done}: {run.measured} accuracy {found} %")


def evaluate(run, stage, done, synthetic):
    """Train `repeat` networks through the unions in order; returns their accuracies after the last."""
    args = run.args
    unions = [run.decoded(synthetic.union(last)) for last in range(1, stage + 1)]
    config = run.method.train_config(args, args.epochs)

    def train(k):
        keys = ("evaluation", stage - 1, done, k)
        network, test = run.new_network(*keys), run.real.selection
        with contextlib.closing(Progress(stage * config.epochs, f"evaluation, network {k + 1}, epoch")) as progress:
            accuracies = staged_accuracies(
                network, unions, lambda _: config, test, args.seed, keys, carry=False, progress=progress
            )
        if args.save_ckpt:
            path = run.folder / f"interval_{stage - 1}_network_{k}.pt"
            files.save(path, training.state_on_cpu(network))
        return accuracies[-1][-1]

    key = [options.config_of(args), stage, done, synthetic.images]
    return finish_each(run.folder, "evaluation", key, list(range(args.repeat)), train)

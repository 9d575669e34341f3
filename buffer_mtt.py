"""Record expert trajectories on real data: the first step of PDD+MTT.

    python buffer_mtt.py --dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data

Each expert is a fresh network trained by SGD; its parameters at the start and after every epoch are its trajectory.
The files are {buffer_path}/{dataset}[_NO_ZCA]/{model}/replay_buffer_{n}.pt, each a list of save_interval
trajectories. The same command again continues where it was, or says that all is done.

    # the experts spread over all GPUs of a machine, or over a job array of n commands; the files are the same
    torchrun --standalone --nproc_per_node=gpu buffer_mtt.py …
    python buffer_mtt.py … --shard i/n
"""

import utils.run.quiet_imports  # noqa: F401 - before anything slow

# isort: split
import argparse
import contextlib
import re

from utils import options, sizes, training
from utils.augment import DSA, DCAugment
from utils.options import COUNT, FLAG, FRACTION, POSITIVE, RATE, RESUMABLE_CHANGES, Parser, mtt
from utils.results.provenance import check_data
from utils.run import distributed, files
from utils.run.checkpoint import PARTIAL
from utils.run.device import setup_device
from utils.run.errors import UserError
from utils.run.log import Progress, log0, print0
from utils.run.main import run_script
from utils.run.streams import stream
from utils.trajectories import (
    BUFFER_CONFIG,
    BufferWriter,
    buffer_files,
    buffer_folder,
    is_finite,
    load_buffer,
    record_trajectory,
)

SHARD_LOCK = ".lock_shard"
OOM_ADVICE = "--batch_train or a narrower --model"

EXPERTS = [
    ("--buffer_path", str, "./buffers", "root folder of the buffers"),
    ("--model", options.network_name, "ConvNet", "network"),
    ("--num_experts", COUNT, 100, "experts to record"),
    ("--train_epochs", COUNT, 50, "epochs of each expert"),
    ("--lr_teacher", POSITIVE, 0.01, "learning rate"),
    ("--batch_train", COUNT, 256, "images in a minibatch"),
    ("--batch_real", COUNT, 256, options.UNUSED),
    ("--mom", RATE, 0.0, "momentum of SGD"),
    ("--l2", RATE, 0.0, "weight decay of SGD"),
    ("--decay", FLAG, False, "learning rate x 0.1 after half of the epochs"),
    ("--save_interval", COUNT, 10, "trajectories in a file"),
    ("--use-random-pruning", FLAG, False, "prune every convolution at its start"),
    ("--sparse-ratio", FRACTION, 0.0, "share of its weights to prune"),
    ("--val_fraction", FRACTION, 0.0, "share of the training images that no expert sees, for distill_mtt.py "
     "--select_on val"),
]  # fmt: skip


def parse():
    parser = Parser(__doc__)
    parser.add_options("data", mtt.DATA + mtt.AUGMENTATION)
    parser.add_options("experts", EXPERTS)
    own = [("--shard", shard, None, "i/n: record part i (from 1) of n alone; the last one merges")]
    parser.add_options("machine", options.MACHINE + options.SEED + own)
    return parser.parse_args()


def shard(text):
    """Parse --shard: i/n with 1 <= i <= n; returns (i, n)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected i/n, part i of 1 to n, found {text!r}")
    return int(match[1]), int(match[2])


def main():
    args = parse()
    device = setup_device(args.device, args.precision)
    folder = buffer_folder(args.buffer_path, mtt.dataset_subdir(args), args.model, args.zca)
    if args.use_random_pruning:
        folder = folder.with_name(f"{folder.name}_random_pruning_{args.sparse_ratio}")
    real = mtt.load_data(args, device).held_out(args.val_fraction)
    options.check_network(args.model, real, smallest=options.smallest_batch([real.train], args.batch_train))
    size = sizes.experts(vars(args), real.info, len(real.train))
    recorded = distributed.on_rank0(lambda: count_recorded(args, folder, real.info))
    if args.dry_run:
        print0(options.dry_run(args, {"data": args.data_path}, folder, size))
        return
    options.warn_of_few_images(real, args.batch_train)
    if recorded:  # nothing to write, so the folder need not allow it
        print0(f"{folder}: done, {recorded} experts are there already")
        return
    with locked(folder, args.shard):
        missing = distributed.on_rank0(lambda: find_missing(args, folder, real.info, size))
        record(args, real, BufferWriter(folder, args.num_experts, args.save_interval), missing)
    if args.shard:
        left = merge_shards(args, folder)
        if left != 0:
            others = f"{left} experts of others are missing" if left else "others are at work"
            print0(f"{folder}: shard {args.shard[0]}/{args.shard[1]} is done, {others}")
            return
    there = f"in {len(buffer_files(folder))} files" if missing else "are there already"
    print0(f"{folder}: done, {args.num_experts} experts {there}")


@contextlib.contextmanager
def locked(folder, shard):
    """Hold the folder for a whole run, or a shard's place in it: shards work beside each other, not beside a whole run.

    Raises:
        UserError: another process is in the way.
    """
    own, others = files.LOCK, distributed.on_rank0(lambda: sorted((folder / PARTIAL).glob(f"{SHARD_LOCK}*")))
    if shard:
        own, others = f"{PARTIAL}/{SHARD_LOCK}{shard[0]}of{shard[1]}", [folder / files.LOCK]
    for path in others:
        timeout = files.LOCK_TIMEOUT if shard else None
        with files.locked(folder, path.relative_to(folder), timeout, alone=False):
            pass  # nobody else is at work there
    with files.locked(folder, own, alone=not shard):
        yield


def count_recorded(args, folder, info):
    """Return how many experts `folder` holds, if they are all that are wanted; else 0.

    Raises:
        UserError: they belong to another run; or other code recorded fewer than are wanted.
    """
    if (folder / BUFFER_CONFIG).exists():
        _, writer = claim(args, folder, info)
        finished = not writer.missing() and not (folder / PARTIAL).exists()
        return args.num_experts if finished else 0
    found = sum(len(load_buffer(path)) for path in buffer_files(folder))
    if 0 < found < args.num_experts:
        raise UserError(
            f"{folder}: holds {found} experts made elsewhere, which cannot be continued; lower --num_experts "
            f"to {found} or choose another --buffer_path"
        )
    return found


def claim(args, folder, info):
    """Tie the folder to this run's options and data; returns (contents of its config file, its `BufferWriter`).

    Raises:
        UserError: it belongs to another run.
    """
    config = {name: value for name, value in vars(args).items() if name != "shard"}
    free, defaults = (*RESUMABLE_CHANGES, "num_experts"), {"val_fraction": 0.0, "precision": "fp32"}
    more = {"fingerprint": info.fingerprint, "behaviour": options.BEHAVIOUR}
    begun = files.check_config(folder, config, free, BUFFER_CONFIG, defaults, **more)
    check_data(folder / BUFFER_CONFIG, begun.get("fingerprint"), info)
    return begun, BufferWriter(folder, args.num_experts, args.save_interval)


def find_missing(args, folder, info, size):
    """Return the numbers of this run's experts that are not on disk yet.

    Raises:
        UserError: the folder belongs to another run, or the disk is too small.
    """
    begun, writer = claim(args, folder, info)
    if not args.shard:
        writer.merge()
    missing = writer.missing()
    options.refuse_other_behaviour(folder, begun, args.dsa or not missing)  # DSA's experts are what they were
    if args.shard:
        number, shards = args.shard
        missing = [expert for expert in missing if expert % shards == number - 1]
    files.need_disk(folder, size.disk * len(missing) // args.num_experts, f"{len(missing)} experts")
    return missing


def record(args, real, writer, missing):
    """Train the `missing` experts, each from its own random stream, spread over the ranks."""
    dsa = DSA(args.dsa_strategy) if args.dsa else DCAugment()
    milestones = ((args.train_epochs // 2 + 1, 0.1),) if args.decay else ()
    config = training.TrainConfig(
        args.train_epochs,
        args.lr_teacher,
        args.mom,
        args.l2,
        args.batch_train,
        dsa,
        milestones,
        precision=args.precision,
    )
    alone = distributed.size() == 1 and not args.shard
    for expert in distributed.share(missing):
        network = training.new_network(args.model, real, args.seed, "expert", expert)
        if args.use_random_pruning:
            training.prune(network, args.sparse_ratio, stream(args.seed, "pruning", expert))
        folder, keys = writer.epochs(expert), ("expert", expert, "train")
        label, done = f"expert {expert + 1}/{args.num_experts}", len(list(folder.glob("epoch_*.pt")))
        progress = Progress(args.train_epochs, f"{label}, epoch", done)
        after = lambda _epoch, loss, progress=progress: progress.update(loss=loss)  # noqa: E731
        trajectory = record_trajectory(network, real.train, config, args.seed, keys, folder, after)
        if not is_finite(trajectory):
            raise UserError(
                f"expert {expert} became NaN or infinite and was not saved; remove {writer.folder}, or choose another "
                "--buffer_path, and lower --lr_teacher"
            )
        writer.add(expert, trajectory, alone)
        test = training.accuracy(network, real.test)
        log0(f"{label}: test accuracy {test:.2f} %")
        progress.close()
    distributed.barrier()
    if not args.shard:
        distributed.on_rank0(writer.merge)


def merge_shards(args, folder):
    """Merge what all shards have recorded; returns how many experts are missing, None if a shard is at work yet."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(folder, timeout=files.LOCK_TIMEOUT, alone=False))
        except UserError:
            return None  # it merges when it is done
        writer = BufferWriter(folder, args.num_experts, args.save_interval)
        distributed.on_rank0(writer.merge)
        return len(distributed.on_rank0(writer.missing))


if __name__ == "__main__":
    run_script(main, OOM_ADVICE)

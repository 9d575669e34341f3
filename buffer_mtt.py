"""Record expert trajectories on real data: the first step of PDD+MTT.

    python buffer_mtt.py --dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data

Each expert is a fresh network trained by SGD; its parameters at the start and after every epoch are its trajectory.
The files are {buffer_path}/{dataset}[_NO_ZCA]/{model}/replay_buffer_{n}.pt, each a list of save_interval
trajectories. The same command again continues where it was, or says that all is done.

    # the experts spread over all GPUs of a machine, or over a job array of n commands; the files are the same
    torchrun --standalone --nproc_per_node=gpu buffer_mtt.py …
    python buffer_mtt.py … --shard i/n
"""

import argparse
import contextlib
import re

import utils.options as o
from utils import distributed, errors, files, report, training
from utils.augment import DSA
from utils.runtime import choose_device, stream
from utils.trajectories import BUFFER, PARTIAL, Recorder, buffer_files, buffer_folder, load_buffer

MEMORY = "--batch_train or a narrower --model"  # lower it


def parse():
    parser = o.Parser(__doc__)
    data = o.add_data(parser)
    o.add_augmentation(data)
    data.add_argument("--buffer_path", default="./buffers", help="root folder of the buffers")
    expert = parser.add_argument_group("experts")
    expert.add_argument("--model", type=o.network_name, default="ConvNet", help="network")
    expert.add_argument("--num_experts", type=o.COUNT, default=100, help="experts to record")
    expert.add_argument("--train_epochs", type=o.COUNT, default=50, help="epochs of each expert")
    expert.add_argument("--lr_teacher", type=o.POSITIVE, default=0.01, help="learning rate")
    expert.add_argument("--batch_train", type=o.COUNT, default=256, help="pictures in a minibatch")
    expert.add_argument("--batch_real", type=o.COUNT, default=256, help="accepted for old commands; not used")
    expert.add_argument("--mom", type=o.RATE, default=0.0, help="momentum of SGD")
    expert.add_argument("--l2", type=o.RATE, default=0.0, help="weight decay of SGD")
    expert.add_argument("--decay", action="store_true", help="learning rate x 0.1 after half of the epochs")
    expert.add_argument("--save_interval", type=o.COUNT, default=10, help="trajectories in a file")
    expert.add_argument("--use-random-pruning", action="store_true", help="prune every convolution at its start")
    expert.add_argument("--sparse-ratio", type=o.FRACTION, default=0.0, help="share of its weights to prune")
    expert.add_argument(
        "--val_fraction",
        type=o.FRACTION,
        default=0.0,
        help="share of the training pictures that no expert sees, for distill_mtt.py --select_on val",
    )
    machine = o.add_machine(parser)
    machine.add_argument("--shard", type=shard, help="i/n: record part i (from 1) of n alone; the last one merges")
    return parser.parse_args()


def main():
    options = parse()
    device = choose_device(options.device)
    folder = buffer_folder(options.buffer_path, o.place(options), options.model, options.zca)
    real = o.load_data(options, device).held_out(options.val_fraction)
    o.check_network(options.model, real)
    parameters = sum(p.numel() for p in training.new_network(options.model, real, options.seed).parameters())
    size = parameters * 4 * (options.train_epochs + 1) * options.num_experts
    if options.dry_run:
        report.dry_run(
            options, {"data": options.data_path}, folder, f"{steps_of(options, len(real.train))} optimiser steps", size
        )
        return

    elsewhere = distributed.first(lambda: made_elsewhere(folder, options.num_experts))
    if elsewhere:
        report.show(f"{folder}: done, {elsewhere} experts are there already")
        return
    with contextlib.ExitStack() as locks:
        hold(locks, folder, options.shard)
        missing = distributed.first(lambda: find_missing(options, folder, size))
        if missing:
            record(options, real, folder, missing)
    if options.shard:
        left = merge_shards(options, folder)
        if left != 0:
            others = f"{left} experts of others are missing" if left else "others are at work"
            report.show(f"{folder}: shard {options.shard[0]}/{options.shard[1]} is done, {others}")
            return
    there = f"in {len(buffer_files(folder))} files" if missing else "are there already"
    report.show(f"{folder}: done, {options.num_experts} experts {there}")


def shard(text):
    """Parse --shard: i/n with 1 <= i <= n; returns (i, n)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected i/n, part i of 1 to n, found {text!r}")
    return int(match[1]), int(match[2])


def hold(locks, folder, shard):
    """Take the locks of this run; those of other shards may be held beside it."""
    locks.enter_context(files.locked(folder, shared=shard is not None))
    if shard:
        locks.enter_context(files.locked(folder / PARTIAL, f".lock_shard{shard[0]}of{shard[1]}"))


def made_elsewhere(folder, wanted):
    """Return how many experts `folder` holds that this script did not record, 0 for its own.

    Raises:
        UserError: fewer than `wanted`.
    """
    if not buffer_files(folder) or (folder / BUFFER).exists():
        return 0
    found = sum(len(load_buffer(path)) for path in buffer_files(folder))
    if found < wanted:
        raise errors.UserError(
            f"{folder}: holds {found} experts made elsewhere, which cannot be continued; lower --num_experts "
            f"to {found} or choose another --buffer_path"
        )
    return found


def find_missing(options, folder, size):
    """Return the numbers of this run's experts that are not on disk yet.

    Args:
        size: of all experts in bytes.

    Raises:
        UserError: the folder belongs to another run, or the disk is too small.
    """
    given = {name: value for name, value in vars(options).items() if name != "shard"}
    files.claim(folder, given, (*o.FREE, "num_experts"), BUFFER, {"val_fraction": 0.0})
    recorder = Recorder(folder, options.num_experts, options.save_interval)
    if not options.shard:
        recorder.merge()
    missing = recorder.missing()
    if not missing:
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # of a run that ended before it could
    if options.shard:
        number, shards = options.shard
        missing = [expert for expert in missing if expert % shards == number - 1]
    files.need_disk(folder, size * len(missing) // options.num_experts, f"{len(missing)} experts")
    return missing


def merge_shards(options, folder):
    """Merge what all shards have recorded; returns how many experts are missing, None where a shard is at work yet."""
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(files.locked(folder, patience=0))
        except errors.UserError:
            return None  # it merges when it is done
        recorder = Recorder(folder, options.num_experts, options.save_interval)
        distributed.first(recorder.merge)
        return len(distributed.first(recorder.missing))


def record(options, real, folder, missing):
    """Train the `missing` experts, each from its own random stream, spread over the ranks."""
    dsa = DSA(options.dsa_strategy) if options.dsa else None
    drops = ((options.train_epochs // 2 + 1, 0.1),) if options.decay else ()
    recipe = training.Recipe(
        options.train_epochs, options.lr_teacher, options.mom, options.l2, options.batch_train, dsa, drops
    )
    recorder = Recorder(folder, options.num_experts, options.save_interval)
    alone = distributed.size() == 1 and not options.shard
    place = folder / "checkpoint.pt"
    if options.shard:
        place = folder / PARTIAL / f"checkpoint_shard{options.shard[0]}of{options.shard[1]}.pt"
    checkpoint = files.Checkpoint(place, options.checkpoint_minutes, vars(options), (*o.FREE, "num_experts", "shard"))

    def train(expert, checkpoint):
        network = training.new_network(options.model, real, options.seed, "expert", expert)
        masks = None
        if options.use_random_pruning:
            masks = training.random_masks(network, options.sparse_ratio, stream(options.seed, "pruning", expert))
        progress = report.Progress(recipe.epochs, f"expert {expert + 1}/{options.num_experts}, epoch")
        trajectory = training.record_trajectory(
            network,
            real.train,
            recipe,
            options.seed,
            ("expert", expert, "train"),
            masks,
            lambda _epoch, loss: progress.update(loss=loss),
            checkpoint,
        )
        if not all(bool(tensor.isfinite().all()) for tensor in trajectory[-1]):
            raise errors.UserError(f"expert {expert} became NaN or infinite and was not saved; lower --lr_teacher")
        test = training.accuracy(network, real.test)
        recorder.add(expert, trajectory, alone)
        progress.say(f"expert {expert + 1}/{options.num_experts}: test accuracy {test:.2f} %")
        progress.close()

    checkpoint.spread("experts", (), missing, train)
    checkpoint.clear()
    if not options.shard:
        distributed.first(recorder.merge)


def steps_of(options, pictures):
    """Return the optimiser steps of the whole run."""
    return options.num_experts * options.train_epochs * -(-pictures // options.batch_train)


if __name__ == "__main__":
    distributed.run(main, MEMORY)

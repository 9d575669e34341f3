"""Record expert trajectories on real data: the first step of PDD+MTT.

    python buffer_mtt.py --dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca --data_path=data

Each expert is a fresh network trained by SGD; its parameters at the start and after every epoch are its trajectory.
The files are {buffer_path}/{dataset}[_NO_ZCA]/{model}/replay_buffer_{n}.pt, each a list of save_interval
trajectories. The same command again continues where it was, or says that all is done.
"""

import utils.options as o
from utils import datasets, errors, files, report, training
from utils.augment import DSA
from utils.runtime import choose_device, stream
from utils.trajectories import BUFFER, Recorder, buffer_files, buffer_folder, load_buffer

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
    o.add_machine(parser)
    return parser.parse_args()


def main():
    options = parse()
    device = choose_device(options.device)
    folder = buffer_folder(options.buffer_path, options.dataset, options.model, options.zca)
    real = datasets.load(options.dataset, options.data_path, device, options.zca).held_out(options.val_fraction)
    o.check_network(options.model, real)
    parameters = sum(p.numel() for p in training.new_network(options.model, real, options.seed).parameters())
    size = parameters * 4 * (options.train_epochs + 1) * options.num_experts
    if options.dry_run:
        report.dry_run(options, {"data": options.data_path}, folder, steps_of(options, len(real.train)), size)
        return

    with files.locked(folder):
        if buffer_files(folder) and not (folder / BUFFER).exists():
            found = sum(len(load_buffer(path)) for path in buffer_files(folder))
            if found < options.num_experts:
                raise errors.UserError(
                    f"{folder}: holds {found} experts made elsewhere, which cannot be continued; lower --num_experts "
                    f"to {found} or choose another --buffer_path"
                )
            print(f"{folder}: done, {found} experts are there already")
            return
        free = (*o.FREE, "num_experts")
        files.claim(folder, vars(options), free, BUFFER, {"val_fraction": 0.0})
        recorder = Recorder(folder, options.num_experts, options.save_interval)
        recorder.merge()
        missing = recorder.missing()
        saved = folder / "checkpoint.pt"
        if not missing:
            saved.unlink(missing_ok=True)  # of a run that ended before it could
            print(f"{folder}: done, {options.num_experts} experts are there already")
            return
        files.need_disk(folder, size * len(missing) // options.num_experts, f"{len(missing)} experts")
        checkpoint = files.Checkpoint(saved, options.checkpoint_minutes, vars(options), free)
        record(options, real, recorder, missing, checkpoint)
        print(f"{folder}: done, {options.num_experts} experts in {len(buffer_files(folder))} files")


def record(options, real, recorder, missing, checkpoint):
    """Train the `missing` experts one after the other, each from its own random stream."""
    dsa = DSA(options.dsa_strategy) if options.dsa else None
    drops = ((options.train_epochs // 2 + 1, 0.1),) if options.decay else ()
    recipe = training.Recipe(
        options.train_epochs, options.lr_teacher, options.mom, options.l2, options.batch_train, dsa, drops
    )
    for expert in missing:
        network = training.new_network(options.model, real, options.seed, "expert", expert)
        masks = None
        if options.use_random_pruning:
            masks = training.random_masks(network, options.sparse_ratio, stream(options.seed, "pruning", expert))
        progress = report.Progress(recipe.epochs, f"expert {expert + 1}/{options.num_experts}, epoch")

        def shown(_epoch, loss, progress=progress):
            progress.update(loss=loss)

        trajectory = training.record_trajectory(
            network, real.train, recipe, options.seed, ("expert", expert, "train"), masks, shown, checkpoint
        )
        if not all(bool(tensor.isfinite().all()) for tensor in trajectory[-1]):
            raise errors.UserError(f"expert {expert} became NaN or infinite and was not saved; lower --lr_teacher")
        test = training.accuracy(network, real.test)
        recorder.add(expert, trajectory)
        checkpoint.clear()
        progress.say(f"expert {expert + 1}/{options.num_experts}: test accuracy {test:.2f} %")
        progress.close()


def steps_of(options, pictures):
    """Return the optimiser steps of the whole run."""
    return options.num_experts * options.train_epochs * -(-pictures // options.batch_train)


if __name__ == "__main__":
    errors.run(main, MEMORY)

"""Stages: their folders, the transition between them, and evaluation in their order. Shared by PDD+MTT and PDD+IDC."""

from pathlib import Path

import numpy as np
import torch

from utils import distributed, files, report, training
from utils.augment import DSA, without
from utils.datasets import Source
from utils.errors import UserError
from utils.results import stage_folders
from utils.runtime import stream
from utils.trajectories import Recorder

STAGE = "stage.json"
SHOWN = {"test": "test", "val": "held-out"}  # accuracies by --select_on
SINCE = {"select_on": "test", "bf16": False}  # how folders were made that do not name it


def experiment_name(options):
    """Return the folder name of an MTT experiment, as the published code spells it.

    Args:
        options: namespace with dataset, model, eval_mode, ipc, max_start_epoch, syn_steps, expert_epochs, lr_img,
            lr_lr, lr_teacher, zca and, where there is one, tag.
    """
    name = (
        f"{options.dataset}_{options.model}_{options.eval_mode}_ipc{options.ipc}_max{options.max_start_epoch}"
        f"_syn{options.syn_steps}_real{options.expert_epochs}_img{options.lr_img}_{options.lr_lr}"
        f"_{options.lr_teacher}_increase"
    )
    if options.zca:
        name += "_zca"
    if getattr(options, "tag", ""):
        name += f"_{options.tag}"
    return name


def stage_folder(experiment, stage, stages, max_start_epoch):
    """Return the folder of stage `stage` (1 to `stages`); with one stage it is the experiment's own."""
    if stages == 1:
        return Path(experiment)
    return Path(experiment) / f"interval{stage}_epoch{(stage - 1) * max_start_epoch + 1}-{stage * max_start_epoch}"


def find_stages(experiment, stages, names=None):
    """Return the folders of the stages of a finished experiment, whatever options made it.

    Args:
        experiment: folder.
        stages: how many (num_intervals).
        names: folder names instead of those that are found.

    Raises:
        UserError: one is missing.
    """
    experiment = Path(experiment)
    if not experiment.is_dir():
        raise UserError(
            f"{experiment}: expected the folder of a distillation, found none; give the options it was made with, or "
            "its name with --override_load_path"
        )
    if names:
        if len(names) != stages:
            raise UserError(
                f"--override_interval_names: expected {stages} names joined by dots (num_intervals), found {len(names)}"
            )
        return [experiment / name for name in names]
    if stages == 1 and (experiment / "images_best.pt").exists():
        return [experiment]
    found = stage_folders(experiment)
    folders = []
    for stage in range(1, stages + 1):
        if len(found.get(stage, [])) != 1:
            raise UserError(
                f"{experiment}: expected one folder interval{stage}_epoch…, found {len(found.get(stage, []))}; "
                "check --num_intervals, or name the folders with --override_interval_names"
            )
        folders.append(found[stage][0])
    if more := len(found) - stages:
        report.say(f"note: {experiment}: --num_intervals {stages} leaves out {more} more stages")
    return folders


def read_stage(folder):
    """Return what is known of a stage's progress: {} before its end, else the contents of its stage.json.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / STAGE
    holds = {"select_on": str, "best_accuracy": (int, float), "best_iteration": int, "complete": bool}
    return files.read_json(path, "the summary of a finished stage", holds) if path.exists() else {}


def selection(options):
    """Return what a stage's summary says of the pictures that its accuracies were measured on."""
    held_out = {"val_fraction": options.val_fraction} if options.select_on == "val" else {}
    return {"select_on": options.select_on, **held_out}


def selected_on(summaries):
    """Return the `select_on` of a report: test, val, unknown, or several of them joined by commas.

    Args:
        summaries: what the stages' files say, {} for published results.
    """
    return ", ".join(sorted({known.get("select_on", "unknown") for known in summaries}))


def idc_recipe(options, epochs, real_pictures=False, lr_factor=1.0):
    """Return IDC's recipe: SGD whose learning rate drops to a fifth at 2/3 and at 5/6, DSA and CutMix.

    Args:
        options: namespace of `utils.idc_options.resolve`.
        epochs: of the training.
        real_pictures: the recipe of the epochs on real pictures between sweeps, at a constant learning rate with the
            augmentation of the matching (without cutout where CutMix is on), instead of an evaluation's.
        lr_factor: on the learning rate.
    """
    mix = options.mixup_net if real_pictures else options.mixup
    cut = (options.mix_p, options.beta) if mix == "cut" else None
    if real_pictures:
        strategy = without(options.aug_type, "cutout") if cut else options.aug_type
        dsa, drops = DSA(strategy, "idc"), ()
    else:
        dsa = DSA(options.dsa_strategy, "idc") if options.dsa else None
        drops = ((2 * epochs // 3 - 1, 0.2), (5 * epochs // 6 - 1, 0.2))
    crop = options.rrc and not options.dsa and not real_pictures
    return training.Recipe(
        epochs,
        options.lr * lr_factor,
        options.momentum,
        options.weight_decay,
        options.batch_size,
        dsa,
        drops,
        cutmix=cut,
        crop=crop,
    )


def synthetic_source(synthetic):
    """Return a `Source` of the union."""
    return Source(synthetic.images.detach(), synthetic.labels)


def accuracies(make_network, count, synthetic, recipe, test, seed, keys, checkpoint):
    """Train `count` networks on the union and test them: the evaluation inside a stage.

    Args:
        make_network: function of k returning network k at its start.
        synthetic: `SyntheticSet`.
        recipe: `Recipe`.
        test: `Source` to measure accuracies on.
        seed, keys: of the random streams; network k adds k.
        checkpoint: `Checkpoint`.

    Returns:
        List of `count` accuracies in percent.
    """
    source = synthetic_source(synthetic)

    def train(numbers, checkpoint):
        members = [make_network(k) for k in numbers]
        training.train_together(members, source, recipe, seed, [(*keys, k) for k in numbers], checkpoint=checkpoint)
        return [training.accuracy(member, test) for member in members]

    hands = distributed.deal(range(count))
    found = checkpoint.spread("networks", keys, hands, train)
    numbers = [k for hand in hands for k in hand]
    by_number = dict(zip(numbers, [value for values in found for value in values], strict=True))
    return [by_number[k] for k in range(count)]


def transition(
    make_network, experts, synthetic, recipe, real, real_recipe, folder, group, seed, stage, checkpoint, report
):
    """Between two stages: every expert network is trained on the union, then on real data into new trajectories.

    Args:
        make_network: function of a flat parameter vector returning a network with these parameters.
        experts: `Experts` of the stage that ends.
        synthetic: its best union.
        recipe: `Recipe` for the union.
        real: `RealData`.
        real_recipe: `Recipe` for the real data; its epochs are the trajectory's length minus one.
        folder: of the stage that ends; receives the replay buffers of the next stage.
        group: trajectories of one replay buffer.
        seed, stage: of the random streams.
        checkpoint: `Checkpoint`.
        report: called with (number of the expert, experts in all) after each.
    """
    recorder = Recorder(folder, len(experts), group)
    distributed.first(recorder.merge)
    source = synthetic_source(synthetic)

    def record(k, checkpoint):
        on_union = True
        # Inside either training its own slot holds the network; this one tells which of the two it was.
        with checkpoint.loop("transition", (stage, k), lambda: {"on_union": on_union}) as saved:
            network = make_network(experts.parameters(k, 0))
            if saved is None or saved["on_union"]:
                training.train(network, source, recipe, seed, ("transition", stage, k), checkpoint=checkpoint)
            on_union = False
            trajectory = training.record_trajectory(
                network, real.train, real_recipe, seed, ("trajectory", stage, k), checkpoint=checkpoint
            )
        recorder.add(k, trajectory, alone=distributed.size() == 1)
        report(k, len(experts))

    checkpoint.spread("transitions", stage, distributed.first(recorder.missing), record)
    distributed.first(recorder.merge)


def staged_accuracies(network, stages, recipe_of, test, seed, keys, checkpoint):
    """Train one network on union 1, then union 2, …, carrying the momentum of SGD on, and test it after each.

    Args:
        network: at its start; trained in place.
        stages: list of `Source`s, the unions in order.
        recipe_of: function of the stage's number (from 0) returning its `Recipe`.
        test: `Source` to test on.
        seed, keys: of the random streams; each stage adds its number.
        checkpoint: `Checkpoint`.

    Returns:
        List of accuracies in percent, one for each stage.
    """
    done, optimizer = [], None
    with checkpoint.loop("staged", keys, lambda: {"done": done}) as saved:
        done += saved["done"] if saved else []
        for stage in range(len(done), len(stages)):
            optimizer = training.train(
                network, stages[stage], recipe_of(stage), seed, (*keys, stage), optimizer, checkpoint=checkpoint
            )
            done.append(training.accuracy(network, test))
    return done


def random_unions(real, ipc_totals, seed, keys):
    """Return the unions of a distillation that learned nothing: random real pictures of equal number.

    Args:
        real: `RealData`.
        ipc_totals: images of each class after each stage.
        seed, keys: of the random stream.

    Returns:
        List of `Source`s; each union begins with the pictures of the one before.
    """
    rng = stream(seed, "random", *keys)
    device = real.train.images.device
    chosen = np.stack([real.random_indices(c, max(ipc_totals), rng) for c in range(real.num_classes)])
    unions = []
    for total in ipc_totals:
        index = torch.from_numpy(chosen[:, :total].reshape(-1)).to(device)
        unions.append(Source(*real.train.batch(index)))
    return unions

"""Expert trajectories on disk: `replay_buffer_{n}.pt`, n = 0, 1, …, each a list of trajectories.

A trajectory is the list of a network's parameters at its start and after each epoch; an entry is the list of tensors
in `network.parameters()` order. This is the format of the published buffers.
"""

import re
import shutil
from pathlib import Path

import torch

from networks.reparam import flatten

from . import training
from .results import names
from .run import files
from .run.checkpoint import PARTIAL
from .run.errors import UserError
from .run.log import log0

BUFFER_CONFIG = "buffer.json"  # the options of the experts beside it


def buffer_folder(buffer_path, subdir, model, zca):
    """Return the folder of the first stage's experts (MTT's layout); `subdir` is the data set's `dataset_subdir`."""
    if subdir in ("CIFAR10", "CIFAR100") and not zca:
        subdir += "_NO_ZCA"
    return Path(buffer_path) / subdir / model


def find_buffers(buffer_path, subdir, model, zca):
    """Return the folder that holds the replay buffers.

    Args:
        buffer_path: the root of the layout, or a folder that holds replay_buffer_0.pt itself.
        subdir, model, zca: as for `buffer_folder`.

    Raises:
        UserError: neither holds any, or they saw images in another space (--zca).
    """
    given, nested = Path(buffer_path), buffer_folder(buffer_path, subdir, model, zca)
    for folder in (given, nested):
        if buffer_files(folder):
            if options_of(folder).get("zca", zca) != zca:
                without = "without" if zca else "with"
                raise UserError(f"{folder}: these experts were recorded {without} --zca; take others, or the same here")
            return folder
    sized = sorted(nested.parent.parent.glob(f"*/{model}")) if "/" in subdir else []  # …/{res}/{model}
    others = ", ".join(folder.parent.name for folder in sized if buffer_files(folder))
    raise UserError(
        f"{nested}: expected replay_buffer_0.pt and so on, found none{others and f' (but for --res {others})'}; record "
        "experts with buffer_mtt.py, or name their folder with --buffer_path"
    )


def buffer_files(folder):
    """Return the replay buffers of `folder` in the order of their numbers."""
    found = {}
    if Path(folder).is_dir():
        for path in Path(folder).iterdir():
            if match := re.fullmatch(r"replay_buffer_(\d+)\.pt", path.name):
                found[int(match[1])] = path
    return [found[number] for number in sorted(found)]


def options_of(folder):
    """Return the options that the experts in `folder` were recorded with; {} if nothing says them: published ones.

    Raises:
        UserError: the file that says them is damaged.
    """
    path = Path(folder) / BUFFER_CONFIG
    return files.read_json(path, "the options of the experts", {"options": dict})["options"] if path.exists() else {}


def held_out_fraction(folder):
    """Return the fraction of the training images that the experts in `folder` never saw (--val_fraction).

    Raises:
        UserError: the file that says so is damaged.
    """
    config = options_of(folder) or names.read_mtt_stage(folder)  # of a transition's experts
    fraction = config.get("val_fraction", 0.0)
    if not isinstance(fraction, (int, float)):
        file = BUFFER_CONFIG if (Path(folder) / BUFFER_CONFIG).exists() else names.STAGE_FILE
        raise UserError(f"{folder}/{file}: expected a number val_fraction, found {fraction!r}; move it away")
    return fraction


def warn_of_seen_images(folder, fraction):
    """Warn if the experts in `folder` have seen images of the `fraction` of the training images held out now."""
    if held_out_fraction(folder) < fraction:
        log0(
            f"warning: {folder}: these experts have seen images that are held out now, so accuracies in a stage are "
            f"too high; record experts with buffer_mtt.py --val_fraction {fraction:g}"
        )


def recorded_fingerprint(folder):
    """Return the fingerprint of the data that the experts in `folder` were trained on; None if nothing says it."""
    path = Path(folder) / BUFFER_CONFIG
    return files.read_json(path, "the options of the experts").get("fingerprint") if path.exists() else None


def load_buffer(path, mmap=True):
    """Load one replay buffer.

    Raises:
        UserError: it is damaged or not a list of trajectories.
    """
    trajectories = files.load(path, "a replay buffer", mmap=mmap)
    if not _holds(trajectories, _is_trajectory):
        raise UserError(f"{path}: expected a replay buffer (a list of trajectories), found something else")
    return trajectories


def _load_part(path, mmap=False):
    trajectory = files.load(path, "a recorded expert", mmap)
    if not _is_trajectory(trajectory):
        raise UserError(f"{path}: expected a recorded expert (a trajectory), found something else; delete it")
    return trajectory


def _holds(value, each):
    return isinstance(value, list) and len(value) > 0 and all(each(item) for item in value)


def _is_trajectory(value):
    return _holds(value, lambda entry: _holds(entry, lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()))


class Experts:
    """The experts of one stage, read from their replay buffers.

    Args:
        folder: of the replay buffers.
        shapes: list of the shapes of the network's parameters.
        epochs: entries that a trajectory must have at least.
        model: name of the network, for messages.
        max_files: use this many files, chosen at random; None for all.
        max_experts: use this many experts of each file; None for all.
        load_all: keep every file in memory and draw experts with replacement, instead of one shuffled file after
            another.
        rng: numpy.random.Generator for the choice of files.

    Raises:
        UserError: a file is damaged, of another network, or too short.
    """

    def __init__(self, folder, shapes, epochs, model, max_files=None, max_experts=None, load_all=False, rng=None):
        self.paths = buffer_files(folder)
        if max_files is not None and max_files < len(self.paths):
            self.paths = [self.paths[number] for number in sorted(rng.permutation(len(self.paths))[:max_files])]
        if not self.paths:
            raise UserError(f"{folder}: expected replay_buffer_0.pt and so on, found none; record experts first")
        self.load_all, self.loaded = load_all, {}
        self.files, self.entries = [], None  # numbers of each file's experts; length of the shortest trajectory
        for number, path in enumerate(self.paths):
            trajectories = self._load(number)
            for trajectory in trajectories:
                _check_trajectory(path, trajectory, [tuple(shape) for shape in shapes], epochs, model)
                self.entries = min(len(trajectory), self.entries or len(trajectory))
            first = len(self)
            self.files.append(range(first, first + len(trajectories[:max_experts])))

    def __len__(self):
        return self.files[-1].stop if self.files else 0

    def _load(self, number):
        if number not in self.loaded:
            # What is mapped stays: it takes little memory, and making its thousands of tensors takes half a second.
            if not (self.load_all or files.can_map(self.paths[number])):
                self.loaded.clear()
            self.loaded[number] = load_buffer(self.paths[number], mmap=not self.load_all)
        return self.loaded[number]

    def _file_of(self, expert):
        return next(number for number, experts in enumerate(self.files) if expert in experts)

    def parameters(self, expert, epoch):
        """Return the flat parameters (numel,) of expert number `expert` after `epoch` epochs, on the CPU.

        Raises:
            UserError: they hold NaN or infinite numbers.
        """
        number = self._file_of(expert)
        position = expert - self.files[number].start
        vector = flatten(self._load(number)[position][epoch])
        if not bool(vector.isfinite().all()):
            raise UserError(
                f"{self.paths[number]}: expert {position} after epoch {epoch} holds NaN or infinite parameters; record "
                "the experts again with a lower --lr_teacher"
            )
        return vector

    def order(self, rng):
        """Return one pass over all experts: files in random order, experts in random order inside a file."""
        return [
            self.files[number][position]
            for number in rng.permutation(len(self.files))
            for position in rng.permutation(len(self.files[number]))
        ]

    def drawn(self, number, order, rng):
        """Return the expert of trajectory `number`: the next one of `order`, with load_all any one."""
        return int(rng.integers(len(self))) if self.load_all else order[number % len(self)]

    def in_memory(self, number, order):
        """Return the experts that are in memory when trajectory `number` is drawn, in their order."""
        if self.load_all:
            return list(range(len(self)))
        same_file = self.files[self._file_of(order[number % len(self)])]
        return [expert for expert in order if expert in same_file]


def _check_trajectory(path, trajectory, shapes, epochs, model):
    for entry in trajectory:
        found = [tuple(tensor.shape) for tensor in entry]
        if found == shapes:
            continue
        difference = f"{len(shapes)} parameter tensors, found {len(found)}"
        if len(found) == len(shapes):
            at = next(i for i in range(len(found)) if found[i] != shapes[i])
            difference = f"parameter {at} of shape {shapes[at]}, found {found[at]}"
        raise UserError(
            f"{path}: these experts are not of {model} for these images (expected {difference}); their --model, image "
            "size (--res) or number of classes is another: choose theirs, or other buffers"
        )
    if len(trajectory) < epochs:
        raise UserError(
            f"{path}: expected trajectories of {epochs} entries at least (--start_sampling_epoch + "
            f"--max_start_epoch or the end of --start_epochs, + --expert_epochs), found {len(trajectory)}; lower these "
            "or record experts with more --train_epochs"
        )


def window(kind, stage, stages, epochs):
    """Return (begin, end) in epochs of the part of a trajectory that `stage` (from 1) of PDD+DM sees.

    Args:
        kind: `all` for the whole trajectory, `stage` for the stage's part of `stages` equal ones.
        epochs: of the trajectory.
    """
    return (0.0, float(epochs)) if kind == "all" else ((stage - 1) * epochs / stages, stage * epochs / stages)


def mixture(experts, expert, position):
    """Return the flat parameters (numel,) of `expert` at `position`: (1 − a) θ_e + a θ_{e+1} at e + a epochs."""
    epoch = min(int(position), experts.entries - 2)
    before, after = experts.parameters(expert, epoch), experts.parameters(expert, epoch + 1)
    return before.lerp(after, position - epoch)


def record_trajectory(network, images, config, seed, keys, folder=None, after_epoch=None):
    """Train `network` on real images and return its parameters before and after every epoch.

    Args:
        folder: `Path` that keeps the state after every epoch (epoch_{index}.pt); what it holds is continued, a damaged
            epoch and those after it are trained again. None keeps nothing.
        Others as for `training.train`.

    Returns:
        List of config.epochs + 1 entries, each the list of parameter tensors (float32, CPU) in
        `network.parameters()` order.
    """
    trajectory, optimizer = [training.snapshot(network)], training.sgd(network, config)
    while folder and (state := files.load_trusted(folder / f"epoch_{len(trajectory) - 1:04d}.pt")):
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        trajectory.append(training.snapshot(network))

    def after(epoch, loss):
        trajectory.append(training.snapshot(network))
        if folder:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            files.save(folder / f"epoch_{epoch:04d}.pt", state | {"digest": files.digest(state)})
        if after_epoch:
            after_epoch(epoch, loss)

    done = len(trajectory) - 1
    training.train(network, images, config, seed, keys, optimizer, first_epoch=done, after_epoch=after)
    return trajectory


def is_finite(trajectory):
    """True if training did not end in parameters that are NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in trajectory[-1])


class BufferWriter:
    """Writes the experts of one folder: each expert at once to a part, a full group of parts to its replay buffer.

    Any order of experts, any number of processes and any interruption give the same files. Of several processes one
    merges, when the others have stored theirs.

    Args:
        folder: of the replay buffers.
        count: experts wanted.
        group: trajectories of one replay buffer (save_interval); the last one may have fewer.

    Raises:
        UserError: a file of the folder is damaged.
    """

    def __init__(self, folder, count, group):
        self.folder, self.count, self.group = Path(folder), count, group
        self.stored = {}
        for path in buffer_files(folder):
            self.stored[int(re.search(r"\d+", path.name)[0])] = len(load_buffer(path))
        for part in (self.folder / PARTIAL).glob("expert_*.pt"):
            try:
                _load_part(part, mmap=True)
            except UserError:
                if part.exists():  # else another process has merged it
                    raise

    def missing(self):
        """Return the numbers of the experts that are not on disk yet."""
        return [
            k
            for k in range(self.count)
            if k % self.group >= self.stored.get(k // self.group, 0) and not self._part(k).exists()
        ]

    def _part(self, expert):
        return self.folder / PARTIAL / f"expert_{expert:05d}.pt"

    def epochs(self, expert):
        """Return the folder for the epochs of an expert that is being recorded."""
        return self._part(expert).with_suffix("")

    def add(self, expert, trajectory, alone=True):
        """Store one expert; a process that records `alone` merges its group when that is complete."""
        files.save(self._part(expert), trajectory)
        shutil.rmtree(self.epochs(expert), ignore_errors=True)
        if alone:
            self.merge()

    def merge(self):
        """Turn every complete group of parts into its replay buffer; removes the parts when all is done."""
        for number, first in enumerate(range(0, self.count, self.group)):
            path, stored = self.folder / f"replay_buffer_{number}.pt", self.stored.get(number, 0)
            parts = [self._part(k) for k in range(first + stored, min(first + self.group, self.count))]
            if parts and all(part.exists() for part in parts):
                whole = load_buffer(path) if stored else []
                files.save(path, whole + [_load_part(part, mmap=True) for part in parts])
                self.stored[number] = len(whole) + len(parts)
                for part in parts:
                    part.unlink()
        if not self.missing():
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)

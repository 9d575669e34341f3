"""What a killed run continues from: the state of a learning loop, and finished units of work.

Every random decision has a stream of its own (streams.py), so a unit that is begun again gives the same bits. Only the
loops that last hold state; transitions and evaluations keep each finished network.
"""

import json
import time
from pathlib import Path

import torch

from . import distributed, files, signals
from .errors import UserError
from .log import log0

PARTIAL = "partial"  # folder of finished units, beside the results that they become part of


class Checkpoint:
    """The state of one loop, saved every few minutes, and if a signal asks the run to stop.

        with Checkpoint(path, minutes, config, images=images, optimizer=optimizer, best=best) as checkpoint:
            for iteration in checkpoint.iterations(5000):
                …

    Entering it restores the objects. With several ranks, all make the same iterations, rank 0 saves, and a signal to
    one of them stops all in the same iteration.

    Args:
        path: the file.
        minutes: between two saves.
        config: dict of the run's options; the file of a run with others is refused.
        objects: what an iteration changes, by name: tensors (changed in place), dicts, or objects that have state_dict
            and load_state_dict.

    Raises:
        UserError: on entering, if the file is damaged, was changed, or is another run's.
    """

    def __init__(self, path, minutes, config, **objects):
        self.path, self.seconds, self.objects = Path(path), minutes * 60, objects
        self.config = json.loads(json.dumps(config))
        self.iteration = 0

    def __enter__(self):
        if self.path.exists():
            self._restore()
        distributed.barrier()  # nobody writes the file before all have read it
        self.saved_at = time.monotonic()
        signals.open_checkpoint = self
        return self

    def __exit__(self, *_):
        signals.open_checkpoint = None

    def iterations(self, count):
        """Yield the iterations that are left of 0, 1, …, count - 1; saves between two if it is time."""
        for iteration in range(self.iteration, count):
            self.iteration = iteration
            stop = distributed.all_reduce_max(signals.received or 0)
            if stop:
                distributed.barrier()  # torchrun ends the others when the first one does
                signals.stop_if_asked(stop)
            elif time.monotonic() - self.saved_at >= self.seconds:
                self.save()
            yield iteration

    def save(self):
        """Save now."""
        self.saved_at = time.monotonic()
        if distributed.is_rank0():
            objects = {name: _state(value) for name, value in self.objects.items()}
            files.save_with_digest(self.path, {"config": self.config, "iteration": self.iteration, "objects": objects})

    def _restore(self):
        what = "the state of an interrupted run"
        state, found = files.trusted(files.load(self.path, what)), None
        if state is None:
            found = "something else, a changed file, or one of an earlier version"
        elif other := files.differing(state["config"], self.config):
            found = f"that of another run ({other})"
        if found:
            raise UserError(f"{self.path}: expected {what}, found {found}; delete it to begin this stage anew")
        self.iteration = state["iteration"]
        for name, value in self.objects.items():
            _restore(value, state["objects"][name])


def _state(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return dict(value) if isinstance(value, dict) else value.state_dict()


def _restore(value, state):
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.copy_(state)
    elif isinstance(value, dict):
        value.update(state)
    else:
        value.load_state_dict(state)


def finish_each(folder, name, key, tasks, work, begin=lambda mine: None):
    """Do every one of `tasks` once, over all ranks and interruptions.

    Each finished task is a file in `folder`/partial. Files of the same `name` that belong to another `key` or to other
    tasks are removed; one that cannot be read is made again.

    Args:
        folder: the results'.
        name: what this kind of work is called in file names.
        key: everything that the results depend on: nested dicts, lists and tuples of tensors, numbers and strings.
        tasks: list of numbers, strings or tuples of them.
        work: function of a task returning what `files.save` can write, on the CPU.
        begin: called with the list of this rank's tasks that are not done yet.

    Returns:
        List of the results, in the order of `tasks`.
    """
    folder, key = Path(folder) / PARTIAL, files.digest(key)
    paths = {task: folder / f"{name}-{files.digest([key, task])[:16]}.pt" for task in tasks}

    def finished():
        for path in set(folder.glob(f"{name}-*.pt")) - set(paths.values()):
            path.unlink(missing_ok=True)
        found = {task: files.load_trusted(path) for task, path in paths.items()}
        return {task: value["result"] for task, value in found.items() if value}

    results = distributed.on_rank0(finished)
    if results:
        log0(f"{name}: {len(results)} of {len(tasks)} done already")
    mine = distributed.share([task for task in tasks if task not in results])
    begin(mine)
    for task in mine:
        signals.stop_if_asked()
        results[task] = work(task)
        files.save_with_digest(paths[task], {"result": results[task]})
    for found in distributed.gather({task: results[task] for task in mine}):
        results |= found
    return [results[task] for task in tasks]


def forget_finished(folder, name):
    """Remove the finished units called `name`: their work is in the results."""
    partial = Path(folder) / PARTIAL
    if distributed.is_rank0() and partial.is_dir():
        for path in partial.glob(f"{name}-*.pt"):
            path.unlink(missing_ok=True)
        if not any(partial.iterdir()):
            partial.rmdir()

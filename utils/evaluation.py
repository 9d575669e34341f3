"""Staged evaluation of networks on distilled unions, with two reference rows; the same for every base method."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from . import training
from .results import figures, report
from .run import distributed, files
from .run.checkpoint import finish_each, forget_finished
from .run.device import versions
from .run.log import Progress, print0
from .stages import random_unions, staged_accuracies

# What networks are trained on, or in which way: key of the report. Other lengths ("300 epochs") come besides. hard and
# random_soft stand beside unions with soft labels only, fresh beside starts that are not random.
ROWS = {
    "distilled": "stages",
    "fresh": "fresh",
    "last union": "last_union",
    "hard": "hard",
    "random": "random",
    "random_soft": "random_soft",
    "full": "full",
}
# Rows whose networks are trained as those of another one.
ORIGINS = {"hard": "distilled", "random_soft": "random"}


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """One architecture under evaluation.

    Attributes:
        name: of the architecture.
        network: function of k returning network k at its start.
        count: networks of each row but the full training set's.
        configs: {"distilled", "random" and perhaps "fresh" and "N epochs": list of the `TrainConfig` for each union;
            "full" and perhaps "last union": a list of one}.
        save: called with (k, network) after the last distilled union; None to save nothing.
        fresh: function of k returning network k from a random initialisation, for fresh, last union and "N epochs";
            None if `network` does so already.
    """

    name: str
    network: Callable
    count: int
    configs: dict
    save: Callable | None = None
    fresh: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all architectures of an evaluation share.

    Attributes:
        real: `RealData`.
        unions: the distilled unions as `ImageDataset`s, in order.
        ipc_totals: images of each class in each of them.
        random_ranges: for each of them (first, last): which of a class's random real images stand for it.
        stages: their numbers, from 1.
        folder: of the result; receives report.json, and each finished network if the evaluation is interrupted.
        seed: of the random streams.
        config: dict of the options that the accuracies depend on.
        random: False to leave out the row of random real images.
        full_networks: networks trained on the full training set; 0 to leave out this row.
        checks: test accuracies measured in each stage, the last one at its end.
        hard_unions: of unions with soft labels, the same images with hard ones; None for other unions.
        soften: function of images (N, C, H, W) returning soft labels made as those of the unions were at their start;
            None to leave out the row of random real images with such labels.
    """

    real: object
    unions: list
    ipc_totals: list
    random_ranges: list
    stages: list
    folder: Path
    seed: int
    config: dict
    random: bool = True
    full_networks: int = 1
    checks: int = 1
    hard_unions: list | None = None
    soften: Callable | None = None

    @functools.cached_property
    def key(self):
        """What one network's accuracies depend on: options but for the choice of networks, data, and images."""
        images = [[union.images, union.labels] for union in self.unions]
        digest = files.digest([self.real.info.fingerprint, images, self.ipc_totals])
        return report.comparable(self.config) | {"images": digest[:12]}


def configs_of(model, kind):
    """Return the `TrainConfig`s of one row's networks, one for each union."""
    return model.configs[ORIGINS.get(kind, kind)]


def train_and_test(shared, model, kind, k, progress):
    """Train network k for one row; returns a list of stages, each the list of its accuracies in percent.

    `progress` counts its epochs.
    """
    origin, configs = ORIGINS.get(kind, kind), configs_of(model, kind)
    published = origin in ("distilled", "random", "full")
    network = model.network(k) if published or not model.fresh else model.fresh(k)
    # Fresh starts and other lengths draw as the published row does: the start alone differs, or the length.
    stream = origin if published or kind == "last union" else "distilled"
    keys, test = (stream, model.name, k), shared.real.test
    if kind == "full":
        after = lambda _epoch, loss: progress.update(loss=loss)  # noqa: E731
        training.train(network, shared.real.train, configs[0], shared.seed, keys, after_epoch=after)
        return [[training.accuracy(network, test)]]
    unions = {"hard": shared.hard_unions, "last union": shared.unions[-1:]}.get(kind, shared.unions)
    if origin == "random":
        unions = random_unions(shared.real, shared.random_ranges, shared.seed, (k,))
    if kind == "random_soft":
        for union in unions:
            union.labels = shared.soften(union.batch(slice(None))[0])
    accuracies = staged_accuracies(
        network, unions, configs.__getitem__, test, shared.seed, keys, checks=shared.checks, progress=progress
    )
    if kind == "distilled" and model.save:
        model.save(k, network)
    return accuracies


def evaluate(shared, model, earlier):
    """Return the report of one architecture: values of `ROWS`, and perhaps "lengths", a list of rows with "epochs".

    The rows hard and random_soft are there for unions with soft labels only: what the same networks learn from the same
    images, or from random real ones, with the other kind of labels.

    Args:
        shared: `Evaluation`.
        model: `EvalModel`.
        earlier: its report by an earlier evaluation, {} without one. Rows of it that this one leaves out, or that are
            of as many networks, are kept.
    """
    found, lengths = {}, {f"{row['epochs']} epochs": row for row in earlier.get("lengths", ())}
    counts = dict.fromkeys(model.configs, model.count)
    counts |= {"random": model.count * shared.random, "full": shared.full_networks}
    if shared.hard_unions:
        counts |= {"hard": model.count, "random_soft": counts["random"] if shared.soften else 0}
    for kind in dict.fromkeys([*ROWS, *counts, *lengths]):
        row = ROWS.get(kind, kind)
        known, tasks = (earlier | lengths).get(row), list(range(counts.get(kind, 0)))
        if kind not in counts and not known:
            continue
        saves = kind == "distilled" and model.save
        if not tasks or (known and report.network_count(known) == len(tasks) and not saves):
            found[row] = known
            continue
        epochs = sum(config.epochs for config in configs_of(model, kind))
        label = f"{model.name}, {kind}, {len(tasks)} network{'s' * (len(tasks) > 1)}, epoch"
        with contextlib.closing(Progress(epochs * len(tasks), label)) as progress:

            def begin(mine, epochs=epochs, progress=progress):
                progress.expect(epochs * len(mine))

            def work(k, kind=kind, progress=progress):
                accuracies = train_and_test(shared, model, kind, k, progress)
                progress.update(0, accuracy=accuracies[-1][-1])  # of the latest finished network
                return accuracies

            key = [kind, model.name, shared.key]
            runs = finish_each(shared.folder, f"{kind}-{model.name}", key, tasks, work, begin)
        staged = kind in ("distilled", "fresh")
        last = [run[-1] for run in runs]
        found[row] = report.stage_rows(shared.stages, shared.ipc_totals, runs) if staged else report.summary(last)
    others = sorted((int(kind.split()[0]), kind) for kind in found if kind not in ROWS.values())
    if others:
        found["lengths"] = [{**found.pop(kind), "epochs": epochs} for epochs, kind in others]
    return found


def evaluate_and_report(shared, models, own, **about):
    """Evaluate, write report.json and accuracy.png, and print the table.

    An earlier report of the same images and options is completed; any other is replaced, with a note.

    Args:
        shared: `Evaluation`.
        models: list of `EvalModel`s.
        own: name of the distillation's own network, whose rows stand at the top of the report.
        about: what the report says besides: dataset, select_on, keeps.

    Raises:
        UserError: a class has too few images for the row of random real images.
    """
    if shared.random:
        random_unions(shared.real, shared.random_ranges, shared.seed, (0,))  # refuses before anything is trained
    path = Path(shared.folder) / "report.json"
    before = distributed.on_rank0(lambda: report.earlier(path, shared.key))
    earlier = before.get("models", {})
    results = {model.name: evaluate(shared, model, earlier.get(model.name, {})) for model in models}
    merged = earlier | results
    first = own if own in merged else next(iter(merged))
    merged = {first: merged[first], **merged}
    done = merged == earlier
    config = before["config"] if done else {**shared.config, "versions": versions()}
    content = {
        **about,
        "model": first,
        "fingerprint": shared.real.info.fingerprint,
        "images": shared.key["images"],
    }
    content |= {**merged[first], "headline": report.headline(merged[first]), "models": merged, "config": config}
    if distributed.is_rank0():
        files.write_json(path, content)
        figure = figures.draw_accuracy(path.with_name("accuracy.png"), content)
        print0(f"{report.table(content)}\nreport: {path}\nfigure: {figure}" + "\ndone already" * done)
    for model in models:
        for kind in {*ROWS, *model.configs}:
            forget_finished(shared.folder, f"{kind}-{model.name}")

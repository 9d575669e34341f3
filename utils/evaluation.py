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
from .run.errors import UserError
from .run.log import Progress, print0
from .stages import random_unions, staged_accuracies

ROWS = {"distilled": "stages", "random": "random", "full": "full"}  # what networks are trained on: key of the report


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """One architecture under evaluation; dicts have the keys of `ROWS`.

    Attributes:
        name: of the architecture.
        network: function of k returning network k at its start.
        counts: how many networks to train; 0 leaves the row out.
        configs: list of the `TrainConfig` for each union; for the full training set a list of one.
        save: called with (k, network) after the last distilled union; None to save nothing.
    """

    name: str
    network: Callable
    counts: dict
    configs: dict
    save: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all architectures of an evaluation share.

    Attributes:
        real: `RealData`.
        unions: the distilled unions as `ImageDataset`s, in order.
        ipc_totals: images of each class in each of them.
        folder: of the result; receives report.json, and each finished network if the evaluation is interrupted.
        seed: of the random streams.
        config: dict of the options that the accuracies depend on.
        checks: test accuracies measured in each stage, the last one at its end.
    """

    real: object
    unions: list
    ipc_totals: list
    folder: Path
    seed: int
    config: dict
    checks: int = 1

    @functools.cached_property
    def key(self):
        """What one network's accuracies depend on: options without the choice of networks, data, and images."""
        images = [[union.images, union.labels] for union in self.unions]
        digest = files.digest([self.real.info.fingerprint, images, self.ipc_totals])
        return report.comparable(self.config) | {"images": digest[:12]}


def train_row(evaluation, model, kind):
    """Train the networks of one of `ROWS`; returns for each network a list of stages, each a list of accuracies."""
    real, config, seed = evaluation.real, model.configs[kind], evaluation.seed

    def full(k, network):
        with contextlib.closing(Progress(config[0].epochs, f"{model.name}, full training set, epoch")) as progress:
            after = lambda _epoch, loss: progress.update(loss=loss)  # noqa: E731
            training.train(network, real.train, config[0], seed, (kind, model.name, k), after_epoch=after)
        return [[training.accuracy(network, real.test)]]

    def staged(k, network):
        unions = random_unions(real, evaluation.ipc_totals, seed, (k,)) if kind == "random" else evaluation.unions
        keys, checks = (kind, model.name, k), evaluation.checks
        accuracies = staged_accuracies(network, unions, config.__getitem__, real.test, seed, keys, checks=checks)
        if kind == "distilled" and model.save:
            model.save(k, network)
        return accuracies

    def work(k):
        accuracies = (full if kind == "full" else staged)(k, model.network(k))
        progress.update(accuracy=accuracies[-1][-1])
        return accuracies

    tasks, key = list(range(model.counts[kind])), [kind, model.name, evaluation.key]
    with contextlib.closing(Progress(len(distributed.share(tasks)), f"{model.name}, {kind}, network")) as progress:
        return finish_each(evaluation.folder, f"{kind}-{model.name}", key, tasks, work)


def evaluate(evaluation, model, earlier):
    """Return the report of one architecture: {"stages", "random", "full"}, accuracies in percent.

    Args:
        evaluation: `Evaluation`.
        model: `EvalModel`.
        earlier: its report by an earlier evaluation, {} without one. Rows of it that this one leaves out, or that are
            of as many networks, are kept.
    """
    found = {}
    for kind, row in ROWS.items():
        known, count = earlier.get(row), model.counts[kind]
        saves = kind == "distilled" and model.save
        if not count or (known and report.network_count(known) == count and not saves):
            found[row] = known
            continue
        runs = train_row(evaluation, model, kind)
        stages = report.stage_rows(evaluation.ipc_totals, runs) if kind == "distilled" else None
        found[row] = stages or report.summary([run[-1] for run in runs])
    return found


def evaluate_and_report(evaluation, models, own, **about):
    """Evaluate, write report.json and accuracy.png, and print the table.

    An earlier report of the same images and options is completed; any other is replaced, with a note.

    Args:
        evaluation: `Evaluation`.
        models: list of `EvalModel`s.
        own: name of the distillation's own network, whose rows stand at the top of the report.
        about: what the report says besides: dataset, select_on, keeps.

    Raises:
        UserError: a class has too few images for the row of random real images.
    """
    needed, fewest = max(evaluation.ipc_totals), min(map(len, evaluation.real.class_indices))
    if needed > fewest and any(model.counts["random"] for model in models):
        raise UserError(
            f"the row of random real images needs {needed} of each class, {evaluation.real.info.name} has {fewest}; "
            "leave it out with --skip_random"
        )
    path = Path(evaluation.folder) / "report.json"
    before = distributed.on_rank0(lambda: report.earlier(path, evaluation.key))
    earlier = before.get("models", {})
    results = {model.name: evaluate(evaluation, model, earlier.get(model.name, {})) for model in models}
    merged = earlier | results
    first = own if own in merged else next(iter(merged))
    merged = {first: merged[first], **merged}
    done = merged == earlier
    config = before["config"] if done else {**evaluation.config, "versions": versions()}
    content = {
        **about,
        "model": first,
        "fingerprint": evaluation.real.info.fingerprint,
        "images": evaluation.key["images"],
    }
    content |= {**merged[first], "models": merged, "config": config}
    if distributed.is_rank0():
        files.write_json(path, content)
        figure = figures.draw_accuracy(path.with_name("accuracy.png"), content)
        print0(f"{report.table(content)}\nreport: {path}\nfigure: {figure}" + "\ndone already" * done)
    for name in results:
        for kind in ROWS:
            forget_finished(evaluation.folder, f"{kind}-{name}")

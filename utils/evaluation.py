"""Staged evaluation of networks on distilled unions, with two reference rows; the same for every base method."""

import dataclasses
from collections.abc import Callable

from . import stages, training
from .results import report
from .run import distributed
from .run.checkpoint import finish_each, forget_finished
from .run.device import versions
from .run.errors import UserError
from .run.log import Progress, print0


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """One architecture under evaluation.

    Attributes:
        name: of the architecture.
        count: networks trained on the distilled unions.
        network: function of k returning network k at its start.
        config: function of the stage's index (from 0) returning the `TrainConfig` for its union.
        random_config: the same for random real images.
        full_config: `TrainConfig` for the full training set.
        save: called with (k, network) after its last stage.
    """

    name: str
    count: int
    network: Callable
    config: Callable
    random_config: Callable
    full_config: training.TrainConfig
    save: Callable = lambda k, network: None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all architectures of an evaluation share.

    Attributes:
        real: `RealData`.
        unions: the distilled unions as `ImageDataset`s, in order.
        ipc_totals: images of each class in each of them.
        seed: of the random streams.
        folder: of the result; keeps each finished network if the evaluation is interrupted.
        random_networks: networks on random real images; 0 to leave the row out.
        full_networks: networks on the full training set; 0 to leave the row out.
        checks: test accuracies measured in each stage, the last one at its end.
        hard_unions: of unions with soft labels, the same images with hard ones; None for other unions.
        soften: function of images (N, C, H, W) returning soft labels made as those of the unions were at their start;
            None to leave out the row of random real images with such labels.
    """

    real: object
    unions: list
    ipc_totals: list
    seed: int
    folder: object
    random_networks: int
    full_networks: int
    checks: int = 1
    hard_unions: list | None = None
    soften: Callable | None = None

    def check(self):
        """Refuse the row of random real images if a class has fewer images than it needs.

        Raises:
            UserError: a class has.
        """
        fewest = min(len(indices) for indices in self.real.class_indices)
        if self.random_networks and max(self.ipc_totals) > fewest:
            raise UserError(
                f"the row of random real images needs {max(self.ipc_totals)} of each class, {self.real.info.name} has "
                f"{fewest}; leave it out with --skip_random"
            )

    def run(self, model, config):
        """Evaluate one `EvalModel`; `config` holds the options that its results depend on.

        Returns:
            {"stages", "random", "full"}, accuracies in percent; rows left out are None. Of unions with soft labels also
            {"hard", "random_soft"}: what the same networks learn from the same images with the other kind of labels.
        """

        def distilled(k):
            network = model.network(k)
            accuracies = self._staged(network, self.unions, model.config, ("distilled", model.name, k))
            model.save(k, network)
            return accuracies

        def random(k):
            unions = stages.random_unions(self.real, self.ipc_totals, self.seed, (k,))
            return self._staged(model.network(k), unions, model.random_config, ("random", model.name, k))

        def hard(k):
            return self._staged(model.network(k), self.hard_unions, model.config, ("distilled", model.name, k))

        def random_soft(k):
            unions = stages.random_unions(self.real, self.ipc_totals, self.seed, (k,))
            for union in unions:
                union.labels = self.soften(union.images)
            return self._staged(model.network(k), unions, model.random_config, ("random", model.name, k))

        def full(k):
            network, keys = model.network(k), ("full", model.name, k)
            progress = Progress(model.full_config.epochs, f"{model.name}, full training set, epoch")
            after = lambda _epoch, loss: progress.update(loss=loss)  # noqa: E731
            training.train(network, self.real.train, model.full_config, self.seed, keys, after_epoch=after)
            progress.close()
            return [[training.accuracy(network, self.real.test)]]

        def repeat(kind, count, work):
            progress = Progress(len(distributed.share(range(count))), f"{model.name}, {kind}, network")

            def one(k):
                accuracies = work(k)
                progress.update(accuracy=accuracies[-1][-1])
                return accuracies

            unions = {"distilled": self.unions, "hard": self.hard_unions}.get(kind)
            images = [[union.images, union.labels] for union in unions] if unions else self.ipc_totals
            key = [kind, model.name, config, images, self.checks]
            runs = finish_each(self.folder, f"{kind}-{model.name}", key, list(range(count)), one)
            progress.close()
            return runs

        rows = report.stage_rows(self.ipc_totals, repeat("distilled", model.count, distilled))
        references = {"random": (self.random_networks, random), "full": (self.full_networks, full)}
        if self.hard_unions:
            references["hard"] = model.count, hard
            references["random_soft"] = self.random_networks if self.soften else 0, random_soft
        found = {"stages": rows}
        for kind, (count, work) in references.items():
            found[kind] = report.summary([run[-1] for run in repeat(kind, count, work)]) if count else None
        return found

    def _staged(self, network, unions, config_of, keys):
        return stages.staged_accuracies(network, unions, config_of, self.real.test, self.seed, keys, checks=self.checks)


def evaluate_and_report(evaluation, models, dataset, config, select_on, keeps="best"):
    """Run an evaluation; writes report.json and accuracy.png into its folder and prints the table.

    Args:
        evaluation: `Evaluation`.
        models: list of `EvalModel`s; the first one's rows stand at the top of the report.
        dataset: its name.
        config: dict of the options that the results depend on.
        select_on: what accuracies inside the stages were measured on (`names.selected_on`).
        keeps: which iteration's images a stage keeps: the `best` by these accuracies, or the `last`.
    """
    results = {model.name: evaluation.run(model, config) for model in models}
    first = models[0].name
    content = {
        "dataset": dataset,
        "model": first,
        "fingerprint": evaluation.real.info.fingerprint,
        "select_on": select_on,
        "keeps": keeps,
        **results[first],
        "models": results,
        "config": {**config, "versions": versions()},
    }
    if distributed.is_rank0():
        folder = evaluation.folder
        figure = report.write_report(folder, content)
        print0(f"{report.table(content)}\nreport: {folder / 'report.json'}\npicture: {figure}")
    for name in results:
        for kind in ("distilled", *results[name]):
            forget_finished(evaluation.folder, f"{kind}-{name}")

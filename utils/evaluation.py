"""Staged evaluation of networks on distilled unions, with two rows for scale; shared by PDD+MTT and PDD+IDC."""

import dataclasses
from collections.abc import Callable

from utils import distributed, files, progressive, report, training
from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Contender:
    """One architecture under evaluation.

    Attributes:
        name: of the architecture.
        count: networks trained on the distilled unions.
        network: function of k returning network k at its start.
        recipe: function of the stage's number (from 0) returning the `Recipe` for its union.
        random_recipe: the same for random real pictures.
        full_recipe: `Recipe` for the full training set.
        keep: called with (k, network) after its last stage.
    """

    name: str
    count: int
    network: Callable
    recipe: Callable
    random_recipe: Callable
    full_recipe: training.Recipe
    keep: Callable = lambda k, network: None


class Evaluation:
    """Evaluates contenders one after the other; every training inside continues after an interruption.

    Args:
        real: `RealData`.
        sources: the distilled unions as `Source`s, in order.
        ipc_totals: images of each class in each of them.
        seed: of the random streams.
        checkpoint: `files.Checkpoint`.
        random_networks: networks on random real pictures, 0 to leave the row out.
        full_networks: networks on the full training set, 0 to leave the row out.

    Raises:
        UserError: a class has fewer pictures than the row of random real ones needs.
    """

    def __init__(self, real, sources, ipc_totals, seed, checkpoint, random_networks, full_networks):
        self.real, self.sources, self.ipc_totals = real, sources, ipc_totals
        self.seed, self.checkpoint = seed, checkpoint
        self.random_networks, self.full_networks = random_networks, full_networks
        fewest = min(len(indices) for indices in real.class_indices)
        if random_networks and max(ipc_totals) > fewest:
            raise UserError(
                f"the row of random real pictures needs {max(ipc_totals)} of each class, {real.name} has {fewest}; "
                "leave it out with --skip_random"
            )

    def run(self, contenders, key):
        """Evaluate all `contenders`; `key` names the options and data that a continued run must share.

        Returns:
            {name: {"stages", "random", "full"}}, accuracies in percent.
        """
        models = {}
        with self.checkpoint.loop("models", key, lambda: {"models": models}) as saved:
            models |= saved["models"] if saved else {}
            for contender in contenders:
                if contender.name not in models:
                    models[contender.name] = self.evaluate(contender)
        return models

    def evaluate(self, contender):
        """Return {"stages", "random", "full"} of one architecture; rows left out are None."""
        rows = {}
        with self.checkpoint.loop("rows", contender.name, lambda: {"rows": rows}) as saved:
            rows |= saved["rows"] if saved else {}
            if "stages" not in rows:
                rows["stages"] = self.distilled(contender)
            if "random" not in rows:
                rows["random"] = self.random(contender) if self.random_networks else None
            if "full" not in rows:
                rows["full"] = self.full(contender) if self.full_networks else None
        return rows

    def distilled(self, contender):
        """Return the rows of the distilled unions."""

        def train(k, checkpoint):
            network = contender.network(k)
            accuracies = progressive.staged_accuracies(
                network,
                self.sources,
                contender.recipe,
                self.real.test,
                self.seed,
                ("distilled", contender.name, k),
                checkpoint,
            )
            contender.keep(k, network)
            return accuracies

        runs = self.repeat("distilled", contender, contender.count, train)
        return report.stage_rows(self.ipc_totals, runs)

    def random(self, contender):
        """Return the row of random real pictures: as many, in as many stages, trained in the same way."""

        def train(k, checkpoint):
            sources = progressive.random_unions(self.real, self.ipc_totals, self.seed, (k,))
            return progressive.staged_accuracies(
                contender.network(k),
                sources,
                contender.random_recipe,
                self.real.test,
                self.seed,
                ("random", contender.name, k),
                checkpoint,
            )

        return report.summary([run[-1] for run in self.repeat("random", contender, self.random_networks, train)])

    def full(self, contender):
        """Return the row of the full training set."""

        def train(k, checkpoint):
            network = contender.network(k)
            progress = report.Progress(contender.full_recipe.epochs, f"{contender.name}, full training set, epoch")
            training.train(
                network,
                self.real.train,
                contender.full_recipe,
                self.seed,
                ("full", contender.name, k),
                each_epoch=lambda _epoch, loss: progress.update(loss=loss),
                checkpoint=checkpoint,
            )
            progress.close()
            return [training.accuracy(network, self.real.test)]

        return report.summary([run[-1] for run in self.repeat("full", contender, self.full_networks, train)])

    def repeat(self, kind, contender, count, train):
        """Return [train(0, …), …, train(count - 1, …)], each done once over all ranks and interruptions."""
        progress = report.Progress(len(distributed.share(range(count))), f"{contender.name}, {kind}, network")

        def one(k, checkpoint):
            run = train(k, checkpoint)
            progress.update(accuracy=run[-1])
            return run

        runs = self.checkpoint.spread(kind, contender.name, list(range(count)), one)
        progress.close()
        return runs


def evaluate_and_report(folder, dataset, evaluation, contenders, options, versions, select_on, keeps="best"):
    """Run an evaluation; writes report.json and accuracy.png into `folder` and prints the table.

    Args:
        folder: of the results.
        dataset: its name.
        evaluation: `Evaluation`.
        contenders: list of `Contender`s; the first one's rows stand at the top of the report.
        options: dict of the options that change the results.
        versions: dict of versions.
        select_on: what accuracies inside the stages were measured on (`progressive.selected_on`).
        keeps: which iteration's images a stage keeps by them, the `best` or whatever they are the `last`.
    """
    unions = [files.digest([source.images, source.labels]) for source in evaluation.sources]
    models = evaluation.run(contenders, (sorted(options.items()), unions))
    first = contenders[0].name
    result = {
        "dataset": dataset,
        "model": first,
        "select_on": select_on,
        "keeps": keeps,
        **models[first],
        "models": models,
        "config": {**options, "versions": versions},
    }
    if distributed.is_first():
        picture = report.write_report(folder, result)
        report.show(f"{report.table(result)}\nreport: {folder / 'report.json'}\npicture: {picture}")
    evaluation.checkpoint.clear()

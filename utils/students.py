"""The networks whose gradients PDD+IDC matches: trained on the earlier unions, then on real images between sweeps."""

import dataclasses

from . import training
from .run import distributed
from .run.checkpoint import finish_each
from .run.device import to_device
from .run.streams import stream
from .training import TrainConfig


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """How the network of an outer iteration comes about.

    Attributes:
        earlier: `TrainConfig` on each earlier union in turn.
        early: `TrainConfig` on real images before the first sweep; None for none.
        real: `TrainConfig` on real images after every sweep: its epochs, of `n_data` images each.
        n_data: real images of such an epoch.
        fix_iter: outer iterations with one network.
        pool: networks trained on the earlier unions once and used in turn; 0 trains a new one for each outer iteration.
        batch: networks that are trained on the earlier unions together.
    """

    earlier: TrainConfig
    early: TrainConfig | None
    real: TrainConfig
    n_data: int
    fix_iter: int = 1
    pool: int = 0
    batch: int = 1


class Student:
    """The network of the current outer iteration; part of a checkpoint.

    Args:
        new_network: function of an outer iteration's number returning its network before any training.
        unions: earlier unions as `ImageDataset`s, in order.
        real: `ImageDataset` of the real training images.
        config: `StudentConfig`.
        last: number of outer iterations.
        seed, stage: of the random streams; stage from 0.
        folder, key: as for `finish_each`, which keeps trained networks if the run is interrupted.
    """

    def __init__(self, new_network, unions, real, config, last, seed, stage, folder, key):
        self.new_network, self.unions, self.real, self.config = new_network, unions, real, config
        self.last, self.seed, self.stage, self.folder, self.key = last, seed, stage, folder, key
        self.network = self.optimizer = None
        self.started = {}  # states of networks before their first sweep, by outer iteration

    def begin(self, outer):
        """Start the network of an outer iteration; with fix_iter go on with the one before."""
        config = self.config
        if config.fix_iter > 1 and outer % config.fix_iter and self.network is not None:
            return
        self.network = None  # a save while its successor is made leaves it out
        number = outer % config.pool if config.pool else outer
        network = self.new_network(number)
        if self.unions or config.early:
            if number not in self.started:
                self.started = self._start_from(number)
            network.load_state_dict(self.started[number])
        self.network, self.optimizer = network, training.sgd(network, config.real)

    def _start_from(self, number):
        """Train the networks from `number` on that start together; returns {outer iteration: state}."""
        config = self.config
        if config.pool:
            numbers = range(min(config.pool, self.last))
        else:
            numbers = range(number, self.last, max(1, config.fix_iter))[: config.batch * distributed.size()]
        groups = [tuple(numbers[at : at + config.batch]) for at in range(0, len(numbers), config.batch)]
        found = finish_each(self.folder, "starts", self.key, groups, self._train_group)
        return {number: state for states in found for number, state in states}

    def _train_group(self, numbers):
        """Train networks on each earlier union in turn, then on real images; returns pairs (number, state)."""
        config, seed, stage = self.config, self.seed, self.stage
        members, optimizers = [self.new_network(number) for number in numbers], None
        for before, union in enumerate(self.unions):
            keys = [("earlier", stage, number, before) for number in numbers]
            optimizers = training.train_together(members, union, config.earlier, seed, keys, optimizers)
        if config.early:
            for number, member in zip(numbers, members, strict=True):
                training.train(member, self.real, config.early, seed, ("early", stage, number))
        return [(number, training.state_on_cpu(member)) for number, member in zip(numbers, members, strict=True)]

    def broadcast(self):
        """Give every rank the network of rank 0, which trains it: copies would drift on GPUs."""
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        distributed.broadcast_([*self.network.parameters(), *buffers])

    def train_on_real(self, outer, inner):
        """Train the network on n_data real images, net_epoch times."""
        for epoch in range(self.config.real.epochs if distributed.is_rank0() else 0):
            rng = stream(self.seed, "real", self.stage, outer, inner, epoch)
            chosen = rng.choice(len(self.real), min(self.config.n_data, len(self.real)), replace=False)
            index = to_device(chosen, self.real.labels.device)
            training.train_epoch(self.network, self.optimizer, self.real, self.config.real, rng, index=index)

    def state_dict(self):
        if self.network is None:
            return {}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        if state:
            self.network = self.new_network(0)
            self.network.load_state_dict(state["network"])
            self.optimizer = training.sgd(self.network, self.config.real)
            self.optimizer.load_state_dict(state["optimizer"])

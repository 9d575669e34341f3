"""The networks whose gradients PDD+IDC matches: trained on the earlier unions, then on real images between sweeps."""

import copy
import dataclasses

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from . import training
from .run import distributed
from .run.checkpoint import finish_each
from .run.device import to_device
from .run.streams import EndlessShuffle, stream
from .training import TrainConfig


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """How the student of an outer iteration is trained.

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
        last: number of outer iterations, of `inner_loop` sweeps each.
        seed, stage: of the random streams; stage from 0.
        folder, key: as for `finish_each`, which keeps trained networks if the run is interrupted.
    """

    def __init__(self, new_network, unions, real, config, last, inner_loop, seed, stage, folder, key):
        self.new_network, self.unions, self.real, self.config = new_network, unions, real, config
        self.last, self.inner_loop, self.seed, self.stage = last, inner_loop, seed, stage
        self.folder, self.key = folder, key
        self.shuffle = EndlessShuffle(range(len(real)), seed, "real", stage)
        self.network = self.optimizer = None
        self.started = {}  # states of networks before their first sweep, by outer iteration

    def begin(self, outer):
        """Start the network of an outer iteration; with fix_iter go on with the one before."""
        config = self.config
        if config.fix_iter > 1 and outer % config.fix_iter and self.network is not None:
            return
        self.network = None  # a checkpoint saved from here on holds none
        pool = config.pool if self.unions or config.early else 0
        number = outer // max(1, config.fix_iter) % pool if pool else outer
        network = self.new_network(number)
        optimizer = training.sgd(network, config.real)
        if self.unions or config.early:
            if number not in self.started:
                self.started = self._start_from(number)
            state, momentum = self.started[number]
            network.load_state_dict(state)
            optimizer.load_state_dict(copy.deepcopy(momentum))  # the early epochs and the sweeps share it
        self.network, self.optimizer = network, optimizer

    def _start_from(self, number):
        """Train the networks from `number` on that start together; returns {outer iteration: state}."""
        config = self.config
        if config.pool:
            numbers = range(min(config.pool, self.last))
        else:
            step, together = max(1, config.fix_iter), config.batch * distributed.size()
            first = number // (step * together) * (step * together)  # as before an interruption
            numbers = range(first, self.last, step)[:together]
        groups = [tuple(numbers[at : at + config.batch]) for at in range(0, len(numbers), config.batch)]
        found = finish_each(self.folder, "starts", self.key, groups, self._train_group)
        return {number: state for states in found for number, state in states}

    def _train_group(self, numbers):
        """Train networks on each earlier union in turn, then on real images.

        Returns:
            List of (number, (network's state, optimiser's state)), on the CPU.
        """
        config, seed, stage = self.config, self.seed, self.stage
        members = [self.new_network(number) for number in numbers]
        for before, union in enumerate(self.unions):  # each with an optimiser of its own, as published
            keys = [("earlier", stage, number, before) for number in numbers]
            training.train_together(members, union, config.earlier, seed, keys)
        optimizers = [training.sgd(member, config.real) for member in members]
        if config.early:
            for number, member, optimizer in zip(numbers, members, optimizers, strict=True):
                training.train(member, self.real, config.early, seed, ("early", stage, number), optimizer)
        states = [
            (training.state_on_cpu(member), tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict()))
            for member, optimizer in zip(members, optimizers, strict=True)
        ]
        return list(zip(numbers, states, strict=True))

    def broadcast(self):
        """Give every rank the network of rank 0, which trains it: copies would drift on GPUs."""
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        distributed.broadcast_([*self.network.parameters(), *buffers])

    def train_on_real(self, outer, inner):
        """Train the network on n_data // batch_size + 1 minibatches of an endless shuffle, net_epoch times.

        Of no minibatch if n_data is 0, as published.
        """
        if not self.config.n_data:
            return
        count = self.config.n_data // self.config.real.batch_size + 1
        size = min(self.config.real.batch_size, len(self.real))
        config = dataclasses.replace(self.config.real, batch_size=size)
        for epoch in range(config.epochs if distributed.is_rank0() else 0):
            number = ((outer * self.inner_loop + inner) * config.epochs + epoch) * count
            index = np.concatenate([self.shuffle.batch(number + batch, size) for batch in range(count)])
            rng = stream(self.seed, "real", self.stage, outer, inner, epoch)
            index = to_device(index, self.real.labels.device)
            training.train_epoch(self.network, self.optimizer, self.real, config, rng, index)

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

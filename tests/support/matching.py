"""Small problems of trajectory matching with their plain solution."""

import numpy as np
import torch

import networks
from benchmarks.baseline import match_unrolled, unfused
from networks.reparam import ReparamModule, flatten
from utils.augment import DSA
from utils.synthetic import SyntheticSet
from utils.trajectory_matching import Step, plan_batches


def relative(found, expected):
    """Return the largest difference of two tensors relative to the largest value of the second."""
    return float((found - expected).abs().max() / expected.abs().max())


def case(batch=5, total=11, steps=7, size=16, channels=3, name="ConvNetW32"):
    """Return a small matching problem in float64 with DSA on and minibatches smaller than the union.

    Returns:
        The arguments of `match` up to the steps, and (loss, gradients) of plain unrolling.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = networks.get_network(name, channels, 4, size).double()
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images = torch.randn(total, channels, size, size, dtype=torch.float64)
    labels = torch.from_numpy(rng.integers(4, size=total))
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    plan = [
        (torch.from_numpy(index), [(n, u.double()) for n, u in dsa.draw(len(index), rng)])
        for index in plan_batches(total, batch, steps, rng)
    ]
    assert len({draw[0][0] for _, draw in plan}) > 2
    prepared = [Step(index, lambda x, draw=draw: dsa.apply(x, draw)) for index, draw in plan]
    lr = torch.tensor(0.03, dtype=torch.float64)
    plain_network = unfused(networks.get_network(name, channels, 4, size).double())
    expected = match_unrolled(plain_network, start, target, lr, images, labels, plan, dsa.apply)
    return ReparamModule(network), start, target, lr, images, labels, prepared, expected


class ExpertsInMemory:
    """What a `TrajectoryMatcher` needs of `Experts`, without files."""

    def __init__(self, *trajectories):
        self.trajectories = trajectories

    def __len__(self):
        return len(self.trajectories)

    def parameters(self, expert, epoch):
        return self.trajectories[expert][epoch]

    def order(self, rng):
        return rng.permutation(len(self)).tolist()

    def drawn(self, number, order, _rng):
        return order[number % len(order)]


def union_and_experts(experts=2, entries=4, counts=(4, 4)):
    """Return a student, experts of random trajectories and a union of two stages, in float64."""
    torch.manual_seed(0)
    student = ReparamModule(unfused(networks.get_network("ConvNetW32", 1, 4, 8)).double())
    start = flatten(student.network.parameters())
    made = ExpertsInMemory(*([start + 0.01 * torch.randn_like(start) for _ in range(entries)] for _ in range(experts)))
    images = torch.randn(sum(counts), 1, 8, 8, dtype=torch.float64)
    labels, lr = torch.arange(4).repeat(len(images) // 4), torch.tensor(0.03, dtype=torch.float64)
    return student, made, SyntheticSet(images, labels, lr, list(counts))

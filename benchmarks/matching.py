"""One matching iteration: this project against full unrolling (create_graph, published DSA).

python benchmarks/matching.py --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import networks
from benchmarks import baseline, harness
from networks.reparam import ReparamModule, flatten
from utils.augment import DSA
from utils.options import DSA_STRATEGY
from utils.run.device import setup_device
from utils.trajectory_matching import Step, match, plan_batches

DIGITS = {"model": "ConvNetW32", "size": 8, "channel": 1}
CASES = {
    "CIFAR-10 IPC 10 stage: 20 images, 50 steps, ConvNet": {"model": "ConvNet", "steps": 50},
    "the same, ConvNetW32": {"model": "ConvNetW32", "steps": 50},
    "quickstart: 30 digits, 10 a step, 20 steps, ConvNetW32": {**DIGITS, "steps": 20, "total": 30, "batch": 10},
}
SMALLEST = {"4 digits, 2 a step, 2 steps, ConvNetW32": {**DIGITS, "steps": 2, "total": 4, "batch": 2}}


def problem(model, size, channel, total, classes, device):
    """Return everything that both ways start from, the same for both."""
    torch.manual_seed(0)
    network = networks.get_network(model, channel, classes, size).to(device)
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images = torch.randn(total, channel, size, size, device=device)
    labels = torch.arange(total, device=device) % classes
    return network, start, target, torch.tensor(0.01, device=device), images, labels


def published(model, steps, size=32, channel=3, total=20, batch=20, classes=10, device="cpu"):
    """Full unrolling; a minibatch's entry of the strategy is drawn as there."""
    network, *tensors = problem(model, size, channel, total, classes, device)
    baseline.unfused(network)
    start, target, lr, images, labels = tensors
    names, rng = DSA_STRATEGY.split("_"), np.random.default_rng(0)

    def work():
        plan = [
            (torch.from_numpy(index), names[int(rng.integers(len(names)))])
            for index in plan_batches(total, batch, steps, rng)
        ]
        baseline.match_unrolled(network, start, target, lr, images, labels, plan, baseline.augment)

    return work


def project(
    model,
    steps,
    size=32,
    channel=3,
    total=20,
    batch=20,
    classes=10,
    device="cpu",
    retained_graphs=None,
    slice_size=None,
    **precision,
):
    """The exact adjoint; all graphs retained unless `retained_graphs` says otherwise."""
    setup_device(device)
    network, *tensors = problem(model, size, channel, total, classes, device)
    student = ReparamModule(network, **precision)
    retained = steps if retained_graphs is None else retained_graphs
    dsa, rng = DSA(DSA_STRATEGY), np.random.default_rng(0)

    def step(index):
        draw = dsa.draw(len(index), rng)
        return Step(torch.from_numpy(index).to(device), lambda x: dsa.apply(x, draw))

    def work():
        plan = [step(index) for index in plan_batches(total, batch, steps, rng)]
        match(student, *tensors, plan, 0, retained, slice_size)

    return work


def compiled(**case):
    return project(**case, compiled=True)


def main():
    options = harness.parse(__doc__, harness.PRECISION)
    ways = {"": project}
    if options.device != "cpu" and options.precision == "fp32":
        ways[", --compile"] = compiled
    cases = SMALLEST if options.smallest else CASES
    rows = [
        harness.pair(label + words, published, way, options, **case)
        for label, case in cases.items()
        for words, way in ways.items()
    ]
    harness.show_pairs("one matching iteration", rows, options)


if __name__ == "__main__":
    harness.run(main)

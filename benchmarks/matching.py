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
from utils import matching, runtime
from utils.augment import DSA
from utils.options import DSA_STRATEGY
from utils.reparam import FlatNetwork, flatten

ROWS = {
    "CIFAR-10 IPC 10 stage: 20 images, 50 steps, ConvNet": {"model": "ConvNet", "steps": 50},
    "the same, ConvNetW32": {"model": "ConvNetW32", "steps": 50},
    "quickstart: 30 digits, 10 a step, 20 steps, ConvNetW32": {
        "model": "ConvNetW32",
        "steps": 20,
        "size": 8,
        "channel": 1,
        "total": 30,
        "batch": 10,
    },
}


def problem(model, steps, size=32, channel=3, total=20, batch=20, classes=10, device="cpu"):
    """Return everything that both ways start from, the same for both."""
    torch.manual_seed(0)
    network = networks.get_network(model, channel, classes, size).to(device)
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images = torch.randn(total, channel, size, size, device=device)
    labels = torch.arange(total, device=device) % classes
    return network, start, target, images, labels


def published(steps, batch=20, total=20, **shape):
    """Full unrolling; a minibatch's entry of the strategy is drawn as there."""
    network, start, target, images, labels = problem(steps=steps, batch=batch, total=total, **shape)
    baseline.unfused(network)
    lr = torch.tensor(0.01, device=images.device)
    names = DSA_STRATEGY.split("_")
    rng = np.random.default_rng(0)

    def work():
        plan = [
            (torch.from_numpy(index), names[int(rng.integers(len(names)))])
            for index in matching.plan_batches(total, batch, steps, rng)
        ]
        baseline.match_unrolled(network, start, target, lr, images, labels, plan, baseline.augment)

    return work


def project(
    steps, batch=20, total=20, kept_steps=None, device="cpu", compiled=False, bf16=False, slice_size=None, **shape
):
    """The exact adjoint; all graphs kept unless `kept_steps` says otherwise."""
    runtime.choose_device(device)
    network, start, target, images, labels = problem(steps=steps, batch=batch, total=total, device=device, **shape)
    student, lr = FlatNetwork(network, compiled, bf16=bf16), torch.tensor(0.01, device=device)
    dsa, rng = DSA(DSA_STRATEGY), np.random.default_rng(0)

    def work():
        plan = []
        for index in matching.plan_batches(total, batch, steps, rng):
            draw = dsa.draw(len(index), rng)
            plan.append(matching.Step(torch.from_numpy(index).to(device), lambda x, draw=draw: dsa.apply(x, draw)))
        kept = steps if kept_steps is None else kept_steps
        matching.match(student, start, target, lr, images, labels, plan, 0, kept, slice_size)

    return work


def compiled(**case):
    return project(**case, compiled=True)


def bf16(**case):
    return project(**case, bf16=True)


def main():
    options = harness.parser(__doc__).parse_args()
    ways = {"project": ""}
    if options.device != "cpu":  # what the other options gain there
        ways |= {"compiled": ", --compile", "bf16": ", --bf16"}
    rows = [
        harness.pair(
            label + words,
            "benchmarks.matching",
            "published",
            way,
            {**case, "device": options.device},
            options.pairs,
            options.threads,
        )
        for label, case in ROWS.items()
        for way, words in ways.items()
    ]
    harness.show("one matching iteration", rows, options)


if __name__ == "__main__":
    main()

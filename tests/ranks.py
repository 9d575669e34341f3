"""What the ranks of test_distributed.py compute, in float64; one process computes the same without torchrun.

torchrun --nproc_per_node=2 tests/ranks.py RESULT.pt
"""

import sys

import torch

import distill_idc
import networks
from tests.test_matching import case
from utils import datasets, distributed, files
from utils.gradient_matching import sweep
from utils.matching import match
from utils.runtime import stream

IDC = ["-d", "digits", "--ipc", "2", "--factor", "2", "--depth", "2", "--metric", "mse", "--batch_real", "8",
       "--batch_syn_max", "20"]  # fmt: skip


def matchings():
    """One iteration with minibatches smaller than the union, DSA and frozen pictures: {what: (loss, gradients)}."""
    found = {}
    for name, students, kept, slice_size, batch in [
        ("split", 1, 2, None, 5),
        ("in slices", 1, 7, 1, 5),
        ("fewer pictures than ranks", 1, 3, None, 1),
        ("two students", 2, 0, None, 5),
        ("three students", 3, 0, None, 5),
    ]:
        student, start, target, lr, images, labels, steps, _ = case(batch=batch)
        team, own = distributed.form_teams(students)
        total = [torch.zeros_like(lr), torch.zeros_like(images[4:]), torch.zeros_like(lr)]
        for number in own:
            goal = target + 0.001 * number * torch.cos(torch.arange(len(target), dtype=torch.float64))
            loss, *rest = match(student, start, goal, lr, images, labels, steps, 4, kept, slice_size, team)
            total = [a + b for a, b in zip(total, [loss / team.count, *rest], strict=True)]
        found[name] = [distributed.sum_(value) for value in total]
    return found


def idc_sweeps():
    """Two sweeps of a later stage from one network: (images, velocity, losses)."""
    sys.argv[1:] = IDC
    options = distill_idc.parse()
    real = datasets.load("Digits", "", torch.device("cpu"))
    run = distill_idc.Run(options, real, None)
    run.mean, run.std = run.mean.double(), run.std.double()
    earlier = torch.from_numpy(stream(0, "earlier").random((10, 2, 2, 1, 8, 8)))
    learned = torch.from_numpy(stream(0, "learned").random((10, 2, 1, 8, 8)))
    learner = distill_idc.Learner(run, 2, earlier, learned, None)
    torch.manual_seed(0)
    learner.network = networks.idc_network("convnet", 1, 10, 8, depth=2, width=0.25).double()
    losses = []
    for turn in range(2):
        rng = stream(0, turn)
        gradients = lambda x, rng=rng: learner.gradients(x, rng)  # noqa: E731
        losses.append(sweep(learned, learner.velocity, 0.1, 0.5, gradients))
    return learned, learner.velocity, torch.stack(losses)


def main():
    path = sys.argv[1]
    torch.set_num_threads(1)
    found = {"matchings": matchings(), "sweeps": idc_sweeps()}
    # What one rank says in the others' presence, and the same bits everywhere.
    copies = distributed.gather([*found["sweeps"], *found["matchings"]["split"]])
    same = all(torch.equal(a, b) for copy in copies for a, b in zip(copy, copies[0], strict=True))
    found["same on every rank"] = same
    found["order"] = distributed.gather(distributed.rank())
    found["dealt"] = distributed.deal(range(5))
    if distributed.is_first():
        files.save(path, found)


if __name__ == "__main__":
    distributed.run(main, "nothing")

"""What the ranks of test_distributed.py compute, in float64; one process computes the same without torchrun.

torchrun --nproc_per_node=2 tests/support/ranks.py RESULT.pt
"""

import sys

import torch

import networks
from tests.support.matching import case
from utils.augment import DSA
from utils.data import datasets
from utils.gradient_matching import GradientMatchConfig, GradientMatcher
from utils.run import distributed, files
from utils.run.main import run_script
from utils.run.streams import stream
from utils.synthetic import SyntheticSet
from utils.trajectory_matching import match


def matchings():
    """One iteration with minibatches smaller than the union, DSA and frozen images: {what: (loss, gradients)}."""
    found = {}
    for name, students, retained_graphs, slice_size, batch in [
        ("split", 1, 2, None, 5),
        ("in slices", 1, 7, 1, 5),
        ("fewer images than ranks", 1, 3, None, 1),
        ("two students", 2, 0, None, 5),
        ("three students", 3, 0, None, 5),
    ]:
        student, start, target, lr, images, labels, steps, _ = case(batch=batch)
        team, own = distributed.form_teams(students)
        total = [torch.zeros_like(lr), torch.zeros_like(images[4:]), torch.zeros_like(lr)]
        for number in own:
            goal = target + 0.001 * number * torch.cos(torch.arange(len(target), dtype=torch.float64))
            loss, *rest = match(student, start, goal, lr, images, labels, steps, 4, retained_graphs, slice_size, team)
            total = [a + b for a, b in zip(total, [loss / team.count, *rest], strict=True)]
        found[name] = [distributed.all_reduce_sum(value) for value in total]
    student, start, target, lr, images, labels, steps, _ = case()
    soft = torch.cos(torch.arange(4.0 * len(labels), dtype=torch.float64)).view(-1, 4).softmax(1)
    team, _ = distributed.form_teams(1)
    loss, *rest = match(student, start, target, lr, images, soft, steps, 4, 2, None, team)
    found["soft labels"] = [distributed.all_reduce_sum(value) for value in (loss / team.count, *rest)]
    return found


def idc_sweeps():
    """Two sweeps of stage 3 with one network: (images, momentum buffer, losses)."""
    real = datasets.load("Digits", "", torch.device("cpu"))
    real.train.mean, real.train.std = real.train.mean.double(), real.train.std.double()
    images = torch.from_numpy(stream(0, "images").random((60, 1, 8, 8)))
    synthetic = SyntheticSet(images, torch.arange(10).repeat_interleave(2).repeat(3), counts=[20, 20, 20])
    dsa = DSA("color_crop_cutout", "idc")
    config = GradientMatchConfig(0.1, dsa, factor=2, batch_real=8, batch_syn_max=20, metric="mse")
    matcher = GradientMatcher(real, synthetic, config)
    torch.manual_seed(0)
    network = networks.idc_network("convnet", 1, 10, 8, depth=2, width=0.25).double()
    losses = [matcher.sweep(network, turn) for turn in range(2)]
    return synthetic.learned, matcher.momentum_buffer, torch.stack(losses)


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
    if distributed.is_rank0():
        files.save(path, found)


if __name__ == "__main__":
    run_script(main, "nothing")

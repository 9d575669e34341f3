"""No step of a loop waits for the device, and nothing in it is on another one.

The device `meta` has shapes but no values: whatever asks for a value, as .item() and branches on tensors do, fails
there. So a loop that runs on it keeps a GPU busy. It computes with tensors of the CPU, too, which a GPU would not:
`OneDevice` refuses that.
"""

import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill_idc
import networks
from utils import augment, datasets, progressive, training
from utils.augment import DSA
from utils.datasets import Source
from utils.gradient_matching import sweep
from utils.matching import Step, match
from utils.options import DSA_STRATEGY
from utils.reparam import FlatNetwork, flatten
from utils.runtime import stream

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, except what GPUs allow: copies, and numbers (0-dim) of the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != torch.device("cpu")}
        assert len(places) < 2 or function is torch.ops.aten.copy_.default, f"{function} on {places}"
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device():
    with OneDevice():
        yield


def test_waits_and_mixtures_are_found():
    with pytest.raises(RuntimeError):
        float(torch.zeros(3, device=META).sum())
    with pytest.raises(AssertionError):
        torch.zeros(3, 3, device=META) @ torch.zeros(3, 3)


@pytest.mark.parametrize("compiled", [False, True])  # which step a compiler gets; it compiles nothing here
@pytest.mark.parametrize("kept_steps,slice_size,size", [(0, None, 32), (6, None, 8), (2, 3, 32)])
def test_a_matching_iteration(compiled, kept_steps, slice_size, size):
    network = networks.get_network("ConvNetW32", 3, 10, size).to(META)
    student = FlatNetwork(network)
    student.compiled = compiled
    images, labels = torch.zeros(9, 3, size, size, device=META), torch.zeros(9, dtype=torch.int64, device=META)
    start, lr = flatten(network.parameters()), torch.zeros((), device=META)
    dsa, rng = DSA(DSA_STRATEGY), np.random.default_rng(0)
    draws = [[(name, torch.rand(5, 3))] for name in dsa.names]
    assert len(draws) == 6
    steps = [
        Step(torch.from_numpy(rng.permutation(9)[:5]).to(META), lambda x, draw=draw: dsa.apply(x, draw))
        for draw in draws
    ]
    assert student.written_out(images) == compiled
    found = match(student, start, start + 1, lr, images, labels, steps, 4, kept_steps, slice_size)
    assert [tensor.device for tensor in found] == [META] * 3 and found[1].shape == images[4:].shape


def test_windows_of_canvases():
    x = augment.random_windows(torch.zeros(4, 3, 16, 16, device=META), np.random.default_rng(0), 8, 2)
    assert x.shape == (8, 3, 8, 8) and x.device == META


@pytest.mark.parametrize("stacked", [False, True])
def test_training(stacked):
    source = Source(torch.zeros(12, 3, 32, 32, device=META), torch.zeros(12, dtype=torch.int64, device=META))
    members = [networks.get_network("ConvNetW32", 3, 10, 32).to(META) for _ in range(2)]
    recipe = training.evaluation_recipe(2, 0.01, 5, DSA(DSA_STRATEGY))
    training.train_together(members, source, recipe, 0, [("a",), ("b",)], stacked=stacked)
    assert all(parameter.device == META for member in members for parameter in member.parameters())


@pytest.mark.parametrize(
    "words", [[], ["--match", "feat", "--metric", "l2"], ["--metric", "cos", "--mixup", "vanilla"]]
)
def test_a_sweep_of_idc_and_its_training(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill_idc.py", "-d", "digits", "--ipc", "2", "--batch_real", "8", *words])
    options = distill_idc.parse()
    real = datasets.load("Digits", "", torch.device("cpu"))
    monkeypatch.setattr(real, "train", Source(real.train.images.to(META), real.train.labels.to(META)))
    run = distill_idc.Run(options, real, None)
    run.mean, run.std = run.mean.to(META), run.std.to(META)
    earlier = torch.zeros(10, 2, 1, 1, 8, 8, device=META)
    learner = distill_idc.Learner(run, 1, earlier, torch.zeros(10, 2, 1, 8, 8, device=META), None)
    learner.network = networks.idc_network("convnet", 1, 10, 8, depth=2, width=0.25).to(META)
    rng = stream(0)
    total = sweep(learner.learned, learner.velocity, 0.1, 0.5, lambda images: learner.gradients(images, rng))
    assert total.device == META
    recipe = progressive.idc_recipe(options, 2, real_pictures=True)
    training.train(learner.network, real.train, recipe, 0, ("real",))

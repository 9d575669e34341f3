"""No step of a loop waits for the device, and nothing in it is on another one.

The device `meta` has shapes but no values: whatever asks for a value, as .item() and branches on tensors do, fails
there. So a loop that runs on it keeps a GPU busy. It computes with tensors of the CPU, too, which a GPU would not:
`OneDevice` refuses that.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import networks
from networks.kernels import explicit
from networks.reparam import ReparamModule, flatten
from tests.support.matching import ExpertsInMemory
from utils import augment, training
from utils.augment import DSA
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.gradient_matching import GradientMatchConfig, GradientMatcher
from utils.idc_student import Student, StudentConfig
from utils.options import DSA_STRATEGY
from utils.stages import evaluation_config
from utils.synthetic import SyntheticSet
from utils.trajectory_matching import Step, TrajectoryMatchConfig, TrajectoryMatcher, match

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


def test_waits_and_mixed_devices_are_found():
    with pytest.raises(RuntimeError):
        float(torch.zeros(3, device=META).sum())
    with pytest.raises(AssertionError):
        torch.zeros(3, 3, device=META) @ torch.zeros(3, 3)


@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetBN"])  # written out, and by autograd
@pytest.mark.parametrize("retained_graphs,slice_size,size", [(0, None, 32), (6, None, 8), (2, 3, 32)])
def test_a_matching_iteration(model, retained_graphs, slice_size, size):
    network = networks.get_network(model, 3, 10, size).to(META)
    student = ReparamModule(network)
    images, labels = torch.zeros(9, 3, size, size, device=META), torch.zeros(9, dtype=torch.int64, device=META)
    start, lr = flatten(network.parameters()), torch.zeros((), device=META)
    dsa, rng = DSA(DSA_STRATEGY), np.random.default_rng(0)
    draws = [[(name, torch.rand(5, 3))] for name in dsa.names]
    assert len(draws) == 6
    steps = [
        Step(torch.from_numpy(rng.permutation(9)[:5]).to(META), lambda x, draw=draw: dsa.apply(x, draw))
        for draw in draws
    ]
    assert explicit.applies(network, images) == (model == "ConvNetW32")
    found = match(student, start, start + 1, lr, images, labels, steps, 4, retained_graphs, slice_size)
    assert [tensor.device for tensor in found] == [META] * 3 and found[1].shape == images[4:].shape


def test_windows_of_canvases():
    x = augment.random_windows(torch.zeros(4, 3, 16, 16, device=META), np.random.default_rng(0), 8, 2)
    assert x.shape == (8, 3, 8, 8) and x.device == META


@pytest.mark.parametrize("canvas", [16, 32])
def test_a_matcher_of_trajectories(canvas):
    window = 16 if canvas > 16 else None
    student = ReparamModule(networks.get_network("ConvNetW32", 3, 10, 16).to(META))
    start = flatten(student.network.parameters())
    union = SyntheticSet(
        torch.zeros(20, 3, canvas, canvas, device=META),
        torch.zeros(20, dtype=torch.int64, device=META),
        torch.zeros((), device=META),
        [10, 10],
    )
    config = TrajectoryMatchConfig(8, 6, 1, 2, dsa=DSA(DSA_STRATEGY), window=window, retained_graphs=2)
    matcher = TrajectoryMatcher(student, ExpertsInMemory([start] * 3, [start] * 3), union, config)
    for iteration in range(3):
        assert matcher.backward(iteration).device == META
    assert union.learned.grad.shape == (10, 3, canvas, canvas) and union.syn_lr.grad.device == META


def zeros(count, channel, size):
    labels = torch.zeros(count, dtype=torch.int64, device=META)
    return ImageDataset(torch.zeros(count, channel, size, size, device=META), labels)


@pytest.mark.parametrize("stacked", [False, True])
def test_training(stacked):
    members = [networks.get_network("ConvNetW32", 3, 10, 32).to(META) for _ in range(2)]
    config = evaluation_config(2, 0.01, 5, DSA(DSA_STRATEGY))
    training.train_together(members, zeros(12, 3, 32), config, 0, [("a",), ("b",)], stacked=stacked)
    assert all(parameter.device == META for member in members for parameter in member.parameters())


@pytest.mark.parametrize(
    "match,metric,cutmix", [("grad", "l1", (0.5, 1.0)), ("feat", "l2", None), ("grad", "cos", None)]
)
def test_a_sweep_of_idc_and_its_network(match, metric, cutmix, monkeypatch):
    real = datasets.load("Digits", "", torch.device("cpu"))
    statistics = (real.info.mean, real.info.std)
    monkeypatch.setattr(real, "train", ImageDataset(real.train.images.to(META), real.train.labels.to(META), statistics))
    labels = torch.arange(10, device=META).repeat_interleave(2).repeat(2)
    union = SyntheticSet(torch.zeros(40, 1, 8, 8, device=META), labels, counts=[20, 20])
    config = GradientMatchConfig(
        0.1, DSA("color_crop_cutout", "idc"), factor=2, batch_real=8, batch_syn_max=6, match=match, metric=metric
    )
    matcher = GradientMatcher(real, union, config)
    train_config = training.TrainConfig(2, 0.01, 0.9, 5e-4, 16, DSA(DSA_STRATEGY, "idc"), cutmix=cutmix)
    student = Student(
        lambda number: networks.idc_network("convnet", 1, 10, 8, depth=2, width=0.25).to(META),
        [], real.train, StudentConfig(train_config, None, train_config, 50), 1, 2, 0, 0, None, None,
    )  # fmt: skip
    student.begin(0)
    assert matcher.sweep(student.network, 0).device == META
    student.train_on_real(0, 0)

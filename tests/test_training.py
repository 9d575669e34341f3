import contextlib
import re

import pytest
import torch
from torchvision.ops import StochasticDepth

import networks
from tests.formats import patterned
from utils import datasets, training
from utils.augment import DSA
from utils.datasets import Source
from utils.files import Checkpoint
from utils.options import DSA_STRATEGY


def setting(count=3, model="ConvNetW32"):
    real = datasets.load("Digits", "", torch.device("cpu"))
    images, labels = real.train.batch(slice(0, 50))
    source = Source(images.double(), labels)
    members = [training.new_network(model, real, 0, k).double() for k in range(count)]
    recipe = training.Recipe(
        3, 0.05, 0.9, 5e-4, 20, DSA("color_crop_flip_scale_rotate", "idc"), ((0, 0.2),), cutmix=(0.5, 1.0)
    )
    return source, members, recipe


@pytest.mark.parametrize("model", ["ConvNetW32", "MLP"])
def test_stacked_networks_equal_networks_one_by_one(model):
    results = []
    for stacked in (False, True):
        source, members, recipe = setting(model=model)
        optimizers = None
        for stage in range(2):  # the second time with the momentum of the first
            keys = [("x", stage, k) for k in range(3)]
            optimizers = training.train_together(members, source, recipe, 0, keys, optimizers, stacked=stacked)
        results.append([p.detach() for member in members for p in member.parameters()])
    for one, other in zip(*results, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-10


def test_results_do_not_depend_on_how_many_train_together():
    source, members, recipe = setting()
    training.train_together(members, source, recipe, 0, [("x", k) for k in range(3)])
    _, alone, _ = setting()
    training.train(alone[1], source, recipe, 0, ("x", 1))
    assert all(torch.equal(p, q) for p, q in zip(members[1].parameters(), alone[1].parameters(), strict=True))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("moment", [1, 4, 7])
def test_a_stopped_group_continues(stacked, moment, tmp_path):
    keys = [("x", k) for k in range(3)]
    source, expected, recipe = setting()
    training.train_together(expected, source, recipe, 0, keys, stacked=stacked)

    source, members, recipe = setting()
    checkpoint = Checkpoint(tmp_path / "c.pt", minutes=0)
    ticks = []
    original = checkpoint.tick

    def tick():
        original()
        ticks.append(1)
        if len(ticks) > moment % 3 if stacked else len(ticks) > moment:
            raise Stop

    checkpoint.tick = tick
    with pytest.raises(Stop):
        training.train_together(members, source, recipe, 0, keys, checkpoint=checkpoint, stacked=stacked)
    source, members, recipe = setting()
    training.train_together(members, source, recipe, 0, keys, checkpoint=Checkpoint(tmp_path / "c.pt"), stacked=stacked)
    for one, other in zip(expected, members, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_too_little_memory_for_all_together_trains_one_by_one(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    keys = [("x", k) for k in range(3)]
    source, expected, recipe = setting()
    training.train_together(expected, source, recipe, 0, keys, stacked=False)
    monkeypatch.setattr(training, "_train_stacked", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    _, members, _ = setting()
    training.train_together(members, source, recipe, 0, keys, stacked=True)
    for one, other in zip(expected, members, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def dropping():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.5), StochasticDepth(0.5, "row"))
    return torch.nn.Sequential(torch.nn.Flatten(), block, torch.nn.Linear(32, 10)).double()


def test_networks_that_draw_random_numbers_repeat_and_continue(tmp_path):
    source, _, recipe = setting()
    expected = dropping()
    training.train(expected, source, recipe, 0, ("x",))
    torch.manual_seed(1)
    again = dropping()
    torch.rand(7)
    state = torch.random.get_rng_state()
    training.train(again, source, recipe, 0, ("x",))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), again.parameters(), strict=True))

    checkpoint, ticks = Checkpoint(tmp_path / "c.pt", minutes=0), []
    original = checkpoint.tick

    def tick():
        original()
        ticks.append(1)
        if len(ticks) == 5:  # inside the second epoch
            raise Stop

    checkpoint.tick = tick
    with pytest.raises(Stop):
        training.train(dropping(), source, recipe, 0, ("x",), checkpoint=checkpoint)
    continued = dropping()
    training.train(continued, source, recipe, 0, ("x",), checkpoint=Checkpoint(tmp_path / "c.pt"))
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), continued.parameters(), strict=True))
    other = dropping()
    training.train(other, source, recipe, 0, ("y",))
    assert not torch.equal(next(other.parameters()), next(expected.parameters()))


SIZES = {"ConvNetD6": 64, "ConvNetD7": 128, "ConvNetD8": 256, "ResNet18ImageNet": 128, "ResNet6ImageNet": 128}
EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] if re.search("101|152|D8", name) else [])
    for name in (*networks.NAMES, *networks.IDC_NAMES)
]


@pytest.mark.parametrize("name", EVERY)
def test_every_network_trains_an_epoch(name):
    """On digits where they are large enough, else on pictures of 32 pixels, or more where the poolings need it."""
    pictures, labels = patterned(12, 3, SIZES.get(name, 32))
    source = Source(torch.from_numpy(pictures).float() / 255, torch.from_numpy(labels), ((0.5,) * 3, (0.25,) * 3))
    network = None
    if name not in SIZES:
        with contextlib.suppress(ValueError):
            network = networks.get_network(name, 1, 10, 8)
            source = Source(*datasets.load("Digits", "", torch.device("cpu")).train.batch(slice(0, 12)))
    network = network or networks.get_network(name, 3, 10, SIZES.get(name, 32))
    before = [p.detach().clone() for p in network.parameters()]
    training.train(network, source, training.Recipe(1, 0.001, batch_size=6, dsa=DSA(DSA_STRATEGY)), 0, ("epoch",))
    after = list(network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= len(before) // 2
    assert training.accuracy(network, source) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("channel,size", [(1, 28), (3, 64), (3, 128)])
@pytest.mark.parametrize("name", [*networks.NAMES, *networks.IDC_NAMES])
def test_every_network_runs_at_the_sizes_of_all_data_sets(name, channel, size):
    try:
        network = networks.get_network(name, channel, 10, size)
    except ValueError as error:
        assert re.search(r"at least \d+ pixels|needs 3 channels", str(error))
        return
    x = torch.randn(2, channel, size, size, requires_grad=True)
    network(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in network.parameters())

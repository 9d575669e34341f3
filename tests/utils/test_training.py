import contextlib
import copy
import math
import re

import numpy as np
import pytest
import torch
from torchvision.ops import StochasticDepth

import networks
from utils import training
from utils.augment import DSA
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.options import DSA_STRATEGY
from utils.run.streams import stream


def setting(count=3, model="ConvNetW32"):
    real = datasets.load("Digits", "", torch.device("cpu"))
    images, labels = real.train.batch(slice(0, 50))
    dataset = ImageDataset(images.double(), labels)
    members = [training.new_network(model, real, 0, k).double() for k in range(count)]
    config = training.TrainConfig(
        3, 0.05, 0.9, 5e-4, 20, DSA("color_crop_flip_scale_rotate", "idc"), ((0, 0.2),), cutmix=(0.5, 1.0)
    )
    return dataset, members, config


@pytest.mark.parametrize("model", ["ConvNetW32", "MLP"])
def test_stacked_networks_equal_networks_one_by_one(model):
    results = []
    for stacked in (False, True):
        dataset, members, config = setting(model=model)
        training.train_together(members, dataset, config, 0, [("x", k) for k in range(3)], stacked=stacked)
        results.append([p.detach() for member in members for p in member.parameters()])
    for one, other in zip(*results, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-10


def test_results_do_not_depend_on_how_many_train_together():
    dataset, members, config = setting()
    training.train_together(members, dataset, config, 0, [("x", k) for k in range(3)])
    _, alone, _ = setting()
    training.train(alone[1], dataset, config, 0, ("x", 1))
    assert all(torch.equal(p, q) for p, q in zip(members[1].parameters(), alone[1].parameters(), strict=True))


def test_too_little_memory_for_all_together_trains_one_by_one(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    keys = [("x", k) for k in range(3)]
    dataset, expected, config = setting()
    training.train_together(expected, dataset, config, 0, keys, stacked=False)
    monkeypatch.setattr(training, "_train_stacked", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    _, members, _ = setting()
    training.train_together(members, dataset, config, 0, keys, stacked=True)
    for one, other in zip(expected, members, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def dropping():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.5), StochasticDepth(0.5, "row"))
    return torch.nn.Sequential(torch.nn.Flatten(), block, torch.nn.Linear(32, 10)).double()


def test_networks_that_draw_random_numbers_repeat_and_continue():
    dataset, _, config = setting()
    expected = dropping()
    training.train(expected, dataset, config, 0, ("x",))
    torch.manual_seed(1)
    again = dropping()
    torch.rand(7)
    state = torch.random.get_rng_state()
    training.train(again, dataset, config, 0, ("x",))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), again.parameters(), strict=True))

    stopped, states = dropping(), []

    def keep(_epoch, _loss):
        states.append((copy.deepcopy(stopped.state_dict()), copy.deepcopy(optimizer.state_dict())))

    optimizer = training.sgd(stopped, config)
    training.train(stopped, dataset, config, 0, ("x",), optimizer, after_epoch=keep)
    for epoch, (network_state, optimizer_state) in enumerate(states):
        continued = dropping()
        optimizer = training.sgd(continued, config)
        continued.load_state_dict(network_state)
        optimizer.load_state_dict(optimizer_state)
        training.train(continued, dataset, config, 0, ("x",), optimizer, first_epoch=epoch + 1)
        assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), continued.parameters(), strict=True))
    other = dropping()
    training.train(other, dataset, config, 0, ("y",))
    assert not torch.equal(next(other.parameters()), next(expected.parameters()))


def test_training_is_sgd_with_momentum_weight_decay_and_milestones():
    """Against the update rule written out, in float64."""
    rng = np.random.default_rng(0)
    images, labels = torch.from_numpy(rng.normal(size=(7, 1, 2, 2))), torch.from_numpy(rng.integers(3, size=7))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    weight, bias = (p.detach().numpy().copy() for p in network.parameters())
    config = training.TrainConfig(4, 0.3, 0.9, 0.01, 3, lr_milestones=((0, 0.5), (2, 0.1)))
    losses = []
    training.train(
        network, ImageDataset(images, labels), config, 5, ("a", 1), after_epoch=lambda _, x: losses.append(x)
    )

    velocities, expected = [np.zeros_like(weight), np.zeros_like(bias)], []
    for epoch, lr in enumerate((0.3, 0.15, 0.15, 0.015)):
        order, total = stream(5, "a", 1, epoch).permutation(7), 0.0
        for part in (order[:3], order[3:6], order[6:]):
            x, y = images.flatten(1).numpy()[part], np.eye(3)[labels.numpy()[part]]
            logits = x @ weight.T + bias
            shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            total -= float((y * np.log(shares)).sum())
            gradients = [(shares - y).T @ x / len(x) + 0.01 * weight, (shares - y).mean(0) + 0.01 * bias]
            velocities = [0.9 * v + g for v, g in zip(velocities, gradients, strict=True)]
            weight, bias = (w - lr * v for w, v in zip((weight, bias), velocities, strict=True))
        expected.append(total / 7)
    for found, truth in zip(network.parameters(), (weight, bias), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), truth, rtol=1e-12, atol=1e-14)
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetBN", pytest.param("ResNet10", marks=pytest.mark.long)])
def test_bfloat16_trains_to_nearly_the_same(model):
    """Parameters stay in float32, and the same steps give the same bits."""
    found = []
    for precision in ("fp32", "bf16", "bf16"):
        torch.manual_seed(0)
        network, rng = networks.get_network(model, 1, 10, 16), np.random.default_rng(0)
        images = ImageDataset(
            torch.from_numpy(rng.normal(size=(30, 1, 16, 16)).astype(np.float32)), torch.arange(30) % 10
        )
        config, losses = training.TrainConfig(6, 0.02, 0.9, batch_size=10, precision=precision), []
        training.train(
            network, images, config, 0, ("x",), after_epoch=lambda _, x, losses=losses: losses.append(float(x))
        )
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())
        found.append((losses, [p.detach().clone() for p in network.parameters()]))
    exact, half, again = found
    assert half[0] != exact[0] and half[0] == pytest.approx(exact[0], rel=0.1) and exact[0][-1] < exact[0][0]
    assert half[0] == again[0] and all(torch.equal(p, q) for p, q in zip(half[1], again[1], strict=True))


def test_larger_images_are_tested_fewer_at_a_time():
    assert [training.testing_batch(size) for size in (8, 32, 64, 128, 256, 4096)] == [1024, 1024, 1024, 256, 64, 1]


def test_pruned_weights_are_zero_from_the_start_and_stay_zero():
    dataset, (network, *_), config = setting(1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    training.prune(network, 0.7, np.random.default_rng(0))
    convolutions = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    kept = [weight != 0 for weight in convolutions]
    assert len(kept) == len(convolutions) and all(int((~mask).sum()) == round(0.7 * mask.numel()) for mask in kept)
    for parameter, old in zip(network.parameters(), before, strict=True):
        mask = parameter != 0 if parameter.dim() == 4 else torch.ones_like(old, dtype=torch.bool)
        assert torch.equal(parameter[mask], old[mask])
    training.train(network, dataset, config, 0, ("x",))
    assert all(torch.equal(weight != 0, mask) for weight, mask in zip(convolutions, kept, strict=True))


def test_accuracy_counts_every_image_once(monkeypatch):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x[:, 0, 0, 0] > 0).long(), 2).double()

    images = torch.arange(-3.0, 8.0).view(11, 1, 1, 1)  # 4 of them are not above 0
    labels = torch.ones(11, dtype=torch.int64)
    for size in (1, 4, 11, 100):
        monkeypatch.setattr(training, "testing_batch", lambda im_size, size=size: size)
        assert training.accuracy(Constant(), ImageDataset(images, labels)) == pytest.approx(100 * 7 / 11)


def test_cutmix_shares_the_labels():
    logits, y, partners = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 0, 3, 1])
    shares = logits.log_softmax(1)
    expected = -sum(0.3 * shares[i, y[i]] + 0.7 * shares[i, y[partners[i]]] for i in range(4)) / 4
    assert math.isclose(training.mixed_loss(logits, y, partners, 0.3), expected, rel_tol=1e-12)
    plain = -sum(shares[i, y[i]] for i in range(4)) / 4
    assert math.isclose(training.mixed_loss(logits, y, None, 1.0), plain, rel_tol=1e-12)


@pytest.mark.parametrize("kind,cropped", [("crop", True), ("no_crop", False)])
def test_imagenets_augmentation_sees_pixels(kind, cropped, monkeypatch):  # SPEC 8.10
    """Network space comes after it."""
    images = ImageDataset(torch.full((6, 3, 4, 4), 255, dtype=torch.uint8), torch.arange(6), ((0.5,) * 3, (0.25,) * 3))
    given = []

    def augment(x, rng, crop):
        given.append((float(x.max()), crop))
        return x / 2

    monkeypatch.setattr(training, "imagenet_augment", augment)
    config = training.TrainConfig(1, 0.1, batch_size=4, imagenet=kind)
    batches = list(training.minibatches(images, config, np.random.default_rng(0)))
    assert given == [(1.0, cropped)] * 2 and [len(x) for x, *_ in batches] == [4, 2]
    assert all((x == (1 / 2 - 0.5) / 0.25).all() for x, *_ in batches)


def test_every_minibatch_has_its_own_dropout():
    masks = []
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    network[1].register_forward_hook(lambda _module, _inputs, output: masks.append((output != 0).flatten().tolist()))
    images = ImageDataset(torch.ones(12, 1, 8, 8), torch.arange(12) % 10)
    training.train(network, images, training.TrainConfig(2, 0.1, batch_size=4), 0, ("x",))
    assert len(set(map(tuple, masks))) == len(masks) == 6


SIZES = {"ConvNetD6": 64, "ConvNetD7": 128, "ConvNetD8": 256, "ResNet18ImageNet": 128, "ResNet6ImageNet": 128}
EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] if re.search("101|152|D8", name) else [])
    for name in (*networks.NAMES, *networks.IDC_NAMES)
]


@pytest.mark.parametrize("name", EVERY)
def test_every_network_trains_an_epoch(name):
    """On digits if they are large enough, else on images of 32 pixels, or more if the poolings need it."""
    network = None
    if name not in SIZES:
        with contextlib.suppress(ValueError):
            network = networks.get_network(name, 1, 10, 8)
            dataset = ImageDataset(*datasets.load("Digits", "", torch.device("cpu")).train.batch(slice(0, 12)))
    if network is None:
        size = SIZES.get(name, 32)
        network = networks.get_network(name, 3, 10, size)
        pixels = np.random.default_rng(0).integers(256, size=(12, 3, size, size), dtype=np.uint8)
        dataset = ImageDataset(torch.from_numpy(pixels), torch.arange(12) % 10, ((0.5,) * 3, (0.25,) * 3))
    before = [p.detach().clone() for p in network.parameters()]
    training.train(network, dataset, training.TrainConfig(1, 0.001, batch_size=6, dsa=DSA(DSA_STRATEGY)), 0, ("epoch",))
    after = list(network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= len(before) // 2
    assert 0 <= training.accuracy(network, dataset) <= 100


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

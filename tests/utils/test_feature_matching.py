"""Feature matching in float64, against the formulas written out one class, one image and one frequency at a time."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import networks
from tests.support.oracles import augment_one
from utils.augment import DSA
from utils.feature_matching import (
    FeatureMatchConfig,
    FeatureMatcher,
    cf_distances,
    features_of,
    last_linear,
    mean_distances,
)
from utils.multi_formation import decode_class
from utils.run import distributed
from utils.run.streams import EndlessShuffle, stream
from utils.synthetic import SyntheticSet
from utils.trajectories import mixture, window

CLASSES, PER_CLASS, SEED, STAGE = 3, 8, 5, 2
MEAN, STD = 0.45, 0.25


class Train:
    """Real images as the matcher sees them, in float64."""

    def __init__(self):
        self.images = torch.rand(CLASSES * PER_CLASS, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()

    def normalise(self, pixels):
        return (pixels - MEAN) / STD

    def batch(self, index):
        return self.normalise(self.images[index]), None


REAL = types.SimpleNamespace(
    train=Train(),
    info=types.SimpleNamespace(num_classes=CLASSES),
    smallest_class=PER_CLASS,
    class_indices=[np.arange(label * PER_CLASS, (label + 1) * PER_CLASS) for label in range(CLASSES)],
)


def network(seed=0, name="ConvNetW32"):
    torch.manual_seed(seed)
    return networks.get_network(name, 3, CLASSES, 16).double().requires_grad_(False)


def union(stages, ipc=2):
    images = torch.rand(stages * CLASSES * ipc, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(CLASSES).repeat_interleave(ipc).repeat(stages)
    return SyntheticSet(images, labels, counts=[CLASSES * ipc] * stages)


def matched(config, stages=3, iteration=4, finished=None, phi=None):
    """Returns (synthetic set, loss, gradient)."""
    synthetic = union(stages)
    loss = FeatureMatcher(REAL, synthetic, config, SEED, STAGE).backward(phi or network(), iteration, finished)
    return synthetic, float(loss), synthetic.learned.grad


def distance_written_out(real, synthetic, config, frequencies):
    """One class: features are lists of vectors."""
    if config.metric == "mean":
        return sum(
            (sum(f[k] for f in real) / len(real) - sum(f[k] for f in synthetic) / len(synthetic)) ** 2
            for k in range(len(real[0]))
        )
    total = 0.0
    for t in frequencies:
        r, s = (sum(torch.exp(1j * (t @ f)) for f in features) / len(features) for features in (real, synthetic))
        amplitude = (r.abs() - s.abs()) ** 2
        phase = 2 * (r.abs() * s.abs() - (r * s.conj()).real)
        assert float((amplitude + phase).detach()) == pytest.approx(float((r - s).abs().detach()) ** 2, abs=1e-12)
        total = total + (config.cf_alpha * amplitude + (1 - config.cf_alpha) * phase) ** 0.5
    return total / len(frequencies)


def loss_written_out(config, stages=3, iteration=4, finished=None):
    """Returns the loss, class by class, and its gradient in the images of the newest subset."""
    rng, phi, total = stream(SEED, "features", STAGE, iteration), network(), 0.0
    draw = config.augment.draw(1, rng)
    frequencies = torch.from_numpy(rng.standard_normal((config.frequencies, 128), dtype=np.float32)).double()
    images = union(stages).images.requires_grad_()
    grid = images.view(stages, CLASSES, -1, 3, 16, 16)

    def seen(image):
        x = (image - MEAN) / STD
        for name, u in draw:
            x = augment_one(x, name, u[0], config.augment.align_corners)
        return x

    def feature(x):
        value = phi.pool(phi.blocks(x[None])[-1]).flatten()
        return value / value.square().sum().sqrt()

    wrong, count = 0.0, 0
    for label in range(CLASSES):
        index = EndlessShuffle(REAL.class_indices[label], SEED, "class", STAGE, label).batch(iteration, 3)
        block = torch.stack([grid[p, label, slot] for slot in range(grid.shape[2]) for p in range(stages)])
        decoded = [seen(image) for image in decode_class(block, config.factor, config.decode_type)]
        real = [feature(seen(REAL.train.images[i])) for i in index]
        total = total + distance_written_out(real, [feature(x) for x in decoded], config, frequencies)
        if finished:
            wrong = wrong - sum(F.log_softmax(finished(x[None])[0], 0)[label] for x in decoded)
            count += len(decoded)
    total = total + (config.calibration * wrong / count if finished else 0.0)
    return float(total.detach()), torch.autograd.grad(total, images)[0].view(stages, -1, 3, 16, 16)[-1]


CONFIGS = [
    FeatureMatchConfig(DSA("color_crop_cutout", "idc"), factor=2, batch_real=3),
    FeatureMatchConfig(DSA("flip_scale_rotate"), batch_real=3, metric="cf", frequencies=7),
    FeatureMatchConfig(
        DSA("none"), 2, "multi", batch_real=3, metric="cf", cf_alpha=0.2, frequencies=7, calibration=0.3
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradient_of_the_newest_subset_are_those_of_the_formula(config):
    finished = network(1) if config.calibration else None
    synthetic, loss, gradient = matched(config, finished=finished)
    expected, expected_gradient = loss_written_out(config, finished=finished)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert gradient.shape == synthetic.learned.shape == (6, 3, 16, 16) and synthetic.images.grad is None
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-7


@pytest.mark.parametrize("config", CONFIGS)
def test_one_pass_over_all_classes_equals_a_loop(config):
    finished = network(1) if config.calibration else None
    _, loss, gradient = matched(config, finished=finished)
    _, looped, looped_gradient = matched(dataclasses.replace(config, pass_pixels=1), finished=finished)
    assert loss == pytest.approx(looped, rel=1e-12)
    assert torch.allclose(gradient, looped_gradient, rtol=1e-9, atol=1e-15)


def test_statistics_of_a_batch_do_not_depend_on_the_number_of_ranks(monkeypatch):
    config = CONFIGS[0]
    phi = network(name="ConvNetBN")
    _, loss, gradient = matched(config, phi=phi)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: 2)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor, group=None: tensor)
        parts.append(matched(config, phi=phi)[1:])
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(sum(part[1] for part in parts), gradient, rtol=1e-12, atol=1e-15)


def test_equal_distributions_have_no_distance_and_a_finite_gradient():
    features = torch.randn(2, 5, 4).double()
    same = features.flip(1).clone().requires_grad_()
    for distance in (
        mean_distances(features, same),
        cf_distances(features, same, torch.randn(9, 4).double(), 0.5),
    ):
        assert distance.tolist() == pytest.approx([0, 0], abs=2e-6)
        (gradient,) = torch.autograd.grad(distance.sum(), same)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["ConvNet", "ResNet10", "VGG11", "AlexNet", "MLP"])
def test_features_are_what_the_last_linear_layer_sees(name):
    torch.manual_seed(0)
    size = 32
    phi = networks.get_network(name, 3, 4, size).eval()
    x = torch.randn(2, 3, size, size)
    features = features_of(phi, x)
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1])
    layer = last_linear(phi)
    logits = phi(x) - layer.bias  # proportional to what the features give
    assert torch.allclose(F.normalize(logits), F.normalize(features @ layer.weight.T), atol=1e-5)


class Trajectories:
    """Two experts of three epochs."""

    entries = 4

    def parameters(self, expert, epoch):
        return torch.tensor([100.0 * expert, epoch**2]).double()


@pytest.mark.parametrize("position,squares", [(0, 0), (0.25, 0.25), (1, 1), (1.5, 2.5), (2.75, 7.75), (3, 9)])
def test_mixtures_lie_between_neighbouring_snapshots(position, squares):
    assert mixture(Trajectories(), 1, position).tolist() == [100, squares]


def test_windows_of_stages_part_the_trajectory():
    assert [window("all", stage, 4, 8) for stage in (1, 4)] == [(0, 8)] * 2
    assert [window("stage", stage, 4, 8) for stage in (1, 2, 3, 4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [window("stage", stage, 5, 2) for stage in (1, 5)] == [(0, 0.4), (1.6, 2)]

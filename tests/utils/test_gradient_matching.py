import numpy as np
import pytest
import torch

import networks
from benchmarks.baseline import idc_sweeps, unfused
from utils.augment import DSA
from utils.data import datasets
from utils.gradient_matching import (
    METRICS,
    GradientMatchConfig,
    GradientMatcher,
    class_sweep,
    distance,
    feature_range,
    matched_parameters,
    matching_loss,
)
from utils.multi_formation import decode_class, origins
from utils.run.streams import stream
from utils.synthetic import SyntheticSet


@pytest.mark.parametrize("metric", ["mse", "l1"])
@pytest.mark.parametrize("bias,fc", [(False, False), (True, True)])
@pytest.mark.parametrize("stages", [0, 2])
def test_class_sweep_equals_the_published_loop(metric, bias, fc, stages):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = networks.idc_network("convnet", 3, 10, 16, depth=2, width=0.0625).double()
    dsa = DSA("color_crop_cutout", "idc")
    images = torch.rand(10, 2, 3, 16, 16, dtype=torch.float64)
    earlier = torch.rand(10, 2, stages, 3, 16, 16, dtype=torch.float64) if stages else None
    batches = [
        [
            (torch.rand(6, 3, 16, 16, dtype=torch.float64), [(n, u.double()) for n, u in dsa.draw(1, rng)])
            for _ in range(10)
        ]
        for _ in range(3)
    ]
    lr, momentum = 0.05, 0.5
    plain = unfused(networks.idc_network("convnet", 3, 10, 16, depth=2, width=0.0625).double())
    plain.load_state_dict(network.state_dict())

    def normalise(x):
        return (x - 0.45) / 0.25

    expected = images.clone()
    losses = idc_sweeps(plain, expected, earlier, batches, lr, momentum, 2, dsa.apply, normalise, metric, bias, fc)

    config = GradientMatchConfig(lr, dsa, metric=metric, bias=bias, fc=fc)
    found, momentum_buffer, sums = images.clone(), torch.zeros_like(images), []
    for sweep_batches in batches:

        def gradients_of(seen, sweep_batches=sweep_batches):
            values, gradients = [], []
            for label, (real, draw) in enumerate(sweep_batches):
                learned = seen[label].detach().requires_grad_()
                block = learned
                if earlier is not None:
                    block = torch.cat([earlier[label], learned[:, None]], dim=1).flatten(0, 1)
                both = dsa.apply(normalise(torch.cat([real, decode_class(block, 2, "single")])), draw)
                loss = matching_loss(network, both[: len(real)].detach(), both[len(real) :], label, config)
                gradients.append(torch.autograd.grad(loss, learned)[0])
                values.append(loss.detach())
            return torch.stack(values), torch.stack(gradients)

        sums.append(float(class_sweep(found, momentum_buffer, lr, momentum, gradients_of)))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    moved = float((images - expected).abs().max())
    assert float((found - expected).abs().max()) < 1e-10 * moved
    assert sums == pytest.approx([sum(losses[i : i + 10]) for i in (0, 10, 20)], rel=1e-10)


def test_every_metric_by_its_definition():
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(distance(x, y, "mse")) == pytest.approx(4 + 9)
    assert float(distance(x, y, "l1")) == pytest.approx(2 + 3)
    assert float(distance(x, y, "l1_mean")) == pytest.approx(1 + 1.5)
    assert float(distance(x, y, "l2")) == pytest.approx(13**0.5)
    assert float(distance(x, y, "cos")) == pytest.approx((1 - 1 / 5**0.5) + (1 - 16 / 20), rel=1e-5)
    for metric in METRICS:
        z = y.clone().requires_grad_()
        assert float(distance(y, z, metric).detach()) == pytest.approx(0, abs=1e-5)
        distance(x, z, metric).backward()
        assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="unknown metric"):
        distance(x, y, "l3")


def test_which_gradients_count():
    network = networks.idc_network("convnet", 3, 10, 16, depth=2, width=0.0625)
    dims = lambda **k: [p.dim() for p in matched_parameters(network, **k)]  # noqa: E731
    assert dims(bias=False, fc=False) == [4, 4]
    assert dims(bias=False, fc=True) == [4, 4, 2]
    assert sorted(dims(bias=True, fc=True)) == sorted(p.dim() for p in network.parameters())


@pytest.mark.parametrize("net_type,depth", [("convnet", 2), ("resnet", 10)])
def test_features_are_means_over_the_batch(net_type, depth):
    network = networks.idc_network(net_type, 3, 10, 16, depth=depth, width=0.125).double()
    real, synthetic = torch.randn(5, 3, 16, 16).double(), torch.randn(3, 3, 16, 16).double().requires_grad_()
    found = matching_loss(network, real, synthetic, 0, GradientMatchConfig(0.1, None, match="feat", metric="mse"))
    maps = [network.blocks(x)[-1].mean(0) for x in (real, synthetic)]
    assert float(found.detach()) == pytest.approx(float(((maps[0] - maps[1]) ** 2).sum().detach()))
    assert torch.autograd.grad(found, synthetic)[0].abs().sum() > 0


@pytest.mark.parametrize("f_idx,blocks", [("0", [0]), ("1", [1]), ("0,1", [0, 1]), ("1,2", [1, 2]), ("1,9", [1, 2])])
def test_features_of_a_range_of_blocks_are_summed(f_idx, blocks):  # SPEC 8.13
    network = networks.idc_network("convnet", 3, 10, 16, depth=3, width=0.125).double()
    real, synthetic = torch.randn(5, 3, 16, 16).double(), torch.randn(3, 3, 16, 16).double()

    def features(x):
        maps, modules = [], iter(network.features)
        for _ in range(3):  # convolution, normalisation, activation, pooling
            for _ in range(4):
                x = next(modules)(x)
            maps.append(x.mean(0))
        return maps

    pairs = list(zip(features(real), features(synthetic), strict=True))
    config = GradientMatchConfig(0.1, None, match="feat", metric="mse", f_idx=feature_range(f_idx))
    expected = sum(float(((pairs[block][0] - pairs[block][1]) ** 2).sum()) for block in blocks)
    found = matching_loss(network, real, synthetic, 0, config)
    assert float(found) == pytest.approx(expected)


def digits_and_union(counts=(20, 20)):
    """The digits, and a union in float64 of one image of each class and slot in every stage."""
    torch.manual_seed(0)
    real = datasets.load("Digits", "", torch.device("cpu"))
    labels = torch.cat([torch.arange(10).repeat_interleave(count // 10) for count in counts])
    return real, SyntheticSet(torch.rand(sum(counts), 1, 8, 8, dtype=torch.float64), labels, counts=list(counts))


def small_network():
    torch.manual_seed(1)
    return networks.idc_network("convnet", 1, 10, 8, depth=2, width=0.0625).double()


@pytest.mark.parametrize("counts", [(20,), (20, 20, 20)])
def test_one_sweep_in_three_lines_without_files(counts):
    real, union = digits_and_union(counts)
    config = GradientMatchConfig(lr=0.05, augment=DSA("color_crop", "idc"), factor=2, batch_real=4)
    matcher = GradientMatcher(real, union, config)
    before = union.images.clone()
    found = [float(matcher.sweep(small_network(), number)) for number in (7, 8)]

    batches = []
    for number in (7, 8):
        rng = stream(0, "sweep", 0, number)
        draws = [matcher._draw(label, number, rng) for label in range(10)]
        assert all(cut is None and (real.train.labels[index] == c).all() for c, (index, cut, _) in enumerate(draws))
        batches.append([((real.train.images[index].float() / 255).double(), draw) for index, _, draw in draws])
    stages = before.view(len(counts), 10, 2, 1, 8, 8)
    images, earlier = stages[-1].clone(), stages[:-1].permute(1, 2, 0, 3, 4, 5) if len(counts) > 1 else None
    losses = idc_sweeps(
        unfused(small_network()), images, earlier, batches, 0.05, 0.5, 2, config.augment.apply,
        lambda x: (x - real.train.mean) / real.train.std, "l1", False, False,
    )  # fmt: skip
    frozen = union.first_learned
    assert torch.equal(union.images[:frozen], before[:frozen])
    moved = float((images.flatten(0, 1) - before[frozen:]).abs().max())
    assert moved > 0 and float((union.learned - images.flatten(0, 1)).abs().max()) < 1e-12 * moved
    assert found == pytest.approx([sum(losses[:10]), sum(losses[10:])], rel=1e-12)


def test_dropout_of_a_matched_network_is_that_of_its_class():
    """The same images, network and sweep give the same losses, whatever was drawn from torch before."""
    real, union = digits_and_union((20,))
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    network = torch.nn.Sequential(*layers).double()
    config = GradientMatchConfig(0.05, DSA("none", "idc"), batch_real=4)
    losses = []
    for drawn in (1, 2):
        torch.rand(drawn)
        losses.append(float(GradientMatcher(real, union, config).sweep(network, 0)))
        union = digits_and_union((20,))[1]
    assert losses[0] == losses[1]
    assert float(GradientMatcher(real, union, config, seed=1).sweep(network, 0)) != losses[0]


def test_real_images_of_a_class_come_from_an_endless_shuffle():  # SPEC 8.17
    """Class 3 of the digits: minibatches of 64 repeat no image before the class is used up."""
    real, union = digits_and_union((20,))
    matcher = GradientMatcher(real, union, GradientMatchConfig(0.05, DSA("none", "idc"), batch_real=64))
    count = len(real.class_indices[3])
    assert 128 <= count < 192  # so that two minibatches are one permutation
    drawn = [set(matcher._draw(3, number, np.random.default_rng(0))[0].tolist()) for number in range(8)]
    assert all(len(batch) == 64 and batch <= set(real.class_indices[3].tolist()) for batch in drawn)
    assert all(not drawn[at] & drawn[at + 1] for at in range(0, 8, 2))
    assert len(set(map(frozenset, drawn))) == 8  # another permutation each time
    other = GradientMatcher(real, union, matcher.config, stage=1)
    assert set(other._draw(3, 0, np.random.default_rng(0))[0].tolist()) != drawn[0]


def test_more_decoded_images_than_the_limit_are_cut_at_random():
    real, union = digits_and_union((20,))
    config = GradientMatchConfig(0.05, DSA("none", "idc"), factor=2, batch_real=4, batch_syn_max=3)
    matcher = GradientMatcher(real, union, config)
    cuts = [matcher._draw(4, 0, np.random.default_rng(seed))[1] for seed in range(20)]
    assert all(len(set(cut)) == 3 and set(cut) <= set(range(8)) for cut in cuts) and len(set(map(tuple, cuts))) > 10
    network, block = small_network(), union.by_class(10)[4]
    for seed, cut in enumerate(cuts[:5]):
        _, gradient = matcher._match_class(network, 4, block, *matcher._draw(4, 0, np.random.default_rng(seed)))
        used = set(origins(2, 2, "single")[cut].tolist())
        assert {slot for slot in range(2) if gradient[slot].abs().sum() > 0} == used

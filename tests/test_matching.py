import json
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
from benchmarks.baseline import match_unrolled, unfused
from tests.recipe import fill_parameters, wave_images
from utils.augment import DSA
from utils.errors import UserError
from utils.matching import Step, choose_kept_steps, graph_bytes, match, plan_batches, refuse_if_broken
from utils.reparam import FlatNetwork, flatten

FACT = json.loads((Path(__file__).parent / "facts" / "matching.json").read_text())


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def plain(x):
    return x


@pytest.mark.parametrize("kept_steps,slice_size", [(0, None), (5, None), (2, None), (0, 1), (3, 2)])
def test_published_inner_loop(kept_steps, slice_size):
    shape = FACT["network"]
    network = fill_parameters(
        networks.get_network(shape["name"], shape["channel"], shape["num_classes"], shape["im_size"])
    )
    student = FlatNetwork(network)
    assert student.numel == FACT["num_params"]
    start = flatten(network.parameters())
    target = start + 0.01 * torch.sin(0.7 * torch.arange(student.numel, dtype=torch.float64))
    images = wave_images(9, 3, 16, 0.017)
    steps = [Step(torch.tensor(batch), plain) for batch in FACT["batches"]]
    loss, gradient, lr_gradient = match(
        student,
        start,
        target,
        torch.tensor(FACT["syn_lr"], dtype=torch.float64),
        images,
        torch.tensor(FACT["labels"]),
        steps,
        kept_steps=kept_steps,
        slice_size=slice_size,
    )
    assert float(loss) == pytest.approx(FACT["loss"], rel=1e-9)
    assert float(lr_gradient) == pytest.approx(FACT["grad_syn_lr"], rel=1e-9)
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx(FACT["grad_images_norm_per_image"], rel=1e-9)
    assert gradient.flatten()[:8].tolist() == pytest.approx(FACT["grad_images_first8"], rel=1e-9)


def case(batch=5, total=11, steps=7, size=16, channels=3, name="ConvNetW32"):
    """A small matching problem in float64 with DSA on and minibatches smaller than the union."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = networks.get_network(name, channels, 4, size).double()
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images = torch.randn(total, channels, size, size, dtype=torch.float64)
    labels = torch.from_numpy(rng.integers(4, size=total))
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    plan = [
        (torch.from_numpy(index), [(n, u.double()) for n, u in dsa.draw(len(index), rng)])
        for index in plan_batches(total, batch, steps, rng)
    ]
    assert len({draw[0][0] for _, draw in plan}) > 2
    made = [Step(index, lambda x, draw=draw: dsa.apply(x, draw)) for index, draw in plan]
    lr = torch.tensor(0.03, dtype=torch.float64)
    plain_network = unfused(networks.get_network(name, channels, 4, size).double())
    expected = match_unrolled(plain_network, start, target, lr, images, labels, plan, dsa.apply)
    return FlatNetwork(network), start, target, lr, images, labels, made, expected


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN", "ConvNetMP", "MLP"])
@pytest.mark.parametrize("kept_steps", [0, 3, 7])
def test_adjoint_equals_full_unrolling_with_augmentation(name, kept_steps):
    student, start, target, lr, images, labels, steps, expected = case(name=name)
    found = match(student, start, target, lr, images, labels, steps, kept_steps=kept_steps)
    for value, truth in zip(found, expected, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("slice_size", [1, 2, 4])
def test_slices_of_a_minibatch_are_exact(slice_size):
    student, start, target, lr, images, labels, steps, expected = case()
    found = match(student, start, target, lr, images, labels, steps, kept_steps=2, slice_size=slice_size)
    for value, truth in zip(found, expected, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("first_learned", [4, 9])
def test_frozen_pictures_are_seen_and_get_no_gradient(first_learned):
    student, start, target, lr, images, labels, steps, expected = case()
    loss, gradient, lr_gradient = match(student, start, target, lr, images, labels, steps, first_learned)
    assert gradient.shape == images[first_learned:].shape
    assert relative(gradient, expected[1][first_learned:]) < 1e-10
    assert relative(lr_gradient, expected[2]) < 1e-10
    other = images.clone()
    other[0] += 1
    assert not torch.equal(match(student, start, target, lr, other, labels, steps, first_learned)[0], loss)


def test_minibatches_run_through_permutations_of_the_union():
    batches = plan_batches(10, 4, 7, np.random.default_rng(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    for begin in (0, 3):
        assert sorted(np.concatenate(batches[begin : begin + 3])) == list(range(10))
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:6]))


def test_budget_is_between_none_and_all(monkeypatch):
    student, start, _, _, images, labels, steps, _ = case()
    cpu = torch.device("cpu")
    assert choose_kept_steps("auto", student, start, images, labels, steps, None, cpu) == len(steps)
    size = graph_bytes(student, start, images, labels, steps[0])
    monkeypatch.setattr("utils.matching.free_memory", lambda _: 8 * size)
    assert choose_kept_steps("auto", student, start, images, labels, steps, None, cpu) == 3
    assert choose_kept_steps("3", student, start, images, labels, steps, None, cpu) == 3
    assert choose_kept_steps("0", student, start, images, labels, steps, None, cpu) == 0


def test_broken_values_are_named():
    good, bad = torch.zeros(3), torch.tensor([0.0, float("nan")])
    refuse_if_broken(1, good, good, good)
    with pytest.raises(UserError, match="iteration 7: the loss and syn_lr became NaN"):
        refuse_if_broken(7, bad, good, bad)

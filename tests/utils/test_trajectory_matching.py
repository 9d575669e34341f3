import dataclasses
import errno
import functools
import json
import weakref

import numpy as np
import pytest
import torch

import networks
from benchmarks.baseline import match_unrolled, unfused
from networks.reparam import ReparamModule, flatten
from tests.conftest import PROJECT
from tests.support.matching import case, relative, union_and_experts
from tests.support.recipe import fill_parameters, wave_images
from utils.augment import DSA
from utils.memory import Stack
from utils.run.errors import UserError
from utils.synthetic import SyntheticSet
from utils.trajectory_matching import (
    Step,
    TrajectoryMatchConfig,
    TrajectoryMatcher,
    check_finite,
    choose_retained_graphs,
    graph_bytes,
    match,
    plan_batches,
)

FACT = json.loads((PROJECT / "tests" / "facts" / "matching.json").read_text())


def plain(x):
    return x


@pytest.mark.parametrize("retained_graphs,slice_size", [(0, None), (5, None), (2, None), (0, 1), (3, 2)])
def test_published_inner_loop(retained_graphs, slice_size):
    shape = FACT["network"]
    network = fill_parameters(
        networks.get_network(shape["name"], shape["channel"], shape["num_classes"], shape["im_size"])
    )
    student = ReparamModule(network)
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
        retained_graphs=retained_graphs,
        slice_size=slice_size,
    )
    assert float(loss) == pytest.approx(FACT["loss"], rel=1e-9)
    assert float(lr_gradient) == pytest.approx(FACT["grad_syn_lr"], rel=1e-9)
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx(FACT["grad_images_norm_per_image"], rel=1e-9)
    assert gradient.flatten()[:8].tolist() == pytest.approx(FACT["grad_images_first8"], rel=1e-9)


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN", "ConvNetMP", "MLP"])
@pytest.mark.parametrize("retained_graphs", [0, 3, 7])
def test_adjoint_equals_full_unrolling_with_augmentation(name, retained_graphs):
    student, start, target, lr, images, labels, steps, expected = case(name=name)
    found = match(student, start, target, lr, images, labels, steps, retained_graphs=retained_graphs)
    for value, truth in zip(found, expected, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("slice_size", [1, 2, 4])
def test_slices_of_a_minibatch_are_exact(slice_size):
    student, start, target, lr, images, labels, steps, expected = case()
    found = match(student, start, target, lr, images, labels, steps, retained_graphs=2, slice_size=slice_size)
    for value, truth in zip(found, expected, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("retained_graphs,most", [(0, 1), (2, 6)])
def test_one_slice_is_held_at_once(retained_graphs, most, monkeypatch):
    """Of minibatches of 4 in slices of 2, besides those of retained steps."""
    student, start, target, lr, images, labels, steps, _ = case()
    living, counts, plain = weakref.WeakSet(), [], student.gradient

    def gradient(*arguments):
        counts.append(len(living))
        found, vjp = plain(*arguments)
        if vjp:
            vjp = functools.partial(vjp)  # partial objects of its own can be told apart
            living.add(vjp)
        return found, vjp

    monkeypatch.setattr(student, "gradient", gradient)
    match(student, start, target, lr, images, labels, steps, 0, retained_graphs, slice_size=2)
    assert len(counts) > 2 * len(steps) and max(counts) < most and not living


@pytest.mark.parametrize("first_learned", [4, 9])
def test_frozen_images_are_seen_and_get_no_gradient(first_learned):
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
    assert [len(b) for b in batches] == [2, 4, 4, 2, 4, 4, 2]
    for begin in (0, 3):
        assert sorted(np.concatenate(batches[begin : begin + 3])) == list(range(10))
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:6]))


def test_the_short_minibatch_of_a_permutation_comes_first():  # SPEC 8.2
    """Tiny ImageNet, stage 1: 400 images in minibatches of 64, taken from the end of the permutation."""
    order = np.random.default_rng(3).permutation(400)
    batches = plan_batches(400, 64, 7, np.random.default_rng(3))
    assert [len(batch) for batch in batches] == [16, 64, 64, 64, 64, 64, 64]
    assert np.array_equal(batches[0], order[384:]) and np.array_equal(batches[1], order[320:384])
    assert np.array_equal(batches[6], order[:64])


def test_budget_is_between_none_and_all(monkeypatch):
    student, start, _, _, images, labels, steps, _ = case()
    union = SyntheticSet(images, labels)
    assert choose_retained_graphs("auto", student, start, union, steps) == len(steps)
    size = graph_bytes(student, start, images, labels, max(steps, key=lambda step: len(step.index)))
    monkeypatch.setattr("utils.trajectory_matching.free_memory", lambda _: 8 * size)
    assert choose_retained_graphs("auto", student, start, union, steps) == 3
    assert choose_retained_graphs("3", student, start, union, steps) == 3
    assert choose_retained_graphs("99", student, start, union, steps) == len(steps)
    assert choose_retained_graphs("0", student, start, union, steps) == 0


def test_values_that_are_not_finite_are_named():
    good, bad = torch.zeros(()), torch.tensor(float("nan"))
    images, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    check_finite(1, good, SyntheticSet(images, labels, good))
    with pytest.raises(UserError, match="iteration 7: the loss and syn_lr became NaN"):
        check_finite(7, bad, SyntheticSet(images, labels, bad))
    with pytest.raises(UserError, match="iteration 8: a synthetic image became NaN"):
        check_finite(8, good, SyntheticSet(images + np.inf, labels, good))


@pytest.mark.parametrize("room", [0, 2, 7])
def test_parameters_wait_in_a_file_or_in_memory_if_the_disk_is_full(monkeypatch, room):
    student, start, target, lr, images, labels, steps, expected = case()
    written, real = [], Stack._write

    def write(stack, tensor):
        if len(stack.memory) >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(stack, tensor)
        written.append(stack.file.tell())

    monkeypatch.setattr(Stack, "_write", write)
    for value, truth in zip(match(student, start, target, lr, images, labels, steps), expected, strict=True):
        assert relative(value, truth) < 1e-10
    assert written == [start.nbytes * (number + 1) for number in range(room)]


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
def test_bfloat16_is_near_but_not_the_same(name):
    torch.manual_seed(0)
    network = networks.get_network(name, 3, 4, 16)
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images, labels, lr = torch.randn(8, 3, 16, 16), torch.arange(8) % 4, torch.tensor(0.03)
    steps = [Step(torch.arange(8), plain)] * 4
    exact, half = (
        match(ReparamModule(network, precision=precision), start, target, lr, images, labels, steps)
        for precision in ("fp32", "bf16")
    )
    for value, truth in zip(half, exact, strict=True):
        assert value.dtype == torch.float32
        assert not torch.equal(value, truth)
    assert float(half[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    assert float(torch.cosine_similarity(half[1].flatten(), exact[1].flatten(), 0)) > 0.95


def test_one_iteration_in_three_lines_without_files():
    student, experts, union = union_and_experts()
    config = TrajectoryMatchConfig(batch_syn=3, syn_steps=4, expert_epochs=1, max_start_epoch=3)
    matcher = TrajectoryMatcher(student, experts, union, config)
    loss = matcher.backward(0)

    start, target, steps = matcher.plan(0)
    plan = [(step.index, None) for step in steps]
    truth = match_unrolled(student.network, start, target, union.syn_lr, union.images, union.labels, plan)
    for value, expected in zip(
        (loss, union.learned.grad, union.syn_lr.grad), (truth[0], truth[1][4:], truth[2]), strict=True
    ):
        assert relative(value, expected) < 1e-10
    assert union.images.grad is None


def test_one_iteration_averages_several_trajectories():
    student, experts, union = union_and_experts(experts=3)
    config = TrajectoryMatchConfig(batch_syn=3, syn_steps=4, expert_epochs=1, max_start_epoch=3)
    alone = TrajectoryMatcher(student, experts, union, config)
    found = []
    for number in (2, 3):
        found.append((alone.backward(number), union.learned.grad, union.syn_lr.grad))
    together = TrajectoryMatcher(student, experts, union, dataclasses.replace(config, trajectories=2))
    loss = together.backward(1)
    for value, *parts in zip((loss, union.learned.grad, union.syn_lr.grad), *found, strict=True):
        assert relative(value, sum(parts) / 2) < 1e-12


def test_one_pass_takes_every_expert_once_and_epochs_stay_in_their_range():
    student, experts, union = union_and_experts(experts=3, entries=9)
    config = TrajectoryMatchConfig(batch_syn=3, syn_steps=1, expert_epochs=2, max_start_epoch=4, first_start_epoch=3)
    matcher = TrajectoryMatcher(student, experts, union, config, seed=5, stage=2)
    seen, epochs = [], set()
    for number in range(60):
        start, target, _ = matcher.plan(number)
        ((expert, epoch),) = [
            (k, e)
            for k, entries in enumerate(experts.trajectories)
            for e, entry in enumerate(entries)
            if entry is start
        ]
        assert target is experts.trajectories[expert][epoch + 2]
        seen.append(expert)
        epochs.add(epoch)
    assert all(sorted(seen[i : i + 3]) == [0, 1, 2] for i in range(0, 60, 3))
    assert len({tuple(seen[i : i + 3]) for i in range(0, 60, 3)}) > 1  # another order in another pass
    assert epochs == {3, 4, 5, 6}


def unrolled_with_labels(network, start, target, lr, images, labels, steps):
    """Plain unrolling with soft labels; returns (loss, gradients of images, learning rate and labels)."""
    student = ReparamModule(unfused(network))
    images, lr, labels = (value.clone().requires_grad_() for value in (images, lr, labels))
    theta = start.clone().requires_grad_()
    for step in steps:
        x = step.augment(images[step.index])
        y = labels[step.index].repeat(len(x) // len(step.index), 1)
        value = -(y * student(theta, x).log_softmax(1)).sum() / len(x)
        theta = theta - lr * torch.autograd.grad(value, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start - target).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [images, lr, labels])


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
@pytest.mark.parametrize(
    "retained_graphs,slice_size,first_learned", [(0, None, 0), (3, None, 4), (7, 2, 9), (0, 1, 4), (2, 4, 0)]
)
def test_gradients_of_soft_labels_equal_full_unrolling(name, retained_graphs, slice_size, first_learned):
    if name == "ConvNetBN":
        slice_size = None  # statistics of a minibatch are not those of its slices
    student, start, target, lr, images, labels, steps, _ = case(name=name)
    soft = torch.rand(len(labels), 4, dtype=torch.float64).softmax(1)
    plain = networks.get_network(name, 3, 4, 16).double()
    expected = unrolled_with_labels(plain, start, target, lr, images, soft, steps)
    found = match(student, start, target, lr, images, soft, steps, first_learned, retained_graphs, slice_size)
    learned = [expected[0], expected[1][first_learned:], expected[2], expected[3][first_learned:]]
    assert len(found) == 4 and float(expected[3].abs().max()) > 1e-6
    for value, truth in zip(found, learned, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
def test_one_hot_labels_give_what_classes_do(name):
    student, start, target, lr, images, labels, steps, _ = case(name=name)
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    *found, _ = match(student, start, target, lr, images, one_hot, steps, 4)
    for value, truth in zip(found, match(student, start, target, lr, images, labels, steps, 4), strict=True):
        assert relative(value, truth) < 1e-12


def test_one_iteration_fills_the_gradient_of_the_newest_labels():
    student, experts, hard = union_and_experts()
    soft = torch.rand(8, 4, dtype=torch.float64).softmax(1)
    union = SyntheticSet(hard.images, hard.labels, hard.syn_lr, hard.counts, soft)
    config = TrajectoryMatchConfig(batch_syn=3, syn_steps=4, expert_epochs=1, max_start_epoch=3, trajectories=2)
    matcher = TrajectoryMatcher(student, experts, union, config)
    matcher.backward(1)
    found = [
        unrolled_with_labels(student.network, start, target, union.syn_lr, union.images, soft, steps)
        for start, target, steps in (matcher.plan(number) for number in (2, 3))
    ]
    for value, parts in (
        (union.learned.grad, [f[1][4:] for f in found]),
        (union.syn_lr.grad, [f[2] for f in found]),
        (union.learned_soft.grad, [f[3][4:] for f in found]),
    ):
        assert relative(value, sum(parts) / 2) < 1e-10


def test_the_window_of_start_epochs_grows_linearly():
    student, experts, union = union_and_experts(experts=1, entries=9)
    config = TrajectoryMatchConfig(3, 1, 1, max_start_epoch=5, first_start_epoch=2, trajectories=2)
    growing = TrajectoryMatcher(student, experts, union, dataclasses.replace(config, grow_iterations=8))
    whole, seen = TrajectoryMatcher(student, experts, union, config), {}
    ends = [2, 2, 3, 3, 4, 4, 5, 5]  # the window has 1 + 4 · iteration / 8 epochs
    for seed in range(200):
        growing.seed = whole.seed = seed
        for iteration, last in enumerate(ends):
            start, _, _ = growing.plan(2 * iteration + seed % 2)
            epoch = next(e for e, entry in enumerate(experts.trajectories[0]) if entry is start)
            assert 2 <= epoch <= last
            seen[iteration] = max(seen.get(iteration, 0), epoch)
        assert growing.plan(16)[0] is whole.plan(16)[0]
    assert [seen[iteration] for iteration in range(8)] == ends


def test_windows_of_canvases_are_the_same_on_both_ways_through():
    student, experts, union = union_and_experts()
    canvases = SyntheticSet(torch.randn(8, 1, 16, 16, dtype=torch.float64), union.labels, union.syn_lr, union.counts)
    config = TrajectoryMatchConfig(3, 4, 1, 3, dsa=DSA("flip_crop"), window=8, samples=2, retained_graphs=0)
    matcher = TrajectoryMatcher(student, experts, canvases, config)
    loss = matcher.backward(0)
    found = canvases.learned.grad
    start, target, steps = matcher.plan(0)
    assert [len(step.augment(canvases.images[step.index])) for step in steps] == [4, 6, 6, 4]
    images = canvases.images.clone().requires_grad_()
    theta = start.clone().requires_grad_()
    for step in steps:
        x = step.augment(images[step.index])
        value = torch.nn.functional.cross_entropy(student(theta, x), canvases.labels[step.rows(len(x))])
        theta = theta - canvases.syn_lr * torch.autograd.grad(value, theta, create_graph=True)[0]
    truth = (theta - target).square().sum() / (start - target).square().sum()
    assert relative(loss, truth.detach()) < 1e-10
    assert relative(found, torch.autograd.grad(truth, images)[0][4:]) < 1e-10

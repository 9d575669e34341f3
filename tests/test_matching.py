import errno
import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
from benchmarks.baseline import match_unrolled, unfused
from tests.recipe import fill_parameters, wave_images
from utils.augment import DSA
from utils.errors import UserError
from utils.matching import Step, _Stack, choose_kept_steps, graph_bytes, match, plan_batches, refuse_if_broken
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


def test_parameters_wait_in_a_file(monkeypatch):
    student, start, target, lr, images, labels, steps, expected = case()
    written = []
    real = _Stack._write

    def write(stack, tensor):
        real(stack, tensor)
        written.append(stack.file.tell())

    monkeypatch.setattr(_Stack, "_write", write)
    found = match(student, start, target, lr, images, labels, steps, kept_steps=2)
    assert written and written == [start.nbytes * (number + 1) for number in range(len(steps) - 2)]
    for value, truth in zip(found, expected, strict=True):
        assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("room", [0, 2])
def test_parameters_stay_in_memory_where_the_disk_is_full(monkeypatch, room):
    student, start, target, lr, images, labels, steps, expected = case()
    real = _Stack._write

    def write(stack, tensor):
        if stack.count >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(stack, tensor)

    monkeypatch.setattr(_Stack, "_write", write)
    for value, truth in zip(match(student, start, target, lr, images, labels, steps), expected, strict=True):
        assert relative(value, truth) < 1e-10


def test_a_write_that_the_disk_takes_in_part_is_not_trusted(tmp_path, monkeypatch):
    """A file-size limit lets the last write end half-way, which raises nothing by itself."""
    start = torch.arange(6.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stack = _Stack(start)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.nbytes * 5 // 2, hard))
        for number in range(5):
            stack.push(start + number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(stack.memory) == [2, 3, 4]
    for number in reversed(range(5)):
        assert torch.equal(stack.pop(), start + number)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN"])
def test_bfloat16_is_near_but_not_the_same(name):
    torch.manual_seed(0)
    network = networks.get_network(name, 3, 4, 16)
    start = flatten(network.parameters())
    target = start + 0.01 * torch.randn_like(start)
    images, labels, lr = torch.randn(8, 3, 16, 16), torch.arange(8) % 4, torch.tensor(0.03)
    steps = [Step(torch.arange(8), plain)] * 4
    exact, half = (
        match(FlatNetwork(network, bf16=bf16), start, target, lr, images, labels, steps) for bf16 in (False, True)
    )
    for value, truth in zip(half, exact, strict=True):
        assert value.dtype == torch.float32
        assert not torch.equal(value, truth)
    assert float(half[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    assert float(torch.cosine_similarity(half[1].flatten(), exact[1].flatten(), 0)) > 0.95

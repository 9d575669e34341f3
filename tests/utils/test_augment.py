import numpy as np
import pytest
import torch

from tests.support.oracles import augment_one
from utils.augment import DSA, OPERATIONS, random_windows


def normal_images(count, size, channels=3):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(count, channels, size, size)))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("flavour", ["mtt", "idc"])
@pytest.mark.parametrize("size", [8, 9, 32])
def test_batched_equals_the_definition_image_by_image(name, flavour, size):
    x = normal_images(12, size)
    dsa = DSA(name, flavour)
    draw = dsa.draw(12, np.random.default_rng(2))
    expected = torch.stack([augment_one(x[i], name, draw[0][1][i], flavour == "mtt") for i in range(12)])
    torch.testing.assert_close(dsa.apply(x, draw), expected, rtol=0, atol=2e-7)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_extreme_draws_stay_inside(name):
    x = normal_images(2, 8)
    for value in (0.0, 1 - 2**-24):
        u = torch.full((2, 3), value)
        expected = torch.stack([augment_one(x[i], name, u[i], True) for i in range(2)])
        torch.testing.assert_close(DSA(name).apply(x, [(name, u)]), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_is_exact(name):
    x = normal_images(2, 8, 2).requires_grad_()
    dsa = DSA(name)
    draw = [(name, u.double()) for name, u in dsa.draw(2, np.random.default_rng(3))]
    torch.autograd.gradcheck(lambda images: dsa.apply(images, draw), (x,))


def test_mtt_draws_one_entry_and_idc_the_fixed_ones():
    mtt, idc = DSA("color_crop_cutout_flip_scale_rotate"), DSA("color_crop_cutout_flip_scale_rotate", "idc")
    rng = np.random.default_rng(0)
    drawn = {name for _ in range(200) for name, _ in mtt.draw(4, rng)}
    assert drawn == set(OPERATIONS)
    assert all(len(mtt.draw(4, rng)) == 1 for _ in range(20))
    names = [[name for name, _ in idc.draw(4, rng)] for _ in range(200)]
    assert all(len(n) == 4 and n[:2] == ["flip", "color"] and n[3] == "cutout" for n in names)
    assert {n[2] for n in names} == {"crop", "scale", "rotate"}
    assert DSA("none").draw(4, rng) == []


def test_one_draw_for_a_whole_batch():
    x = normal_images(1, 8).expand(5, -1, -1, -1)
    dsa = DSA("color_crop_cutout_flip_scale_rotate", "idc")
    y = dsa.apply(x, dsa.draw(1, np.random.default_rng(4)))
    assert all(torch.equal(y[0], y[i]) for i in range(1, 5))


def test_unknown_entries_are_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'blur'"):
        DSA("color_blur")


def test_windows_wrap_around():
    canvas = torch.arange(36.0).view(1, 1, 6, 6).expand(2, -1, -1, -1)
    rng = np.random.default_rng(5)
    windows = random_windows(canvas, rng, 3, 4)
    rng = np.random.default_rng(5)
    top, left = rng.integers(6, size=8), rng.integers(6, size=8)
    for i in range(8):
        rolled = canvas[i % 2].roll((-int(top[i]), -int(left[i])), (1, 2))
        assert torch.equal(windows[i], rolled[:, :3, :3])

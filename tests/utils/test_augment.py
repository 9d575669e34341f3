import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from tests.support.oracles import augment_one, dc_augment_one
from utils import augment
from utils.augment import (
    DSA,
    OPERATIONS,
    DCAugment,
    color_jitter,
    imagenet_augment,
    random_resized_crop,
    random_windows,
)


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
    strategy = "color_crop_cutout_flip_scale_rotate_translate"
    mtt, idc = DSA(strategy), DSA(strategy, "idc")
    rng = np.random.default_rng(0)
    drawn = {name for _ in range(200) for name, _ in mtt.draw(4, rng)}
    assert drawn == set(OPERATIONS)
    assert all(len(mtt.draw(4, rng)) == 1 for _ in range(20))
    names = [[name for name, _ in idc.draw(4, rng)] for _ in range(200)]
    assert all(len(n) == 4 and n[:2] == ["flip", "color"] and n[3] == "cutout" for n in names)
    assert {n[2] for n in names} == {"crop", "scale", "rotate", "translate"}  # SPEC 8.18
    assert DSA("none").draw(4, rng) == []


def test_one_draw_for_a_whole_batch():
    x = normal_images(1, 8).expand(5, -1, -1, -1)
    dsa = DSA("color_crop_cutout_flip_scale_rotate", "idc")
    y = dsa.apply(x, dsa.draw(1, np.random.default_rng(4)))
    assert all(torch.equal(y[0], y[i]) for i in range(1, 5))


def test_unknown_entries_are_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'blur'"):
        DSA("color_blur")


# DC's augmentation --------------------------------------------------------------------------------------------------


def waves(count, size):
    """Smooth images, on which interpolations of all kinds agree."""
    grid = torch.linspace(0, 3, size, dtype=torch.float64)
    phases = torch.arange(count * 3, dtype=torch.float64).view(count, 3, 1, 1)
    return torch.sin(grid[:, None] + phases) + torch.cos(0.7 * grid[None, :] + 2 * phases)


@pytest.mark.parametrize("kind,tolerance", [("crop", 1e-6), ("scale", 0.26), ("rotate", 0.1)])
def test_dc_augments_as_its_authors_do(kind, tolerance):  # SPEC 8.4
    """Scaling agrees to a pixel and a half, rotation to a half: they cut out of images of odd and even sizes."""
    x = waves(20, 32)
    u = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    u[:, 0] = {"crop": 0.1, "scale": 0.5, "rotate": 0.9}[kind]
    expected = torch.stack([dc_augment_one(x[i], u[i], x.mean((0, 2, 3))) for i in range(20)])
    found = DCAugment().apply(x, u)
    near = slice(None) if kind == "crop" else slice(9, 23)  # away from what comes in at the border
    torch.testing.assert_close(found[:, :, near, near], expected[:, :, near, near], rtol=0, atol=tolerance)
    assert float((expected - x)[:, :, near, near].abs().amax((1, 2, 3)).max()) > 1.1 * tolerance


def test_dc_draws_one_of_three_for_each_image():  # SPEC 8.4
    dc = DCAugment()
    x = waves(300, 16)
    u = dc.draw(300, np.random.default_rng(0))
    expected = torch.stack([dc_augment_one(x[i], u[i], x.mean((0, 2, 3))) for i in range(300)])
    cropped = u[:, 0] < 1 / 3
    assert 70 < int(cropped.sum()) < 130 and 70 < int((u[:, 0] > 2 / 3).sum()) < 130
    torch.testing.assert_close(dc.apply(x, u)[cropped], expected[cropped], rtol=0, atol=1e-6)


# ImageNet's augmentation ----------------------------------------------------------------------------------------------


def test_random_resized_crops_have_the_published_areas_and_shapes():  # SPEC 8.10
    """Of an image whose pixels say where they are, a crop of w × h of the whole shows that range of places."""
    size, count = 64, 4000
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    image = torch.stack([places.expand(size, size), places[:, None].expand(size, size)])
    found = random_resized_crop(image.expand(count, -1, -1, -1), np.random.default_rng(0))
    inner = found[:, :, size // 4, size // 4], found[:, :, 3 * size // 4, 3 * size // 4]  # half of the crop apart
    width, height = (2 * (inner[1] - inner[0])).T
    area, ratio = width * height, width / height
    assert 0.499 < area.min() < 0.51 and 0.98 < area.max() < 1.001
    assert 0.749 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.334
    assert abs(float((ratio.log() > 0).double().mean()) - 0.5) < 0.04  # 5 standard deviations
    centre = (inner[0] + inner[1]).T / 2
    for side, middle in zip((width, height), centre, strict=True):
        assert (middle - side / 2 > -0.01).all() and (middle + side / 2 < 1.01).all()
        assert middle.std() > 0.02


def test_colours_jitter_in_random_order():  # SPEC 8.10
    """Against torchvision's own functions, with factors of 0.6 to 1.4."""
    x = torch.rand(30, 3, 6, 6, dtype=torch.float64)
    found = color_jitter(x, np.random.default_rng(4))
    rng = np.random.default_rng(4)
    factors = rng.uniform(0.6, 1.4, (3, 30))
    orders = rng.permuted(np.tile(np.arange(3), (30, 1)), axis=1)
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for i in range(30):
        expected = x[i]
        for step in orders[i]:
            expected = steps[step](expected, float(factors[step, i]))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)
    assert len(set(map(tuple, orders.tolist()))) == 6


def test_lighting_moves_along_the_colours_of_imagenet(monkeypatch):  # SPEC 8.10
    monkeypatch.setattr(augment, "color_jitter", lambda x, _: x)
    x = torch.full((4000, 3, 2, 2), 0.5, dtype=torch.float64)
    shift = imagenet_augment(x, np.random.default_rng(0), crop=False) - x
    assert torch.equal(shift, shift[:, :, :1, :1].expand_as(shift))
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    alpha = shift[:, :, 0, 0] @ torch.linalg.inv(vectors.double()).T / torch.tensor([0.2175, 0.0188, 0.0045])
    assert alpha.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.06)  # 5 standard deviations
    assert alpha.mean(0).abs().max() < 0.008
    correlation = torch.corrcoef(alpha.T) - torch.eye(3)
    assert correlation.abs().max() < 0.08


def test_half_of_the_images_are_flipped_and_only_rrc_crops(monkeypatch):  # SPEC 8.10
    monkeypatch.setattr(augment, "color_jitter", lambda x, _: x)
    monkeypatch.setattr(augment, "LIGHTING_STD", 0.0)
    x = torch.rand(400, 3, 5, 5)
    found = imagenet_augment(x, np.random.default_rng(0), crop=False)
    flipped = (found == x.flip(3)).all(dim=(1, 2, 3))
    assert 150 < int(flipped.sum()) < 250 and torch.equal(found[~flipped], x[~flipped])
    cropped = imagenet_augment(x, np.random.default_rng(0), crop=True)
    same = (cropped == x).all(dim=(1, 2, 3)) | (cropped == x.flip(3)).all(dim=(1, 2, 3))
    assert int(same.sum()) == 0


def test_grey_images_have_no_colours():
    x = torch.rand(5, 1, 4, 4)
    assert imagenet_augment(x, np.random.default_rng(0)).shape == x.shape


def test_windows_wrap_around():
    canvas = torch.arange(36.0).view(1, 1, 6, 6).expand(2, 3, -1, -1)
    rng = np.random.default_rng(5)
    windows = random_windows(canvas, rng, 3, 4)
    rng = np.random.default_rng(5)
    top, left = rng.integers(6, size=8), rng.integers(6, size=8)
    for i in range(8):
        rolled = canvas[i % 2].roll((-int(top[i]), -int(left[i])), (1, 2))
        assert torch.equal(windows[i], rolled[:, :3, :3])
    assert windows.is_contiguous()  # as the written-out steps expect minibatches

import numpy as np
import pytest
import torch

from utils import datasets, formation


def enlarge(part, size):
    """Bilinear enlargement of one channel (h, w), written out: pixel centres, edges repeated."""
    h = len(part)
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = (max((k + 0.5) * h / size - 0.5, 0) for k in (i, j))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, h - 1)
            dy, dx = y - y0, x - x0
            top = part[y0, x0] * (1 - dx) + part[y0, x1] * dx
            bottom = part[y1, x0] * (1 - dx) + part[y1, x1] * dx
            out[i, j] = top * (1 - dy) + bottom * dy
    return out


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_decode_by_hand(factor, size):
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, size, size)))
    found = formation.decode(images, factor)
    assert found.shape == (2 * factor**2, 1, size, size)
    missing = -size % factor
    padded = np.pad(images[:, 0].numpy(), ((0, 0), (0, missing), (0, missing)), constant_values=0.5)
    part = (size + missing) // factor
    for row in range(factor):
        for column in range(factor):
            for n in range(2):
                crop = padded[n, row * part : (row + 1) * part, column * part : (column + 1) * part]
                place = (row * factor + column) * 2 + n
                np.testing.assert_allclose(found[place, 0].numpy(), enlarge(crop, size), atol=1e-12)


def test_a_small_example_written_out():
    image = torch.tensor([[[[0.0, 0.1], [0.2, 0.3]]]])
    found = formation.decode(image, 2)
    assert [round(float(x), 3) for x in found[:, 0, 0, 0]] == [0.0, 0.1, 0.2, 0.3]
    assert all(len(set(picture.flatten().tolist())) == 1 for picture in found)


def test_formations():
    images = torch.rand(5, 3, 12, 12)
    assert formation.decode_class(images, 1, "single") is not None
    assert torch.equal(formation.decode_class(images, 1, "single"), images)
    assert len(formation.decode_class(images, 3, "single")) == 45
    multi = formation.decode_class(images, 3, "multi")
    assert len(multi) == 5 * (1 + 4 + 9) and torch.equal(multi[:5], images)
    assert formation.plan(5, 3, "bound", 128) == [(0, 5, 3)]
    assert formation.plan(20, 3, "bound", 128) == [(0, 12, 3), (12, 15, 2), (15, 20, 1)]
    for count in (1, 5, 20, 50, 130):
        pieces = formation.plan(count, 3, "bound", 128)
        assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]
        assert pieces[-1][1] == count
        assert sum((last - first) * f * f for first, last, f in pieces) <= max(128, count)
        assert [f for _, _, f in pieces] == sorted((f for _, _, f in pieces), reverse=True)


def test_unions_are_decoded_class_by_class():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 4) / 10
    decoded, labels = formation.decode_union(images, 3, 2, "single")
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert decoded[8:16].mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.3] * 4)


@pytest.mark.parametrize("factor", [2, 3])
def test_new_images(factor):
    real = datasets.load("Digits", "", torch.device("cpu"))
    mixed = formation.new_images(real, 2, "mix", factor, np.random.default_rng(0))
    assert mixed.shape == (10, 2, 1, 8, 8) and mixed.min() >= 0 and mixed.max() <= 1
    plain = formation.new_images(real, 2, "random", factor, np.random.default_rng(0))
    digits = {tuple(x.flatten().tolist()) for x in real.train.images[real.train.labels == 4].float() / 255}
    assert all(tuple(x.flatten().tolist()) in digits for x in plain[4])
    noise = formation.new_images(real, 50, "noise", factor, np.random.default_rng(0))
    assert abs(float(noise.mean()) - 0.5) < 0.01 and noise.min() >= 0 and noise.max() <= 1
    indices = real.random_indices(0, 2 * factor**2, np.random.default_rng(0))
    part = torch.nn.functional.interpolate(
        real.train.images[torch.from_numpy(indices)].float() / 255,
        size=8 // factor + (1 if 8 % factor else 0), mode="bilinear", antialias=True,
    )  # fmt: skip
    size = part.shape[-1]
    torch.testing.assert_close(mixed[0, :, :, :size, :size], part[:2].clamp(0, 1))

import numpy as np
import pytest
import torch

from utils import multi_formation as formation


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
    assert all(len(set(part.flatten().tolist())) == 1 for part in found)


def test_formations():
    images = torch.rand(5, 3, 12, 12)
    assert torch.equal(formation.decode_class(images, 1, "single"), images)
    assert len(formation.decode_class(images, 3, "single")) == 45
    multi = formation.decode_class(images, 3, "multi")
    assert len(multi) == 5 * (1 + 4 + 9) and torch.equal(multi[:5], images)
    assert formation.decode_plan(5, 3, "bound", 128) == [(0, 5, 3)]
    assert formation.decode_plan(20, 3, "bound", 128) == [(0, 12, 3), (12, 15, 2), (15, 20, 1)]
    for count in (1, 5, 20, 50, 130):
        pieces = formation.decode_plan(count, 3, "bound", 128)
        assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]
        assert pieces[-1][1] == count
        assert sum((last - first) * f * f for first, last, f in pieces) <= max(128, count)
        assert [f for _, _, f in pieces] == sorted((f for _, _, f in pieces), reverse=True)


def test_unions_are_decoded_class_by_class():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 4) / 10
    decoded, labels = formation.decode_union(images.view(3, 2, 1, 4, 4), 2, "single")
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert decoded[8:16].mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.3] * 4)

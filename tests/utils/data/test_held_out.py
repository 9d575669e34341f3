"""`RealData.held_out`: training images that choose the best iteration instead of the test set."""

import numpy as np
import pytest
import torch

from tests.conftest import make_tree
from utils.data import datasets
from utils.run.errors import UserError
from utils.synthetic import init_subset


def digits():
    return datasets.load("Digits", "", torch.device("cpu"))


def rows(images):
    return {tuple(x.flatten().tolist()) for x in images.images}


def test_the_split_is_stratified_and_leaves_nothing_on_both_sides():
    real, part = digits(), digits().held_out(0.2)
    assert real.selection is real.test
    assert len(part.train) + len(part.selection) == len(real.train) == 1437
    for label in range(10):
        total = int((real.train.labels == label).sum())
        assert int((part.selection.labels == label).sum()) == round(0.2 * total)
        assert (part.train.labels[part.class_indices[label]] == label).all()
    assert sum(map(len, part.class_indices)) == len(part.train)
    # One image stands twice among the digits' training images.
    assert len(rows(part.train) & rows(part.selection)) <= len(real.train) - len(rows(real.train))
    assert torch.equal(part.test.images, real.test.images)
    held, kept = part.selection.batch(slice(0, 3))[0], real.train.batch(slice(0, 3))[0]
    assert held.dtype == kept.dtype and held.shape == kept.shape and held.min() < 0


def test_larger_shares_hold_out_the_images_of_smaller_ones():
    small, large = digits().held_out(0.1), digits().held_out(0.3)
    assert rows(small.selection) < rows(large.selection)
    assert torch.equal(small.selection.images, digits().held_out(0.1).selection.images)
    assert digits().held_out(0.0).selection is not None and len(digits().held_out(0.0).train) == 1437


@pytest.mark.parametrize("fraction", [0.001, 0.999, 1.0])
def test_shares_that_empty_a_class_are_refused(fraction):
    with pytest.raises(UserError, match=r"--val_fraction .*: expected a share that holds out some of the"):
        digits().held_out(fraction)


def test_whitened_images_are_held_out_in_the_same_space(tmp_path):
    tree = make_tree(tmp_path, ["cat", "dog", "owl"], 12, 1, size=8)
    real = datasets.load("folder", tree, torch.device("cpu"), whiten=True, res=8)
    part = real.held_out(0.25)
    assert len(part.train) == 27 and len(part.selection) == 9
    assert rows(part.train) | rows(part.selection) == rows(real.train)
    pixels = part.info.to_pixels(part.selection.batch(slice(None))[0])
    assert pixels.min() > -0.1 and pixels.max() < 1.1


def test_starting_images_are_kept_ones():
    part = digits().held_out(0.5)
    images, labels = init_subset(part, 20, "real", np.random.default_rng(0))
    pixels = {tuple(x.flatten().tolist()) for x in (part.info.to_pixels(images) * 255).round()}
    assert pixels <= rows(part.train) and len(labels) == 200
    assert (part.train.labels[part.random_indices(3, 30, np.random.default_rng(0), "")] == 3).all()

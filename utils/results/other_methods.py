"""Distilled sets of other methods in the files that their authors publish, for comparison (evaluate_idc.py -s)."""

from pathlib import Path

import numpy as np
import torch

from ..run import files
from ..run.errors import UserError, one_line
from ..synthetic import check_shape


def load_dsa(path, info):
    """Return (images in network space, labels) of a file of DSA: {"data": [[images, labels], …]}, the last of them.

    Raises:
        UserError: it is missing, damaged, or of another data set.
    """
    found = files.load(path, "a distilled set of DSA")
    try:
        images, labels = found["data"][-1]
        images, labels = images.detach().float(), labels.detach().long()
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        raise UserError(f"{path}: expected a set of DSA ('data': [[images, labels]]), found another") from None
    return _checked(path, images, labels, info)


def load_kip(path, info):
    """Return (images in network space, labels) of a file of KIP: images (N, H, W, C) and labels (N, classes).

    Raises:
        UserError: it is missing, damaged, or of another data set.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a distilled set of KIP (.npz), found no file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        labels = torch.from_numpy(labels.argmax(1))
    except Exception as error:  # a damaged archive surfaces as whatever its reader stumbled over
        raise UserError(f"{path}: expected images and labels of KIP, found {one_line(error)[:80]}") from None
    return _checked(path, images, labels, info)


def _checked(path, images, labels, info):
    check_shape(path, images, info)
    counts = torch.bincount(labels, minlength=info.num_classes)
    if len(labels) != len(images) or len(counts) > info.num_classes or int(counts.min()) != int(counts.max()):
        raise UserError(
            f"{path}: expected {info.num_classes} classes of equal size, found {one_line(counts.tolist())[:80]} images"
        )
    return images, labels


LOADERS = {"dsa": load_dsa, "kip": load_kip}

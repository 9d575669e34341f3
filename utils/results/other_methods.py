"""Distilled sets of other methods in the files that their authors publish, for comparison (evaluate_idc.py -s)."""

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
        images, labels = (tensor.detach() for tensor in found["data"][-1])
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        raise UserError(f"{path}: expected a set of DSA ('data': [[images, labels]]), found another") from None
    return _checked(path, images.float(), labels.long(), info)


def load_kip(path, info):
    """Return the same of a file of KIP: images (N, H, W, C) and labels (N, classes)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"].transpose(0, 3, 1, 2), arrays["labels"].argmax(1)
    except Exception as error:  # a damaged archive surfaces as whatever its reader stumbled over
        raise UserError(f"{path}: expected a set of KIP (.npz), found {one_line(error)[:80]}") from None
    return _checked(path, torch.from_numpy(np.ascontiguousarray(images)).float(), torch.from_numpy(labels), info)


def _checked(path, images, labels, info):
    check_shape(path, images, info)
    counts = torch.bincount(labels, minlength=info.num_classes)
    if len(labels) != len(images) or len(counts) > info.num_classes or int(counts.min()) != int(counts.max()):
        raise UserError(
            f"{path}: expected {info.num_classes} classes of equal size, found {one_line(counts.tolist())[:80]} images"
        )
    return images, labels


LOADERS = {"dsa": load_dsa, "kip": load_kip}

"""Synthetic sets: the union of the stages so far, of which only the newest subset is learned; their files."""

from pathlib import Path

import numpy as np
import torch

from utils import files
from utils.errors import UserError
from utils.runtime import stream


class SyntheticSet:
    """The union S_1 ∪ … ∪ S_p of one stage.

    Attributes:
        images: (N, C, H, W) float32 in network space, stage after stage; H, W are canvases in texture mode.
        labels: (N,) int64.
        syn_lr: 0-dim float32, the synthetic learning rate.
        first_learned: pictures before this position are frozen.
    """

    def __init__(self, images, labels, syn_lr, first_learned=0):
        self.images, self.labels = images, labels
        self.syn_lr = syn_lr
        self.first_learned = first_learned

    def __len__(self):
        return len(self.labels)

    @property
    def learned(self):
        """The subset that this stage learns: a view of the last pictures."""
        return self.images[self.first_learned :]

    def extend(self, subset, labels, syn_lr):
        """Return the next stage's set: this one frozen, `subset` (n, C, H, W) with `labels` (n,) to be learned."""
        return SyntheticSet(
            torch.cat([self.images, subset]), torch.cat([self.labels, labels]), syn_lr, first_learned=len(self)
        )


def empty_set(real, canvas=1):
    """Return the union before the first stage: no pictures of `canvas` times the size of those of `real`."""
    device = real.train.images.device
    size = real.im_size * canvas
    return SyntheticSet(
        torch.zeros(0, real.channel, size, size, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros((), device=device),
    )


def new_subset(real, ipc, init, seed, stage, canvas=1):
    """Draw the pictures that a stage starts from.

    Args:
        real: `RealData`.
        ipc: pictures of each class.
        init: `real` takes random real pictures of the class, `noise` draws from N(0, 1).
        seed, stage: of the random stream.
        canvas: pictures on each side of one canvas (texture mode), 1 without.

    Returns:
        (images (num_classes * ipc, C, H, W) in network space, labels), class after class.

    Raises:
        UserError: a class has fewer real pictures than needed.
    """
    rng = stream(seed, "subset", stage)
    device = real.train.images.device
    labels = torch.arange(real.num_classes, device=device).repeat_interleave(ipc)
    if init == "noise":
        size = real.im_size * canvas
        shape = (len(labels), real.channel, size, size)
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device), labels
    index = np.concatenate([real.random_indices(c, ipc * canvas**2, rng) for c in range(real.num_classes)])
    tiles = real.train.batch(torch.from_numpy(index).to(device))[0]
    tiles = tiles.view(len(labels), canvas, canvas, real.channel, real.im_size, real.im_size)
    images = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(labels), real.channel, *[real.im_size * canvas] * 2)
    return images.contiguous(), labels


def save_set(folder, tag, synthetic):
    """Write images_{tag}.pt, labels_{tag}.pt and syn_lr_{tag}.pt into `folder`."""
    folder = Path(folder)
    files.save(folder / f"images_{tag}.pt", synthetic.images.detach().cpu())
    files.save(folder / f"labels_{tag}.pt", synthetic.labels.detach().cpu())
    files.save(folder / f"syn_lr_{tag}.pt", synthetic.syn_lr.detach().cpu())


def load_set(folder, tag="best", device="cpu"):
    """Read the union of one stage from `folder`.

    Returns:
        `SyntheticSet` with nothing to learn (first_learned is its length).

    Raises:
        UserError: a file is missing, damaged, of a wrong shape or type, or holds NaN.
    """
    folder = Path(folder)
    images = _tensor(folder / f"images_{tag}.pt", "pictures (N, C, H, W)", 4)
    labels = _tensor(folder / f"labels_{tag}.pt", "labels (N,)", 1)
    syn_lr = _tensor(folder / f"syn_lr_{tag}.pt", "one number", 0)
    if labels.dtype.is_floating_point or len(labels) != len(images) or not len(labels) or labels.min() < 0:
        raise UserError(
            f"{folder / f'labels_{tag}.pt'}: expected {len(images)} integer labels >= 0, found {len(labels)} of "
            f"{labels.dtype}; the files do not belong together"
        )
    if images.shape[2] != images.shape[3]:
        raise UserError(f"{folder / f'images_{tag}.pt'}: expected square pictures, found {tuple(images.shape)}")
    if not float(syn_lr) > 0:
        raise UserError(f"{folder / f'syn_lr_{tag}.pt'}: expected a learning rate > 0, found {float(syn_lr)}")
    return SyntheticSet(images.float().to(device), labels.long().to(device), syn_lr.float().to(device), len(labels))


def _tensor(path, what, dimensions):
    value = files.load(path, what)
    if isinstance(value, (int, float)) and dimensions == 0:
        value = torch.tensor(value)
    if dimensions == 0 and isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.reshape(())
    if not isinstance(value, torch.Tensor) or value.dim() != dimensions:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"{path}: expected {what}, found {found}; make it anew")
    value = value.detach()
    if value.dtype.is_floating_point and not bool(value.isfinite().all()):
        raise UserError(f"{path}: expected finite numbers, found NaN or infinity; make it anew")
    return value


def check_set(folder, synthetic, real, canvas=1):
    """Compare a loaded union with the data set it is used with.

    Raises:
        UserError: pictures of another size, or labels of other classes.
    """
    expected = (real.channel, real.im_size * canvas, real.im_size * canvas)
    found = tuple(synthetic.images.shape[1:])
    if found != expected:
        raise UserError(
            f"{folder}: expected pictures {'x'.join(map(str, expected))} for {real.name}, found "
            f"{'x'.join(map(str, found))}; name the right --dataset"
        )
    present = int(synthetic.labels.max()) + 1
    if present > real.num_classes:
        raise UserError(
            f"{folder}: expected labels below {real.num_classes} for {real.name}, found {present - 1}; name the "
            "right --dataset"
        )

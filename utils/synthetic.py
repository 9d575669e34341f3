"""Synthetic sets: the union of the stages so far, of which only the newest subset is learned, and its files.

In memory a union is the same for every base method: stage after stage, in a stage class after class. On disk it has
the layouts of the published code: `images_*.pt`, `labels_*.pt`, `syn_lr_*.pt` (PDD+MTT), `interval_{i}_data.pt`
(PDD+IDC), which is sorted by class, then by position in a stage, then by stage: class 0 begins with the images at
position 0 of stages 1, 2, …, then come those at position 1.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .data.datasets import ImageDataset
from .run import files
from .run.errors import UserError


class SyntheticSet:
    """The union S_1 ∪ … ∪ S_p.

    Args:
        images: (N, C, H, W) float32, stage after stage: in network space (PDD+MTT; H and W of canvases in texture
            mode) or pixels in [0, 1] (PDD+IDC).
        labels: (N,) int64.
        syn_lr: 0-dim float32, the synthetic learning rate; None for methods that learn none.
        counts: images of each stage; None for one frozen block.
        soft: (N, K) float32, soft labels: probabilities of the classes; None for hard ones.
    """

    def __init__(self, images, labels, syn_lr=None, counts=None, soft=None):
        self.images, self.labels, self.syn_lr, self.soft = images, labels, syn_lr, soft
        self.counts = [len(labels)] if counts is None else counts
        self.learned = images[self.first_learned :]  # the newest subset: a view
        self.learned_soft = None if soft is None else soft[self.first_learned :]

    def __len__(self):
        return len(self.labels)

    @property
    def first_learned(self):
        """Images before this position belong to earlier stages and are frozen."""
        return sum(self.counts[:-1])

    @property
    def parameters(self):
        """What a stage moves: the newest images, syn_lr, and the newest soft labels if there are any."""
        return [self.learned, self.syn_lr, *([] if self.soft is None else [self.learned_soft])]

    @property
    def targets(self):
        """What networks are trained towards: the soft labels, else the classes."""
        return self.labels if self.soft is None else self.soft

    @property
    def stage(self):
        """The stage (from 1) that learned each image, (N,) int64."""
        return torch.arange(1, len(self.counts) + 1).repeat_interleave(torch.tensor(self.counts))

    def extended(self, subset, labels, syn_lr=None, soft=None):
        """Return the next stage's set: this one frozen, `subset` (n, C, H, W) with `labels` (n,) to be learned.

        Args:
            soft: (n, K) soft labels of the subset, if the frozen ones have such, too (hard ones become one-hot).
        """
        counts = [*self.counts, len(labels)] if len(self) else [len(labels)]
        if soft is not None:
            frozen = F.one_hot(self.labels, soft.shape[1]).to(soft) if self.soft is None else self.soft
            soft = torch.cat([frozen, soft])
        return SyntheticSet(torch.cat([self.images, subset]), torch.cat([self.labels, labels]), syn_lr, counts, soft)

    def copy(self):
        """Return a set with images of its own; all else is shared."""
        return SyntheticSet(self.images.clone(), self.labels, self.syn_lr, self.counts, self.soft)

    def hard(self):
        """Return the set without its soft labels."""
        return SyntheticSet(self.images, self.labels, self.syn_lr, self.counts)

    def union(self, stages):
        """Return the union of the first `stages` stages."""
        end = sum(self.counts[:stages])
        soft = None if self.soft is None else self.soft[:end]
        return SyntheticSet(self.images[:end], self.labels[:end], self.syn_lr, self.counts[:stages], soft)

    def clamped(self):
        """Return the set with pixels in [0, 1]."""
        return SyntheticSet(self.images.clamp(0, 1), self.labels, self.syn_lr, self.counts)

    def subset(self, stage):
        """Return the images that `stage` (from 1) learned, as a set of their own."""
        begin, end = sum(self.counts[: stage - 1]), sum(self.counts[:stage])
        return SyntheticSet(self.images[begin:end], self.labels[begin:end], self.syn_lr)

    def by_class(self, num_classes):
        """Return the images as (num_classes, n, C, H, W): for each class position after position, stage by stage.

        Every class has as many images in every stage.
        """
        grid = self.images.view(len(self.counts), num_classes, -1, *self.images.shape[1:])
        return grid.permute(1, 2, 0, 3, 4, 5).flatten(1, 2)

    def dataset(self):
        """Return the images and targets to train on."""
        return ImageDataset(self.images.detach(), self.targets)


def empty_set(real, canvas=1):
    """Return the union before the first stage: no images, of `canvas` times the size of those of `real`."""
    device = real.train.images.device
    size = real.info.im_size * canvas
    return SyntheticSet(
        torch.zeros(0, real.info.channel, size, size, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    )


def init_subset(real, ipc, init, rng, canvas=1, factor=1, pixels=False):
    """Draw the images that a stage starts from.

    Args:
        real: `RealData`.
        ipc: images of each class.
        init: `real` (`random`) takes random real images, `mix` packs factor × factor shrunk ones into each image
            (IDC), `noise` draws from N(0, 1), for pixels clamp(N(0, 1) / 4 + 1/2).
        rng: numpy.random.Generator.
        canvas: images on each side of a canvas (texture mode); 1 without.
        factor: of IDC's multi-formation.
        pixels: return pixels in [0, 1] (IDC) instead of network space (MTT).

    Returns:
        (images (num_classes · ipc, C, H, W), labels), class after class, on the device of `real`.

    Raises:
        UserError: a class has fewer real images than needed.
    """
    info, device = real.info, real.train.images.device
    labels = torch.arange(info.num_classes, device=device).repeat_interleave(ipc)
    if init == "noise":
        size = info.im_size * canvas
        noise = torch.from_numpy(rng.standard_normal((len(labels), info.channel, size, size), dtype=np.float32))
        return (noise / 4 + 0.5).clamp(0, 1).to(device) if pixels else noise.to(device), labels
    tiles = factor if init == "mix" else canvas
    most = real.smallest_class // tiles**2
    fewer = f"lower --ipc to {most} at most" if most else "lower --factor (PDD+MTT: --canvas_size)"
    advice = f"{fewer}, or begin with noise (PDD+MTT: --pix_init noise, PDD+IDC: --init noise)"
    index = np.stack([real.random_indices(c, ipc * tiles**2, rng, advice) for c in range(info.num_classes)])
    if init == "mix":  # position after position of the grid
        index = index.reshape(info.num_classes, tiles**2, ipc).transpose(0, 2, 1)
    index = torch.from_numpy(np.ascontiguousarray(index)).flatten().to(device)
    images = real.train.images[index].float().div_(255) if pixels else real.train.batch(index)[0]
    images = images.view(len(labels), tiles, tiles, info.channel, info.im_size, info.im_size)
    if init == "mix" and tiles > 1:
        return _shrunk_grids(images), labels
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous(), labels


def _shrunk_grids(images):
    """Return grids (N, C, H, H) of the images (N, f, f, C, H, H), each shrunk by taking every f-th pixel."""
    count, tiles, _, channel, size, _ = images.shape
    grids = torch.empty(count, channel, size, size, device=images.device)
    # If the grid does not divide the size, the first rows and columns are one pixel larger.
    edges = np.cumsum([0] + [size // tiles + (cell < size % tiles) for cell in range(tiles)]).tolist()
    for row in range(tiles):
        for column in range(tiles):
            (top, bottom), (left, right) = edges[row : row + 2], edges[column : column + 2]
            cell = F.interpolate(images[:, row, column], (bottom - top, right - left))  # nearest, as published
            grids[:, :, top:bottom, left:right] = cell
    return grids.clamp_(0, 1)


# PDD+MTT's files ------------------------------------------------------------------------------------------------------

PARTS = {  # what a file holds, and how many axes that has
    "images": ("images (N, C, H, W)", (4,)),
    "labels": ("labels (N,) or soft labels (N, K)", (1, 2)),
    "classes": ("labels (N,)", (1,)),
    "syn_lr": ("one number", (0,)),
}


def save_mtt(folder, tag, synthetic):
    """Write images_{tag}.pt, labels_{tag}.pt and syn_lr_{tag}.pt into `folder`, and classes_{tag}.pt of soft labels."""
    parts = {"images": synthetic.images, "labels": synthetic.targets, "syn_lr": synthetic.syn_lr}
    if synthetic.soft is not None:
        parts["classes"] = synthetic.labels
    for part, value in parts.items():
        files.save(Path(folder) / f"{part}_{tag}.pt", value.detach().cpu())


def load_mtt(folder, tag="best", device="cpu", info=None, canvas=1, shares=(1,)):
    """Read the union of one stage from `folder`.

    Args:
        folder: of the stage.
        tag: best, or the number of an iteration.
        device: for its tensors.
        info: `DatasetInfo` that it must fit; None for any.
        canvas: images on each side of a canvas.
        shares: images of each class in the subset of each stage, or numbers in proportion to them.

    Returns:
        `SyntheticSet`.

    Raises:
        UserError: a file is missing, damaged, of a wrong shape, type or data set, or holds NaN.
    """
    paths = {part: Path(folder) / f"{part}_{tag}.pt" for part in PARTS}
    images, labels, syn_lr = (read_mtt_part(paths[part], part) for part in ("images", "labels", "syn_lr"))
    soft, of_classes = None, paths["labels"]
    if labels.dim() == 2:
        soft, of_classes = labels, paths["classes"]
        labels = read_mtt_part(of_classes, "classes")
        _check_soft(paths["labels"], soft, len(labels), info)
    if labels.dtype.is_floating_point or len(labels) != len(images) or not len(labels) or labels.min() < 0:
        raise UserError(
            f"{of_classes}: expected {len(images)} integer labels >= 0, found {len(labels)} of {labels.dtype}; "
            "the files do not belong together"
        )
    if images.shape[2] != images.shape[3]:
        raise UserError(f"{paths['images']}: expected square images, found {tuple(images.shape)}")
    if not float(syn_lr) > 0:
        raise UserError(f"{paths['syn_lr']}: expected a learning rate > 0, found {float(syn_lr)}")
    if info:
        tiled = canvas == 1 and images.shape[2] > info.im_size and images.shape[2] % info.im_size == 0
        check_shape(paths["images"], images, info, canvas, ", or --texture and --canvas_size" if tiled else "")
        if (largest := int(labels.max())) >= info.num_classes:
            raise UserError(
                f"{of_classes}: expected labels below {info.num_classes} for {info.name}, found {largest}; name "
                "the right --dataset"
            )
    if len(labels) % sum(shares):
        shape = f"in proportion {shares}" if len(set(shares)) > 1 else "of equal size"
        raise UserError(f"{paths['images']}: expected {len(shares)} stages {shape}, found {len(labels)} images")
    counts = [len(labels) // sum(shares) * share for share in shares]
    soft = None if soft is None else soft.float().to(device)
    return SyntheticSet(images.float().to(device), labels.long().to(device), syn_lr.float().to(device), counts, soft)


def _check_soft(path, soft, count, info):
    found = tuple(soft.shape)
    expected = (count, info.num_classes if info else found[1])
    good = found == expected and soft.is_floating_point()
    if not good or soft.min() < 0 or not torch.allclose(soft.double().sum(1), torch.ones(count).double(), atol=1e-3):
        raise UserError(
            f"{path}: expected soft labels {expected} >= 0 whose rows sum to 1, found {found} of {soft.dtype} from "
            f"{float(soft.min()):.3g} to {float(soft.max()):.3g}; the files do not belong together"
        )


def check_shape(path, images, info, canvas=1, advice=""):
    """Refuse images (N, C, H, W) of another channel count or size than the data set's.

    Raises:
        UserError: they are.
    """
    expected, found = [info.channel, info.im_size * canvas, info.im_size * canvas], list(images.shape[1:])
    if found != expected:
        raise UserError(
            f"{path}: expected images {'x'.join(map(str, expected))} for {info.name}, found "
            f"{'x'.join(map(str, found))}; name the right --dataset and size{advice}"
        )


def read_mtt_part(path, part):
    """Read one file of a union: its images, labels or syn_lr.

    Raises:
        UserError: it is missing, damaged, of a wrong number of axes, or holds NaN.
    """
    what, dimensions = PARTS[part]
    value = files.load(path, what)
    if isinstance(value, (int, float)) and dimensions == (0,):
        value = torch.tensor(value)
    if dimensions == (0,) and isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.reshape(())
    known = isinstance(value, torch.Tensor) and value.dim() in dimensions
    if not known or (value.dim() == 2 and not value.dtype.is_floating_point):
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"{path}: expected {what}, found {found}; make it anew")
    value = value.detach()
    if value.dtype.is_floating_point and not bool(value.isfinite().all()):
        raise UserError(f"{path}: expected finite numbers, found NaN or infinity; make it anew")
    return value


# PDD+IDC's files, whose names count stages from 0 ---------------------------------------------------------------------


def idc_path(folder, stage):
    """Return the file of the union of `stage` (from 1)."""
    return Path(folder) / f"interval_{stage - 1}_data.pt"


def save_idc(folder, stage, synthetic, num_classes):
    """Write the union of `stage` (from 1) as the published code does: [images, labels], class after class."""
    images = synthetic.by_class(num_classes).detach().flatten(0, 1).cpu().clone()
    labels = torch.arange(num_classes).repeat_interleave(len(images) // num_classes)
    files.save(idc_path(folder, stage), [images, labels])


def read_idc(path):
    """Read one file of PDD+IDC; returns (images (N, C, H, W) float32, labels (N,) int64).

    Raises:
        UserError: it is missing, damaged, holds something else, or NaN.
    """
    value = files.load(path, "a union [images, labels]")
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, torch.Tensor) for v in value)
    good = good and value[0].is_floating_point() and not value[1].is_floating_point()
    if not good or value[0].dim() != 4 or value[1].dim() != 1 or len(value[0]) != len(value[1]):
        raise UserError(f"{path}: expected [images (N, C, H, W), labels (N,)], found something else; make it anew")
    images, labels = value[0].detach().float(), value[1].detach().long()
    if not bool(images.isfinite().all()):
        raise UserError(f"{path}: expected finite pixels, found NaN or infinity; make it anew")
    return images, labels


def load_idc(folder, stage, info, ipc=None, device="cpu"):
    """Read the union of `stage` (from 1).

    Args:
        folder: of the results.
        stage: whose union.
        info: `DatasetInfo` that it must fit.
        ipc: images of each class that a stage learned; None to take any.
        device: for its tensors.

    Returns:
        `SyntheticSet`, pixels in [0, 1].

    Raises:
        UserError: the file is missing, damaged, or of another data set, size, class count or ipc.
    """
    path = idc_path(folder, stage)
    images, labels = read_idc(path)
    check_shape(path, images, info)
    per_class = len(images) // info.num_classes
    if per_class == 0 or not torch.equal(labels, torch.arange(info.num_classes).repeat_interleave(per_class)):
        lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        raise UserError(
            f"{path}: expected {info.num_classes} classes of equal size one after the other, found {len(labels)} "
            f"labels from {lowest} to {highest}; name the right --dataset and --nclass"
        )
    if per_class % stage or (ipc and per_class != ipc * stage):
        raise UserError(
            f"{path}: expected {ipc * stage if ipc else f'a multiple of {stage}'} images of each class, "
            f"found {per_class}; check --ipc"
        )
    grid = images.view(info.num_classes, per_class // stage, stage, *images.shape[1:])
    images = grid.permute(2, 0, 1, 3, 4, 5).flatten(0, 2).to(device)
    labels = torch.arange(info.num_classes, device=device).repeat_interleave(per_class // stage).repeat(stage)
    return SyntheticSet(images, labels, counts=[len(labels) // stage] * stage)

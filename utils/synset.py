"""Synthetic sets: the union of the stages so far, of which only the newest subset is learned; their files.

To train on a distilled set in a program of one's own:

    from utils.synset import load_distilled

    data = load_distilled("logged_files/CIFAR10/CIFAR10_ConvNet_S_ipc2_…")
    for x, y in torch.utils.data.DataLoader(data, batch_size=256, shuffle=True):
        …                           # one step of a network; test it on data.transform(pictures in [0, 1])
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from utils import files, formation, formats, results
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
    images, labels, syn_lr = (read_part(folder / f"{part}_{tag}.pt", part) for part in ("images", "labels", "syn_lr"))
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


PARTS = {"images": ("pictures (N, C, H, W)", 4), "labels": ("labels (N,)", 1), "syn_lr": ("one number", 0)}


def read_part(path, part):
    """Read one file of a union: its images, labels or syn_lr.

    Raises:
        UserError: it is missing, damaged, of a wrong number of axes, or holds NaN.
    """
    what, dimensions = PARTS[part]
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
    """Compare a loaded union with the data set it is used with (`RealData` or `DataFacts`).

    Raises:
        UserError: pictures of another size, or labels of other classes.
    """
    folder = Path(folder)
    expected = (real.channel, real.im_size * canvas, real.im_size * canvas)
    found = tuple(synthetic.images.shape[1:])
    if found != expected:
        raise UserError(
            f"{folder / 'images_best.pt'}: expected pictures {'x'.join(map(str, expected))} for {real.name}, found "
            f"{'x'.join(map(str, found))}; name the right --dataset"
        )
    present = int(synthetic.labels.max()) + 1
    if present > real.num_classes:
        raise UserError(
            f"{folder / 'labels_best.pt'}: expected labels below {real.num_classes} for {real.name}, found "
            f"{present - 1}; name the right --dataset"
        )


def union_path(folder, stage):
    """Return the file of the union of `stage` (from 0)."""
    return Path(folder) / f"interval_{stage}_data.pt"


def save_union(folder, stage, union):
    """Write a union (K, n, stages, C, H, W) as the published code does: [images, labels], class after class."""
    images = union.flatten(1, 2).flatten(0, 1).cpu().clone()
    labels = torch.arange(len(union)).repeat_interleave(len(images) // len(union))
    files.save(union_path(folder, stage), [images, labels])


def read_union(path):
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


def load_union(folder, stage, real, ipc=None):
    """Read the union of `stage` (from 0).

    Args:
        folder: of the results.
        stage: whose union.
        real: `RealData` that it must fit (or its `DataFacts`).
        ipc: images of each class that a stage learned; None to take any.

    Returns:
        (K, n, stage + 1, C, H, W) float32 in [0, 1], on the CPU.

    Raises:
        UserError: the file is missing, damaged, or of another data set, size, class count or ipc.
    """
    path = union_path(folder, stage)
    images, labels = read_union(path)
    expected = (real.channel, real.im_size, real.im_size)
    if tuple(images.shape[1:]) != expected:
        raise UserError(
            f"{path}: expected pictures {'x'.join(map(str, expected))} for {real.name}, found "
            f"{'x'.join(map(str, images.shape[1:]))}; name the right --dataset and --size"
        )
    per_class = len(images) // real.num_classes
    wanted = torch.arange(real.num_classes).repeat_interleave(per_class)
    if per_class == 0 or not torch.equal(labels, wanted):
        raise UserError(
            f"{path}: expected {real.num_classes} classes of equal size one after the other, found {len(labels)} "
            f"labels from {int(labels.min()) if len(labels) else 0} to {int(labels.max()) if len(labels) else 0}; "
            "name the right --dataset and --nclass"
        )
    if per_class % (stage + 1) or (ipc and per_class != ipc * (stage + 1)):
        raise UserError(
            f"{path}: expected {ipc * (stage + 1) if ipc else f'a multiple of {stage + 1}'} images of each class, "
            f"found {per_class}; check --ipc"
        )
    return images.view(real.num_classes, -1, stage + 1, *expected)


class DistilledSet(TensorDataset):
    """A distilled set to train on: items are (image (C, H, W) float32 in network space, label 0-dim int64).

    Canvases (texture mode) are shown as random windows of the size of real pictures, drawn from torch's generator.

    Args:
        images, labels, stage: see below.
        syn_lr: see below.
        space: `results.Space`.
        pixels: (N, C, H, W) in [0, 1], None where they follow from the images.
        about: see below.

    Attributes:
        images: (N, C, H, W) float32 in network space.
        labels: (N,) int64.
        stage: (N,) int64 from 1: the stage that learned each picture.
        syn_lr: learning rate that was learned with them, None with PDD+IDC.
        num_classes, class_names: of the data set; classes of published sets are called by their numbers.
        about: dict of how the set was made.
    """

    def __init__(self, images, labels, stage, syn_lr, space, pixels=None, about=None):
        super().__init__(images, labels)
        self.images, self.labels, self.stage, self.syn_lr = images, labels, stage, syn_lr
        self.space, self.about = space, about or {}
        self.num_classes, self.class_names = space.facts.num_classes, space.facts.class_names
        self._pixels = pixels

    @property
    def transform(self):
        """The transform of real pictures in [0, 1], (C, H, W) or (N, C, H, W), for networks trained on this set.

        Raises:
            UserError: the set is whitened and nobody knows how.
        """
        return self.space.transform

    @property
    def pixels(self):
        """The pictures for the eye, (N, C, H, W) in [0, 1]; what lies outside is clipped.

        Raises:
            UserError: the set is whitened and nobody knows how.
        """
        if self._pixels is None:
            self._pixels = self.space.to_pixels(self.images)
        return self._pixels.clamp(0, 1)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        window = self.space.facts.im_size
        if image.shape[-1] == window:
            return image, label
        shifts = [int(torch.randint(size, ())) for size in image.shape[-2:]]
        return image.roll(shifts, (-2, -1))[..., :window, :window], label


def load_distilled(folder, stage=None, dataset=None, data_path=None, zca=None, factor=None, decode_type=None):
    """Load what a distillation learned, to train networks on it.

    Args:
        folder: of an experiment or of one stage of PDD+MTT, of a result of PDD+IDC (its images are decoded), or of an
            export of either (or its file).
        stage: load the union of this stage (from 1); None for the last.
        dataset, zca, factor, decode_type: as the distillation had them; needed only for published files whose folders
            do not say them.
        data_path: folder of the data set, for sets that do not describe it: class names of published sets, and
            `transform` of published sets with ZCA.

    Returns:
        `DistilledSet`.

    Raises:
        UserError: files are missing or damaged, or something is unknown.
    """
    file = formats.exported(folder)
    if file:
        return _exported(file, stage)
    return load_stage(results.find(folder, dataset, data_path, zca, factor, decode_type), stage)


def load_stage(result, stage=None):
    """Return the `DistilledSet` of the union of one stage of a `results.Result`; None for its last."""
    stage = max(result.stages) if stage is None else stage
    if stage not in result.stages:
        raise UserError(f"{result.folder}: expected one of the stages {sorted(result.stages)}, asked for {stage}")
    if result.method == "PDD+IDC":
        return _decoded(result, stage)
    folder, facts = result.stages[stage], result.space.facts
    union = load_set(folder)
    check_set(folder, union, facts, _canvas(result.options, union, facts))
    each, rest = divmod(len(union), stage)
    if rest:
        raise UserError(
            f"{folder / 'images_best.pt'}: expected {stage} stages of equal size, found {len(union)} pictures"
        )
    stages = torch.arange(1, stage + 1).repeat_interleave(each)
    pixels = _whitened_pixels(folder, union) if facts.zca and result.space.whitening is None else None
    return DistilledSet(union.images, union.labels, stages, float(union.syn_lr), result.space, pixels, _about(result))


def _canvas(options, union, facts):
    """Return how many pictures a side of a canvas holds; 1 without texture mode, which published sets do not tell."""
    if options:
        return options["canvas_size"] if options.get("texture") else 1
    return max(1, union.images.shape[-1] // facts.im_size)


def _about(result):
    return {"method": result.method, "options": result.options, "versions": result.versions}


def _whitened_pixels(folder, union):
    """Return the pixels of a whitened union from the numbered file that was written with its inverse; else None."""
    for path in sorted(folder.glob("images_zca_*.pt")):
        twin = folder / path.name.replace("images_zca_", "images_")
        if twin.exists() and torch.equal(read_part(twin, "images").float(), union.images):
            pixels = read_part(path, "images").float()
            if pixels.shape != union.images.shape:
                raise UserError(f"{path}: expected {tuple(union.images.shape)}, found {tuple(pixels.shape)}")
            return pixels
    return None


def _decoded(result, stage):
    """Return the `DistilledSet` of a union of PDD+IDC, decoded and normalised."""
    facts = result.space.facts
    union = load_union(result.folder, stage - 1, facts)
    per_class = union.shape[1] * stage
    if result.factor > facts.im_size:
        raise UserError(f"--factor {result.factor}: larger than the pictures of {facts.im_size} pixels")
    pixels, labels = formation.decode_union(
        union.flatten(1, 2).flatten(0, 1), facts.num_classes, result.factor, result.decode_type
    )
    stages = formation.origins(per_class, result.factor, result.decode_type) % stage + 1
    stages = stages.repeat(facts.num_classes)
    about = _about(result) | {"factor": result.factor, "decode_type": result.decode_type}
    return DistilledSet(result.space.transform(pixels), labels, stages, None, result.space, pixels, about)


def _exported(path, stage):
    """Return the `DistilledSet` of an export."""
    tensors, about = formats.read(path)
    facts = results.read_facts(about["data"], path)
    whitening = None
    if facts.zca and "zca_matrix" in tensors:
        whitening = {"mean_vector": tensors["zca_mean"], "transform_matrix": tensors["zca_matrix"]}
    space = results.Space(facts, whitening)
    last = int(tensors["stage"].max())
    stage = stage or last
    if not 1 <= stage <= last or (stage < last and about.get("decode_type") == "bound"):
        raise UserError(f"{path}: expected the stage {last} that was exported, asked for {stage}")
    kept = tensors["stage"] <= stage
    pixels, labels, stages = (tensors[name][kept] for name in ("pixels", "labels", "stage"))
    images = tensors["images"][kept] if "images" in tensors else space.transform(pixels)
    rates = {known["stage"]: known["syn_lr"] for known in about.get("stages", ())}
    return DistilledSet(images, labels, stages, rates.get(stage), space, pixels, about)

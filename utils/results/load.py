"""`load_distilled`: distilled sets as datasets to train on, from results of both methods and from exports."""

import functools

import torch
from torch.utils.data import TensorDataset

from .. import multi_formation
from ..run.errors import UserError
from ..synthetic import load_idc, load_mtt, read_mtt_part
from . import formats, known
from .names import stage_ipcs


class DistilledSet(TensorDataset):
    """A distilled set to train on: items are (image (C, H, W) float32 in network space, label).

    A label is 0-dim int64, or with `soft_labels` (K,) float32; torch's cross_entropy takes both.

    Canvases (texture mode) are shown as random windows of the size of real images, drawn from torch's generator.

    Attributes:
        images: (N, C, H, W) float32 in network space.
        labels: (N,) int64.
        soft_labels: (N, K) float32, learned probabilities of the classes; None for sets with hard labels.
        stage: (N,) int64 from 1: the stage that learned each image.
        syn_lr: float, the learning rate that the last of these stages learned with its images; None with PDD+IDC. (The
            files of an export hold a tensor `syn_lr` of the rates of all stages.)
        info: `DatasetInfo` of the data set; classes of published sets are called by their numbers.
        num_classes, class_names: of the data set.
        about: dict of how the set was made.
    """

    def __init__(self, images, labels, stage, syn_lr, info, pixels=None, about=None, soft_labels=None):
        super().__init__(images, labels if soft_labels is None else soft_labels)
        self.images, self.labels, self.stage, self.syn_lr = images, labels, stage, syn_lr
        self.soft_labels = soft_labels
        self.info, self.about = info, about or {}
        self.num_classes, self.class_names = info.num_classes, info.class_names
        if pixels is not None:
            self.exact_pixels = pixels

    @property
    def transform(self):
        """The torchvision transform of real images in [0, 1], (C, H, W) or (N, C, H, W), into network space.

        Raises:
            UserError: the set is whitened and the transform is not known.
        """
        return self.info.transform

    @functools.cached_property
    def exact_pixels(self):
        """The images in pixels (N, C, H, W), of which some may be outside [0, 1].

        Raises:
            UserError: the set is whitened and the transform is not known.
        """
        return self.info.to_pixels(self.images)

    @property
    def pixels(self):
        """`exact_pixels` clipped to [0, 1]."""
        return self.exact_pixels.clamp(0, 1)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        window = self.info.im_size
        if image.shape[-1] == window:
            return image, label
        shifts = [int(torch.randint(size, ())) for size in image.shape[-2:]]
        return image.roll(shifts, (-2, -1))[..., :window, :window], label


def load_distilled(folder, stage=None, dataset=None, data_path=None, zca=None, factor=None, decode_type=None):
    """Load what a distillation learned, to train networks on it.

    Args:
        folder: of an experiment or of one stage of PDD+MTT, of a result of PDD+IDC or PDD+DM (its images are decoded),
            or of an export of one (or its file).
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
    if file := formats.find_export(folder):
        return _load_export(file, stage)
    return load_stage(known.find(folder, dataset, data_path, zca, factor, decode_type), stage)


def load_stage(distillation, stage=None):
    """Return the `DistilledSet` of the union of one stage of a `known.Distillation`; None for its last."""
    stage = max(distillation.stages) if stage is None else stage
    if stage not in distillation.stages:
        stages = sorted(distillation.stages)
        raise UserError(f"{distillation.folder}: expected one of the stages {stages}, asked for {stage}")
    return (_load_mtt if distillation.method == "PDD+MTT" else _load_idc)(distillation, stage)


def _load_mtt(distillation, stage):
    folder, info, options = distillation.stages[stage], distillation.info, distillation.options
    if options:
        canvas = options["canvas_size"] if options.get("texture") else 1
    else:  # published files do not say whether they hold canvases
        canvas = max(1, read_mtt_part(folder / "images_best.pt", "images").shape[-1] // info.im_size)
    union = load_mtt(folder, info=info, canvas=canvas, shares=stage_ipcs(options.get("ipc", 1), stage)[:stage])
    pixels = _saved_pixels(folder, union) if info.zca and info.whitening is None else None
    about = _about(distillation)
    return DistilledSet(union.images, union.labels, union.stage, float(union.syn_lr), info, pixels, about, union.soft)


def _saved_pixels(folder, union):
    """Return the pixels of a whitened union from images_zca_{it}.pt beside the same images; None if there are none."""
    for path in sorted(folder.glob("images_zca_*.pt")):
        twin = folder / path.name.replace("images_zca_", "images_")
        if twin.exists() and torch.equal(read_mtt_part(twin, "images").float(), union.images):
            pixels = read_mtt_part(path, "images").float()
            if pixels.shape != union.images.shape:
                raise UserError(f"{path}: expected {tuple(union.images.shape)}, found {tuple(pixels.shape)}")
            return pixels
    return None


def _load_idc(distillation, stage):
    info, factor, decode_type = distillation.info, distillation.factor, distillation.decode_type
    if factor > info.im_size:
        raise UserError(f"--factor {factor}: larger than the images of {info.im_size} pixels")
    images = load_idc(distillation.folder, stage, info).by_class(info.num_classes)
    pixels, labels = multi_formation.decode_union(images, factor, decode_type)
    stages = multi_formation.origins(images.shape[1], factor, decode_type) % stage + 1
    about = _about(distillation) | {"factor": factor, "decode_type": decode_type}
    stages = stages.repeat(info.num_classes)
    return DistilledSet(info.normalise(pixels), labels, stages, None, info, pixels, about)


def _about(distillation):
    return {"method": distillation.method, "options": distillation.options, "versions": distillation.versions}


def _load_export(path, stage):
    tensors, info, about = formats.read(path)
    last = int(tensors["stage"].max())
    stage = last if stage is None else stage
    if stage not in range(1, last + 1) or (stage < last and about.get("decode_type") == "bound"):
        raise UserError(f"{path}: expected the stage {last} that was exported, asked for {stage}")
    kept = tensors["stage"] <= stage
    pixels, labels, stages = (tensors[name][kept] for name in ("pixels", "labels", "stage"))
    images = tensors["images"][kept] if "images" in tensors else info.transform(pixels)
    soft = tensors["soft_labels"][kept] if "soft_labels" in tensors else None
    rates = {row["stage"]: row["syn_lr"] for row in about.get("stages", ())}
    return DistilledSet(images, labels, stages, rates.get(stage), info, pixels, about, soft)

"""Exports: distilled sets in formats that other programs read, with a JSON of how they were made.

Tensors of a set: `images` (N, C, H, W) float32 in network space, `pixels` (N, C, H, W) float32 in [0, 1], `labels`
(N,) int64, `stage` (N,) int64 from 1; with learned labels `soft_labels` (N, K) float32; with PDD+MTT `syn_lr` (P,)
float32, the learning rate of each stage, NaN if unknown; with ZCA, if the transform is known, `zca_mean` (C·H·W,) and
`zca_matrix` (C·H·W, C·H·W): network space is (pixels − mean) @ matrix. The format png holds a PNG for each image in
class folders instead of these tensors, and soft_labels.pt.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from .. import zca
from ..data.info import DatasetInfo
from ..run import files
from ..run.errors import UserError, one_line

ABOUT = "distilled.json"
SHEET = "contact_sheet.png"
SOFT = "soft_labels.pt"  # beside PNG images, in the order of their numbers
TENSOR_FILES = tuple(f"distilled.{kind}" for kind in ("pt", "npz", "safetensors"))
FORMATS = ("pt", "png", "npz", "safetensors")
WHAT = "a distilled set written by scripts/export.py"
OLD_IMAGES = "png"  # the class folders of earlier exports stood in this folder
OWN = {ABOUT, SHEET, SOFT, zca.FILE, OLD_IMAGES, *TENSOR_FILES}
CLASS_FOLDER = re.compile(r"(\d{3,})_.*")


@contextlib.contextmanager
def replaced(folder):
    """Yield a new folder beside `folder`; on leaving without an error it replaces an earlier export there.

    Raises:
        UserError: `folder` holds other files.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder, found a file; choose another")
    names = sorted(os.listdir(folder)) if folder.exists() else []
    own = {name for name in names if ABOUT in names and (name in OWN or CLASS_FOLDER.fullmatch(name))}
    if others := [name for name in names if name not in own]:
        raise UserError(f"{folder}: expected an empty folder or an earlier export, found {others[0]}; choose another")
    temporary, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)


def write(folder, kind, tensors, about):
    """Write a set into an empty folder.

    Args:
        folder: to write into.
        kind: one of `FORMATS`.
        tensors: dict, see above.
        about: dict of how they were made; `about["data"]` is the data set's `DatasetInfo.as_json()`.
    """
    folder = Path(folder)
    text = json.dumps(about)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if kind == "png":
        _write_images(folder, tensors, about["data"]["class_names"])
        if "soft_labels" in tensors:
            files.save(folder / SOFT, tensors["soft_labels"])
        if "zca_matrix" in tensors:
            files.save(folder / zca.FILE, {name: tensors[name] for name in ("zca_mean", "zca_matrix")})
    elif kind == "pt":
        files.save(folder / "distilled.pt", tensors | {"about": text})
    elif kind == "npz":
        with files.atomic(folder / "distilled.npz") as file:
            np.savez(file, about=text, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        from safetensors.torch import save

        with files.atomic(folder / "distilled.safetensors") as file:
            file.write(save(tensors, metadata={"about": text}))
    files.write_json(folder / ABOUT, about)


def class_folder(label, name):
    """Return the name of a class's folder: in alphabetical order the folders are in the order of the labels."""
    return f"{label:03d}_" + re.sub(r"[^\w.-]+", "_", name)


def _write_images(folder, tensors, class_names):
    from torchvision.transforms.functional import to_pil_image

    for label, name in enumerate(class_names):
        (folder / class_folder(label, name)).mkdir(parents=True)
    pixels = (tensors["pixels"].clamp(0, 1) * 255).round().byte()
    rows = zip(pixels, tensors["labels"].tolist(), tensors["stage"].tolist(), strict=True)
    for number, (image, label, stage) in enumerate(rows):
        path = folder / class_folder(label, class_names[label]) / f"stage{stage}_{number:05d}.png"
        to_pil_image(image).save(path)


def find_export(path):
    """Return the file of an export (for PNG the JSON beside them) at `path`, a folder or the file; None without one."""
    path = Path(path)
    if path.is_file() and (path.name == ABOUT or path.suffix in (".pt", ".npz", ".safetensors")):
        return path
    if not (path / ABOUT).is_file():
        return None
    return next((path / name for name in TENSOR_FILES if (path / name).is_file()), path / ABOUT)


def read(path):
    """Read an export.

    Args:
        path: what `find_export` returned.

    Returns:
        (tensors, `DatasetInfo`, about); of PNG only `pixels`, `labels` and `stage`.

    Raises:
        UserError: the file is missing, damaged, or not a set.
    """
    path = Path(path)
    dimensions = {"pixels": 4, "labels": 1, "stage": 1}
    if path.name == ABOUT:
        about = files.read_json(path, "how a distilled set was made")
        nested = path.parent / OLD_IMAGES
        tensors = _read_images(nested if nested.is_dir() else path.parent)
        if (path.parent / SOFT).exists():
            tensors["soft_labels"] = files.load(path.parent / SOFT, "learned labels")
        if (path.parent / zca.FILE).exists():
            tensors |= files.load(path.parent / zca.FILE, "a ZCA transform")
    else:
        tensors, about = _read_file(path)
        dimensions["images"] = 4
    if "soft_labels" in tensors:
        dimensions["soft_labels"] = 2
    for name, count in dimensions.items():
        shape = tuple(tensors[name].shape) if isinstance(tensors.get(name), torch.Tensor) else ()
        if len(shape) != count or not shape[0] or shape[0] != len(tensors["pixels"]):
            raise UserError(f"{path}: expected {WHAT}, found shape {shape} for {name!r}; export it again")
    if not isinstance(about.get("data"), dict):
        raise UserError(f"{path}: expected {WHAT}, found no description of its data; export it again")
    info = DatasetInfo.from_json(about["data"], path)
    whitening = None
    if info.zca and "zca_matrix" in tensors:  # without its inverse
        parts = {"mean_vector": tensors["zca_mean"].view(1, -1), "transform_matrix": tensors["zca_matrix"]}
        whitening = zca.assemble(parts)
    return tensors, info.replace(whitening=whitening), about


def _read_file(path):
    """Return (tensors, about) of one file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "about"}
                return tensors, json.loads(arrays["about"].item())
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
        found = files.load(path, WHAT)
        return found, json.loads(found.pop("about"))
    except UserError:
        raise
    except Exception as error:
        # A damaged archive surfaces as whatever its reader stumbled over.
        raise UserError(
            f"{path}: expected {WHAT}, found a damaged or other file ({one_line(error)[:80]}); export it again"
        ) from None


def _read_images(folder):
    """Return the tensors of PNG images in class folders.

    Raises:
        UserError: one is missing, damaged, or of another size.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    found = {}
    for path in folder.glob("*/*.png"):
        label, name = CLASS_FOLDER.fullmatch(path.parent.name), re.fullmatch(r"stage(\d+)_(\d+)\.png", path.name)
        if label and name:
            found[int(name[2])] = (path, int(label[1]), int(name[1]))
    if missing := sorted({0, *range(max(found, default=0))} - found.keys()):
        raise UserError(f"{folder}: expected images with numbers from 0 on, found none of number {missing[0]}")
    paths, labels, stages = zip(*(found[number] for number in range(len(found))), strict=True)
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(pil_to_tensor(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: expected an image, found a damaged file ({one_line(error)[:60]})") from None
        found, expected = tuple(images[-1].shape), tuple(images[0].shape)
        if found != expected:
            raise UserError(f"{path}: expected an image {expected} as the first one, found {found}")
    return {"pixels": torch.stack(images) / 255, "labels": torch.tensor(labels), "stage": torch.tensor(stages)}

"""Distilled sets in formats that other programs read: tensors with a JSON of their making, or PNG pictures.

Tensors of a set: `images` (N, C, H, W) float32 in network space, `pixels` (N, C, H, W) float32 in [0, 1], `labels`
(N,) int64, `stage` (N,) int64 from 1; with PDD+MTT `syn_lr` (P,) float32, and with ZCA, where it is known,
`zca_mean` (C·H·W,) and `zca_matrix` (C·H·W, C·H·W): network space is (pixels − mean) @ matrix.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from utils import files
from utils.errors import UserError, one_line

ABOUT = "distilled.json"
PICTURES = "png"
SHEET = "contact_sheet.png"
SUFFIXES = {"pt": ".pt", "npz": ".npz", "safetensors": ".safetensors"}
FORMATS = ("pt", "png", "npz", "safetensors")
WHAT = "a distilled set written by utils.export"
OWN = {ABOUT, PICTURES, SHEET, "zca.pt", *(f"distilled{suffix}" for suffix in SUFFIXES.values())}


@contextlib.contextmanager
def replaced(folder):
    """Yield a new folder beside `folder`; on leaving without an error it takes the place of an earlier export.

    Raises:
        UserError: `folder` holds other files.
    """
    folder = Path(folder).resolve()
    others = sorted(set(os.listdir(folder)) - OWN) if folder.is_dir() else [folder.name] if folder.exists() else []
    if others:
        raise UserError(f"{folder}: expected an empty folder or an earlier export, found {others[0]}; choose another")
    making = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write(folder, kind, tensors, about):
    """Write a set into an empty folder.

    Args:
        folder: to write into.
        kind: one of `FORMATS`.
        tensors: dict, see above.
        about: dict of how they were made; `about["data"]["class_names"]` names the folders of PNG pictures.
    """
    folder = Path(folder)
    text = json.dumps(about)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if kind == PICTURES:
        _write_pictures(folder / PICTURES, tensors, about["data"]["class_names"])
        if "zca_matrix" in tensors:
            files.save(folder / "zca.pt", {name: tensors[name] for name in ("zca_mean", "zca_matrix")})
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


def _write_pictures(folder, tensors, class_names):
    from PIL import Image

    for label, name in enumerate(class_names):
        (folder / class_folder(label, name)).mkdir(parents=True)
    pixels = (tensors["pixels"].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for number, (picture, label, stage) in enumerate(
        zip(pixels, tensors["labels"].tolist(), tensors["stage"].tolist(), strict=True)
    ):
        path = folder / class_folder(label, class_names[label]) / f"stage{stage}_{number:05d}.png"
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(path)


def exported(path):
    """Return the file of an exported set, for PNG pictures the JSON beside them; None where `path` is no export.

    Args:
        path: of the folder or of the file itself.
    """
    path = Path(path)
    if path.is_file() and (path.name == ABOUT or path.suffix in SUFFIXES.values()):
        return path
    if not (path / ABOUT).is_file():
        return None
    found = [path / f"distilled{suffix}" for suffix in SUFFIXES.values() if (path / f"distilled{suffix}").is_file()]
    return found[0] if found else path / ABOUT


def read(path):
    """Read an exported set.

    Args:
        path: what `exported` returned.

    Returns:
        (tensors, about); from PNG pictures `pixels`, `labels` and `stage` only.

    Raises:
        UserError: the file is missing, damaged, or not a set.
    """
    path = Path(path)
    if path.name == ABOUT:
        about = files.read_json(path, "how a distilled set was made")
        tensors = _read_pictures(path.parent / PICTURES)
        if (path.parent / "zca.pt").exists():
            tensors |= files.load(path.parent / "zca.pt", "a ZCA transform")
    else:
        tensors, about = _read_file(path)
    wanted = {"pixels": 4, "labels": 1, "stage": 1, **({} if path.name == ABOUT else {"images": 4})}
    for name, dimensions in wanted.items():
        tensor = tensors.get(name)
        count = len(tensors["pixels"]) if "pixels" in tensors else 0
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != dimensions or len(tensor) != count or not count:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "none"
            raise UserError(f"{path}: expected {WHAT}, found {found} for {name!r}; export it again")
    if not isinstance(about.get("data"), dict):
        raise UserError(f"{path}: expected {WHAT}, found no description of its data; export it again")
    return tensors, about


def _read_file(path):
    """Return (tensors, about) of one file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "about"}
                return tensors, json.loads(str(arrays["about"]))
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


def _read_pictures(folder):
    """Return the tensors of PNG pictures in class folders."""
    from PIL import Image

    found = {}
    for path in folder.glob("*/*.png"):
        label, name = re.match(r"\d+", path.parent.name), re.fullmatch(r"stage(\d+)_(\d+)\.png", path.name)
        if label and name:
            found[int(name[2])] = (path, int(label[0]), int(name[1]))
    if sorted(found) != list(range(len(found))) or not found:
        missing = next((number for number in range(len(found)) if number not in found), 0)
        raise UserError(f"{folder}: expected pictures with numbers from 0 on, found none of number {missing}")
    pixels = []
    for number in range(len(found)):
        path = found[number][0]
        try:
            with Image.open(path) as picture:
                array = np.asarray(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: expected a picture, found a damaged file ({one_line(error)[:60]})") from None
        pixels.append(torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).astype(np.float32) / 255))
        if pixels[-1].shape != pixels[0].shape:
            raise UserError(
                f"{path}: expected a picture {tuple(pixels[0].shape)} as the first one, found {tuple(pixels[-1].shape)}"
            )
    labels, stages = (torch.tensor([found[number][part] for number in range(len(found))]) for part in (1, 2))
    return {"pixels": torch.stack(pixels), "labels": labels, "stage": stages}

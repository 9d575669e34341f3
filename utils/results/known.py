"""Find a distillation on disk: its stages, and what is known of its options and data.

`data.json` beside a result describes its data set, so that the result can be used without the data; with ZCA whitening,
`zca.pt` holds the transform. The authors' published files have neither: what their names do not say must be given.
"""

import dataclasses
import re
from pathlib import Path

import torch

from .. import zca
from ..data import datasets
from ..data.info import IDC_NAMES, IDC_STATISTICS, IMAGENET_MEAN, IMAGENET_STD, KNOWN, SIZED, DatasetInfo
from ..run import files
from ..run.errors import UserError
from ..run.log import log0
from ..synthetic import read_idc, read_mtt_part
from .names import STAGE_FOLDER, base_method, idc_learned, mtt_learned, mtt_stages
from .provenance import DATA

IDC_FILE = re.compile(r"interval_(\d+)_data\.pt")
# Names that the published code gives (names.mtt_experiment, names.idc_folder).
MTT_NAME = re.compile(
    r"(?P<dataset>[^_]+)_(?P<model>.+)_(?P<eval_mode>[A-Z])_ipc(?P<ipc>[\d-]+)_max\d+_syn\d+_.*_increase"
    r"(?P<zca>_zca)?(_.*)?"
)
IDC_NAME = re.compile(r".+_(grad|feat|f\d+(,\d+)?|dm)_.+_ipc\d+")
FACTOR = re.compile(r"_factor(\d+)(?:_(multi|bound))?_")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a distillation left on disk.

    Attributes:
        folder: of the experiment.
        stages: {stage (from 1): its folder (MTT) or file (IDC)}.
        info: `DatasetInfo`.
        options, versions: dicts of config.json, empty without one.
        method: PDD+MTT, PDD+IDC or PDD+DM.
        factor, decode_type: of IDC's multi-formation.
    """

    folder: Path
    stages: dict
    info: DatasetInfo
    options: dict
    versions: dict
    method: str
    factor: int = 1
    decode_type: str = "single"


def save_info(folder, info):
    """Write data.json and, with ZCA, zca.pt into the folder of an experiment, once."""
    folder = Path(folder)
    if not (folder / DATA).exists():
        files.write_json(folder / DATA, info.as_json())
    if info.whitening is not None and not (folder / zca.FILE).exists():
        files.save(folder / zca.FILE, zca.state(info.whitening))


def find(folder, dataset=None, data_path=None, whitened=None, factor=None, decode_type=None):
    """Return the `Distillation` in `folder`.

    Args:
        folder: of an experiment or of one stage of PDD+MTT, or of a result of PDD+IDC.
        dataset: its name, if nothing in the folder says it.
        data_path: folder of the data set, read if the result does not describe it.
        whitened: True for ZCA, if nothing says it.
        factor, decode_type: of IDC's images, if nothing says it.

    Raises:
        UserError: it is none of these, a stage is missing, or something is unknown or contradicts what is given.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of results, found {'a file' if folder.exists() else 'none'}")
    unions = {int(m[1]) + 1: path for path in folder.iterdir() if (m := IDC_FILE.fullmatch(path.name))}
    if unions:
        home, stages = folder, _finished(folder, unions, lambda stage: idc_learned(folder, stage))
    else:
        home, stages = _stage_folders(folder)
    options, versions = _config(home)
    known = _made_with(home)
    named = IDC_NAMES.get(known.get("dataset"), known.get("dataset"))
    dataset = _settle(home, "dataset", IDC_NAMES.get(dataset, dataset), named)
    if not unions:
        whitened = _settle(home, "zca", whitened, known.get("zca"))
        first = stages[min(stages)] / "images_best.pt"
        subset = options.get("subset") or home.parent.parent.name  # ImageNet/{subset}/{pixels}/{experiment}
        antialias = dataset != "ImageNet"  # as published
        info = _info(home, first, dataset, data_path, whitened, None, subset, antialias)
        return Distillation(home, stages, info, options, versions, "PDD+MTT")
    factor = _settle(home, "factor", factor, known.get("factor"))
    decode_type = _settle(home, "decode_type", decode_type, known.get("decode_type"))
    seed = f"-seed{options['dseed']}" if options.get("dseed") else ""
    subset = f"imagenet{options['nclass']}{seed}" if "nclass" in options else home.parent.name
    statistics = {IDC_NAMES[name]: values for name, values in IDC_STATISTICS.items()}.get(dataset)
    info = _info(home, stages[1], dataset, data_path, False, statistics, subset)
    method = f"PDD+{base_method({'factor': factor} | options)}"
    return Distillation(home, stages, info, options, versions, method, factor, decode_type)


def _stage_folders(folder):
    """Return (folder of the experiment, {stage: folder}) of PDD+MTT."""
    found = {stage: paths for stage, paths in mtt_stages(folder).items() if (paths[0] / "images_best.pt").exists()}
    if doubled := next((stage for stage in found if len(found[stage]) > 1), None):
        raise UserError(f"{folder}: expected one folder interval{doubled}_epoch…, found {len(found[doubled])}")
    home, first, stages = folder, 1, {stage: path for stage, (path,) in found.items()}
    if not stages and (folder / "images_best.pt").exists():
        if own := STAGE_FOLDER.fullmatch(folder.name):
            home, first = folder.parent, int(own[1])
        stages = {first: folder}
    if not stages:
        raise UserError(
            f"{folder}: expected a result (interval{{p}}_epoch…/images_best.pt, images_best.pt or "
            "interval_{i}_data.pt) or an export of one (distilled.json), found none"
        )
    return home, _finished(folder, stages, lambda stage: mtt_learned(stages[stage]), first)


def _finished(folder, stages, learned, first=1):
    """Return those of {stage: path} that are `learned` (a function of a stage): all from `first` to the last of them.

    An interrupted stage, which holds what it has come to, is left out with a note.

    Raises:
        UserError: there is none, or one is missing.
    """
    found = {stage: path for stage, path in stages.items() if learned(stage)}
    if not found:
        raise UserError(f"{folder}: expected a finished stage, found none; the distillation's command continues it")
    for stage in sorted(stages.keys() - found.keys()):
        log0(f"note: {folder}: stage {stage} is not finished; without it")
    for stage in range(first, max(found)):
        if stage not in found:
            raise UserError(f"{folder}: expected stages 1 to {max(found)}, found no stage {stage}")
    return found


def _config(home):
    """Return (options, versions) of config.json."""
    if not (home / files.CONFIG).exists():
        return {}, {}
    config = files.read_json(home / files.CONFIG, "the options of a run", {"options": dict})
    return config["options"], config.get("versions") or {}


def _made_with(folder):
    """Return the options that a result was made with, as far as config.json, args.txt or its folder's name say them."""
    options, _ = _config(folder)
    if options:
        return options | {"method": base_method(options).lower()}
    if name := MTT_NAME.fullmatch(folder.name):
        return {"dataset": name["dataset"], "model": name["model"], "zca": bool(name["zca"])}
    known, published = _read_arguments(folder) or parse_idc_name(folder), IDC_NAME.fullmatch(folder.name)
    return known | ({"method": "dm" if published[1] == "dm" else "idc"} if published else {})


def refuse_other_making(folder, **given):
    """Refuse options that differ from those that the result in `folder` was made with, as far as it says so.

    Raises:
        UserError: one does.
    """
    folder = Path(folder)
    known = _made_with(folder)
    for option, value in given.items():
        made = known.get(option, value)
        if made != value and isinstance(value, bool):
            advice = f"give --{option}" if made else f"leave --{option} out"
            raise UserError(f"{folder}: made with{'' if made else 'out'} --{option}; {advice}")
        if made != value:
            raise UserError(f"{folder}: made with --{option} {made}, found --{option} {value}; give --{option} {made}")


def _settle(home, option, given, known):
    """Return what is `known`, else what is `given`.

    Raises:
        UserError: neither is there, or they contradict each other.
    """
    if known is None and given is None:
        raise UserError(f"{home}: neither config.json nor the folder's name says --{option}; name it")
    if None not in (known, given) and known != given:
        raise UserError(f"{home}: made with --{option} {known}, but --{option} {given} is given; leave it out")
    return given if known is None else known


def _read_arguments(folder):
    """Return the settings in args.txt: `name: value` in lines, bare or as JSON."""
    path = folder / "args.txt"
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = {}
    for name in ("dataset", "factor", "decode_type"):
        if match := re.search(rf"^\W*{name}\W+([\w-]+)", text, re.MULTILINE):
            found[name] = int(match[1]) if match[1].isdecimal() else match[1]
    return found


def parse_idc_name(folder):
    """Return the settings that the names of a published folder of PDD+IDC say: {dataset}/{options}."""
    found = {}
    dataset = re.sub(r"^imagenet\d+(-seed\d+)?$", "imagenet", folder.parent.name)
    if dataset in IDC_NAMES:
        found["dataset"] = dataset
    if IDC_NAME.fullmatch(folder.name):
        factor = FACTOR.search(folder.name)
        found |= {"factor": int(factor[1]) if factor else 1, "decode_type": (factor and factor[2]) or "single"}
    return found


def _image_shape(path):
    """Return (C, H, W) of the images in a file of results."""
    images = read_idc(path)[0] if IDC_FILE.fullmatch(path.name) else read_mtt_part(path, "images")
    return images.shape[1:]


def _info(home, path, dataset, data_path, whitened, statistics, subset, antialias=True):
    """Return the `DatasetInfo` of a result: from the files beside it, from the data, or from what is widely known.

    Args:
        home: folder of the experiment.
        path: of a file with its images.
        Others as for `datasets.load`; data_path may be None.
    """
    has_data, has_whitening = (home / DATA).exists(), whitened and (home / zca.FILE).exists()
    real = None
    if data_path and not (has_data and has_whitening == whitened):
        res = _image_shape(path)[-1] if dataset in SIZED else None
        device = torch.device("cpu")
        real = datasets.load(dataset, data_path, device, whitened, statistics, subset, res, antialias).info
    if has_data:
        info = DatasetInfo.from_json(files.read_json(home / DATA, "the description of a data set"), home / DATA)
    else:
        info = real or _known_info(home, dataset, whitened, statistics, path)
    if not has_whitening:
        return info.replace(whitening=real and real.whitening)
    stored = files.load(home / zca.FILE, "a ZCA transform")
    try:
        return info.replace(whitening=zca.restore(stored, info.channel * info.im_size**2, torch.device("cpu")))
    except UserError as error:
        raise UserError(f"{home / zca.FILE}: {error}; remove it and name --data_path") from None


def _known_info(home, dataset, whitened, statistics, path):
    """Return the `DatasetInfo` of a published result: that of its data set, classes called by their numbers."""
    count = re.fullmatch(r"imagenet(\d+)", home.parent.name)
    if dataset in KNOWN:
        info = KNOWN[dataset]
        mean, std = statistics or (info.mean, info.std)
        return info.replace(mean=mean, std=std, zca=whitened)
    if dataset != "ImageNet" or not count:
        raise UserError(f"{home}: {dataset} may be of any classes, mean and std; name its folder with --data_path")
    num_classes, (channel, im_size, _) = int(count[1]), _image_shape(path)
    names = [str(label) for label in range(num_classes)]
    return DatasetInfo(dataset, num_classes, names, channel, im_size, IMAGENET_MEAN, IMAGENET_STD, whitened)

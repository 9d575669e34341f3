"""Folders of results of both methods: their stages, and what is known of the data and options behind them.

`data.json` in the folder of an experiment describes the data set, so that its results can be used where the data are
not; with ZCA whitening, `zca.pt` holds the transform itself. Published results have neither: what their names do not
say must be given.
"""

import dataclasses
import re
from pathlib import Path

import torch

from utils import datasets, files, idc_options, zca
from utils.errors import UserError

DATA = "data.json"
WHITENING = "zca.pt"
STAGE_FOLDER = re.compile(r"interval(\d+)_epoch\d+-\d+")
UNION_FILE = re.compile(r"interval_(\d+)_data\.pt")
# Names of published experiments (see progressive.experiment_name and idc_options.folder_name).
MTT_NAME = re.compile(
    r"(?P<dataset>[^_]+)_(?P<model>.+)_(?P<eval_mode>[A-Z])_ipc(?P<ipc>\d+)_max\d+_syn\d+_.*_increase"
    r"(?P<zca>_zca)?(_.*)?"
)
IDC_NAME = re.compile(r".+_(grad|feat)_.+_ipc\d+")
FACTOR = re.compile(r"_factor(\d+)(?:_(multi|bound))?_")


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a synthetic set says of its data set.

    Attributes:
        name, num_classes, class_names, channel, im_size: as in `RealData`.
        mean, std: of pixels in [0, 1], per channel; not used with ZCA.
        zca: ZCA whitening instead of mean and std.
    """

    name: str
    num_classes: int
    class_names: list
    channel: int
    im_size: int
    mean: list
    std: list
    zca: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a distillation on disk.

    Attributes:
        method: PDD+MTT or PDD+IDC.
        folder: of the experiment.
        stages: {stage (from 1): its folder (MTT) or file (IDC)}.
        space: `Space`.
        options, versions: dicts of config.json, empty where there is none.
        factor, decode_type: of IDC's multi-formation.
    """

    method: str
    folder: Path
    stages: dict
    space: "Space"
    options: dict
    versions: dict
    factor: int = 1
    decode_type: str = "single"


class Space:
    """The space in which networks see pictures: normalised or whitened.

    Args:
        facts: `DataFacts`.
        whitening: what `zca.state` returns, the inverse left out where nobody needs it; None where it is not known.
    """

    def __init__(self, facts, whitening=None):
        self.facts, self.whitening = facts, whitening

    @property
    def transform(self):
        """The torchvision transform of pictures in [0, 1], (C, H, W) or (N, C, H, W), into network space.

        Raises:
            UserError: the set is whitened and nobody knows how.
        """
        from torchvision.transforms import v2  # seconds, and not needed to train

        if not self.facts.zca:
            return v2.Normalize(self.facts.mean, self.facts.std)
        self._refuse_unknown()
        return v2.LinearTransformation(self.whitening["transform_matrix"], self.whitening["mean_vector"].view(-1))

    def _refuse_unknown(self):
        if self.whitening is None:
            raise UserError(
                f"these pictures are whitened and neither {WHITENING} nor the data set says how; name the folder of "
                f"{self.facts.name} with --data_path (data_path=… in Python)"
            )

    def to_pixels(self, images):
        """Return network-space `images` (N, C, H, W) as pixels, 0 to 1 where they are real pictures.

        Raises:
            UserError: the set is whitened and nobody knows how.
        """
        if self.facts.zca:
            self._refuse_unknown()
            return zca.restore(self.whitening, images[0].numel(), images.device).inverse_transform(images)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.facts.mean, self.facts.std))
        return images * std + mean


def describe(real):
    """Return the `DataFacts` of `RealData`."""
    mean, std = (list(values) for values in real.statistics)
    whitened = real.whitening is not None
    names = [str(name) for name in real.class_names]
    return DataFacts(real.name, real.num_classes, names, int(real.channel), int(real.im_size), mean, std, whitened)


def save_facts(folder, real):
    """Write data.json and, with ZCA, zca.pt into the folder of an experiment, once."""
    folder = Path(folder)
    if not (folder / DATA).exists():
        files.write_json(folder / DATA, dataclasses.asdict(describe(real)))
    if real.whitening is not None and not (folder / WHITENING).exists():
        files.save(folder / WHITENING, zca.state(real.whitening))


def read_facts(found, where):
    """Return the `DataFacts` in a JSON object `found`.

    Raises:
        UserError: it is none; the message begins with `where`.
    """
    try:
        return DataFacts(**found)
    except TypeError:
        raise UserError(f"{where}: expected the description of a data set, found something else") from None


def stage_folders(experiment):
    """Return {stage: [folders]} of an experiment of PDD+MTT."""
    found = {}
    for folder in sorted(Path(experiment).iterdir()):
        if match := STAGE_FOLDER.fullmatch(folder.name):
            found.setdefault(int(match[1]), []).append(folder)
    return found


def find(folder, dataset=None, data_path=None, whitened=None, factor=None, decode_type=None):
    """Find out what lies in `folder`.

    Args:
        folder: of an experiment or of one stage of PDD+MTT, or of a result of PDD+IDC.
        dataset: its name, where nothing in the folder says it.
        data_path: folder of the data set: where the folder says nothing of it, it is read there.
        whitened: True for ZCA, where nothing says it.
        factor, decode_type: of IDC's images, where nothing says it.

    Returns:
        `Result`.

    Raises:
        UserError: it is none of these, a stage is missing, or something is unknown or contradicts what is given.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of results, found {'a file' if folder.exists() else 'none'}")
    unions = {int(m[1]) + 1: path for path in folder.iterdir() if (m := UNION_FILE.fullmatch(path.name))}
    if unions:
        return _find_idc(folder, unions, dataset, data_path, factor, decode_type)
    stages = {stage: found for stage, found in stage_folders(folder).items() if (found[0] / "images_best.pt").exists()}
    home = folder
    if stages:
        doubled = next((stage for stage in stages if len(stages[stage]) > 1), None)
        if doubled:
            raise UserError(f"{folder}: expected one folder interval{doubled}_epoch…, found {len(stages[doubled])}")
        stages = {stage: found[0] for stage, found in stages.items()}
        _refuse_gaps(folder, stages)
    elif (folder / "images_best.pt").exists():
        own = STAGE_FOLDER.fullmatch(folder.name)
        stages, home = ({int(own[1]): folder}, folder.parent) if own else ({1: folder}, folder)
    else:
        raise UserError(
            f"{folder}: expected a result (interval{{p}}_epoch…/images_best.pt, images_best.pt or "
            "interval_{i}_data.pt) or an export of one (distilled.json), found none"
        )
    return _find_mtt(home, stages, dataset, data_path, whitened)


def _refuse_gaps(folder, stages):
    for stage in range(1, max(stages) + 1):
        if stage not in stages:
            raise UserError(f"{folder}: expected stages 1 to {max(stages)}, found no stage {stage}")


def _config(home):
    """Return (options, versions) of config.json."""
    if not (home / files.CONFIG).exists():
        return {}, {}
    config = files.read_json(home / files.CONFIG, "the options of a run")
    return config.get("options") or {}, config.get("versions") or {}


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


def _find_mtt(home, stages, dataset, data_path, whitened):
    options, versions = _config(home)
    name = MTT_NAME.fullmatch(home.name)
    known = options or ({"dataset": name["dataset"], "zca": bool(name["zca"])} if name else {})
    dataset = idc_options.DATASETS.get(dataset, (dataset,))[0]
    dataset = _settle(home, "dataset", dataset, known.get("dataset"))
    whitened = _settle(home, "zca", whitened, known.get("zca"))
    first = stages[min(stages)] / "images_best.pt"
    space = _space(home, dataset, data_path, whitened, None, options.get("subset"), lambda: _peek(first))
    return Result("PDD+MTT", home, stages, space, options, versions)


def _find_idc(folder, unions, dataset, data_path, factor, decode_type):
    _refuse_gaps(folder, unions)
    options, versions = _config(folder)
    known = options or _arguments(folder) or _idc_name(folder)
    dataset = next((name for name, (other, *_) in idc_options.DATASETS.items() if other == dataset), dataset)
    dataset = _settle(folder, "dataset", dataset, known.get("dataset"))
    factor = _settle(folder, "factor", factor, known.get("factor"))
    decode_type = _settle(folder, "decode_type", decode_type, known.get("decode_type"))
    statistics = idc_options.STATISTICS.get(dataset)
    name = idc_options.DATASETS.get(dataset, (dataset,))[0]
    subset = f"imagenet{options['nclass']}" if "nclass" in options else folder.parent.name
    space = _space(folder, name, data_path, False, statistics, subset, lambda: _peek(unions[1]))
    return Result("PDD+IDC", folder, unions, space, options, versions, factor, decode_type)


def _arguments(folder):
    """Return the settings in args.txt: `name: value` in lines, bare or as JSON."""
    path = folder / "args.txt"
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = {}
    for name in ("dataset", "factor", "decode_type"):
        if match := re.search(rf"^\W*{name}\W+([\w-]+)", text, re.MULTILINE):
            found[name] = int(match[1]) if match[1].isdecimal() else match[1]
    return found


def _idc_name(folder):
    """Return the settings that the names of published folders say: {dataset}/{options}."""
    found = {}
    dataset = re.sub(r"^imagenet\d+$", "imagenet", folder.parent.name)
    if dataset in idc_options.DATASETS:
        found["dataset"] = dataset
    if IDC_NAME.fullmatch(folder.name):
        factor = FACTOR.search(folder.name)
        found |= {"factor": int(factor[1]) if factor else 1, "decode_type": (factor and factor[2]) or "single"}
    return found


def _peek(path):
    """Return the pictures of a file of results."""
    value = files.load(path, "synthetic pictures")
    images = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise UserError(f"{path}: expected pictures (N, C, H, W), found something else; make it anew")
    return images


def _space(home, dataset, data_path, whitened, statistics, subset, peek):
    """Return the `Space` of a result: from the files beside it, from the data set, or from what everybody knows."""
    facts, whitening = None, None
    if (home / DATA).exists():
        facts = read_facts(files.read_json(home / DATA, "the description of a data set"), home / DATA)
    if whitened and (home / WHITENING).exists():
        whitening = _whitening(home / WHITENING)
    if data_path and (facts is None or (whitened and whitening is None)):
        res = peek().shape[-1] if dataset in datasets.SIZED else None
        real = datasets.load(dataset, data_path, torch.device("cpu"), whitened, statistics, subset, res)
        facts = facts or describe(real)
        whitening = zca.state(real.whitening) if whitened else None
    return Space(facts or _common_facts(home, dataset, whitened, statistics, peek), whitening)


def _whitening(path):
    found = files.load(path, "a ZCA transform")
    names = ("mean_vector", "transform_matrix", "transform_inv")
    good = isinstance(found, dict) and all(isinstance(found.get(name), torch.Tensor) for name in names)
    if good:
        size = found["mean_vector"].numel()
        good = all(tuple(found[name].shape) == (size, size) for name in names[1:])
    if not good:
        raise UserError(f"{path}: expected a ZCA transform, found something else; remove it and name --data_path")
    return found


def _common_facts(home, dataset, whitened, statistics, peek):
    """Return the `DataFacts` of a published result: those of its data set, classes called by their numbers."""
    statistics = statistics or datasets.STATISTICS.get(dataset)
    count = re.fullmatch(r"imagenet(\d+)", home.parent.name)
    if kind := datasets.KINDS.get(dataset):
        num_classes, channel, im_size = kind.num_classes, kind.channel, kind.im_size
    elif statistics and count:
        num_classes, (channel, im_size) = int(count[1]), peek().shape[1:3]
    else:
        raise UserError(f"{home}: {dataset} may be of any classes, mean and std; name its folder with --data_path")
    names = [str(label) for label in range(num_classes)]
    mean, std = (list(values) for values in statistics)
    return DataFacts(dataset, num_classes, names, channel, im_size, mean, std, whitened)

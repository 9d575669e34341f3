"""Where results lie: folder names in the grammar of the published code, and the summary of each finished stage."""

import itertools
import re
from pathlib import Path

from ..run import files
from ..run.errors import UserError
from ..run.log import log0

STAGE_FILE, LOG = "stage.json", "metrics.jsonl"
MEASURED_ON = {"test": "test", "val": "held-out"}  # accuracies by --select_on
STAGE_FOLDER = re.compile(r"interval(\d+)_epoch\d+-\d+")


def stage_ipcs(ipc, stages):
    """Return how many images of each class every stage learns, a list; `ipc` is one number for all, or such a list."""
    return list(ipc) if isinstance(ipc, (list, tuple)) else [ipc] * stages


def mtt_experiment(config):
    """Return the folder name of a PDD+MTT experiment with the options `config` (a dict)."""
    ipc = "-".join(map(str, stage_ipcs(config["ipc"], 1)))
    name = (
        "{dataset}_{model}_{eval_mode}_ipc{ipc}_max{max_start_epoch}_syn{syn_steps}_real{expert_epochs}"
        "_img{lr_img}_{lr_lr}_{lr_teacher}_increase"
    ).format(**config | {"ipc": ipc})
    return name + ("_zca" if config["zca"] else "") + (f"_{config['tag']}" if config["tag"] else "")


def mtt_stage(experiment, stage, stages, max_start_epoch):
    """Return the folder of stage `stage` (1 to `stages`); with one stage it is the experiment's own."""
    if stages == 1:
        return Path(experiment)
    return Path(experiment) / f"interval{stage}_epoch{(stage - 1) * max_start_epoch + 1}-{stage * max_start_epoch}"


def mtt_stages(experiment):
    """Return {stage: [folders]} of a PDD+MTT experiment."""
    found = {}
    for folder in sorted(Path(experiment).iterdir()):
        if match := STAGE_FOLDER.fullmatch(folder.name):
            found.setdefault(int(match[1]), []).append(folder)
    return found


def find_mtt_stages(experiment, stages, names=None):
    """Return the folders of the first `stages` stages of an experiment, found by their names, not by options.

    Args:
        experiment: folder.
        stages: how many (num_intervals); with a note if there are more.
        names: folder names instead of those that are found.

    Raises:
        UserError: one is missing or not finished.
    """
    experiment = Path(experiment)
    if not experiment.is_dir():
        raise UserError(
            f"{experiment}: expected the folder of a distillation, found none; give the options it was made with, or "
            "its name with --override_load_path"
        )
    if names:
        if len(names) != stages:
            raise UserError(
                f"--override_interval_names: expected {stages} names joined by dots (num_intervals), found {len(names)}"
            )
        folders = [experiment / name for name in names]
        for folder in folders:
            if (folder / LOG).exists() and not mtt_learned(folder):
                raise UserError(f"{folder}: expected a finished stage, found it interrupted; continue its distillation")
        return folders
    found = mtt_stages(experiment) or {1: [experiment]}  # a single stage is in the experiment's own folder
    if doubled := next((stage for stage in range(1, stages + 1) if len(found.get(stage, [])) > 1), None):
        raise UserError(
            f"{experiment}: expected one folder interval{doubled}_epoch…, found {len(found[doubled])}; name the "
            "folders with --override_interval_names"
        )
    learned = [stage for stage, (folder, *_) in found.items() if mtt_learned(folder)]
    check_stages(experiment, learned, stages)
    return [found[stage][0] for stage in range(1, stages + 1)]


def mtt_learned(folder):
    """True if the stage of PDD+MTT in `folder` has learned its subset."""
    return is_learned(folder / STAGE_FILE, folder / "images_best.pt", folder / LOG)


def is_learned(summary, data, log):
    """True if the files of a stage say that it has learned its subset; a published one has `data` alone."""
    return summary.exists() or (data.exists() and not log.exists())


def check_stages(folder, learned, stages):
    """Compare the stages of a result that are `learned` with how many are to be evaluated; notes those left out.

    Raises:
        UserError: there are fewer.
    """
    count = next(stage for stage in itertools.count() if stage + 1 not in learned)
    if not learned and not (Path(folder) / files.CONFIG).exists():
        raise UserError(
            f"{folder}: expected the folder of a distillation with {stages} finished stages, found no stage; give the "
            "options it was made with, or its folder with --override-load-dir (MTT: its name with --override_load_path)"
        )
    if count < stages:
        advice = f", or evaluate what is there with --num_intervals {count}" if count else ""
        found = f"stages 1 to {count}" if count > 1 else "stage 1 alone" if count else "no stage 1"
        raise UserError(
            f"{folder}: expected {stages} finished stages, found {found}; finish with the same distillation "
            f"command{advice}"
        )
    if count > stages:
        log0(f"note: {folder}: evaluating {stages} of {count} stages; --num_intervals {count} evaluates all")


def read_mtt_stage(folder):
    """Return the summary of a stage that has learned its subset, {} before.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / STAGE_FILE
    holds = {"select_on": str, "best_accuracy": (int, float), "best_iteration": int, "complete": bool}
    return files.read_json(path, "the summary of a finished stage", holds) if path.exists() else {}


def idc_model(config, old=False):
    """Return the network's part of a PDD+IDC folder name: conv3in, resnet10apin, …

    Args:
        config: dict of options.
        old: as earlier versions of this project spelled it.
    """
    norms = {"instance": "in", "batch": "bn", "sn": "sn", "none": "none"} if old else {"instance": "in"}
    kinds = {"convnet": "conv{depth}", "resnet": "resnet{depth}", "resnet_ap": "resnet{depth}ap"}
    kind = kinds.get(config["net_type"], config["net_type"]).format(**config)
    return kind + norms.get(config["norm_type"], "") + ("" if config["width"] == 1 else f"_w{config['width']}")


def idc_folder(config, old=False):
    """Return the name of a PDD+IDC result's folder by the published tag grammar.

    Args:
        config: dict of options.
        old: as earlier versions of this project spelled it.
    """
    c = config
    many = f"_{c['pt_num']}" if c["pt_num"] > 1 else ""
    parts = (
        (idc_model(c, old), True),
        (c["tag"], c["tag"]),
        (f"f{c['f_idx']}" if c["match"] == "feat" and not old else c["match"], True),
        ("b", c["bias"]),
        ("fc", c["fc"]),
        (c["metric"], True),
        (f"pt{c['pt_from']}{many}", c["pt_from"] >= 0),
        (f"fix{c['fix_iter']}", c["fix_iter"] > 0),
        (f"ely{c['early']}", c["early"] > 0),
        (f"nd{c['n_data']}", c["n_data"] > 0),
        (f"inloop{c['inner_loop']}", c["n_data"] > 0 and c["inner_loop"] != 100),
        ("cut", c["mixup_net"] == "cut"),
        (f"nlr{c['lr']}", c["lr"] != 0.01),
        (f"wd{c['weight_decay']}", c["weight_decay"] != 5e-4),
        (f"niter{c['niter']}", c["niter"] != 500),
        (f"factor{c['factor']}", c["factor"] > 1 or not old),
        (c["decode_type"], (c["factor"] > 1 or not old) and c["decode_type"] != "single"),
        (c["aug_type"], c["aug_type"] != "color_crop_cutout"),
        (f"lr{c['lr_img']}", True),
        (f"mom{c['momentum']}", c["momentum"] != 0.9),
        (f"b_real{c['batch_real']}", c["batch_real"] != 64),
        (f"synmax{c['batch_syn_max']}", c["batch_syn_max"] != 128),
        (c["init"], True),
        (f"ipc{c['ipc']}", True),
    )
    return "_".join(text for text, wanted in parts if wanted)


def dm_folder(config):
    """Return the name of a PDD+DM result's folder, in the grammar of PDD+IDC's."""
    c, union = config, config["transition"] == "union"
    parts = (
        (c["model"], True),
        (c["tag"], c["tag"]),
        ("dm", True),
        (c["metric"], True),
        (f"a{c['cf_alpha']}", c["metric"] == "cf" and c["cf_alpha"] != 0.5),
        (f"cal{c['calibration']}", c["calibration"] > 0),
        ("window", c["window"] == "stage" and not union),
        ("union", union),
        (f"fix{c['fix_iter']}", union and c["fix_iter"] > 0),
        (f"ely{c['early']}", union and c["early"] > 0),
        (f"nd{c['n_data']}", union),
        (f"inloop{c['inner_loop']}", union and c["inner_loop"] != 100),
        ("cut", union and c["mixup_net"] == "cut"),
        (f"nlr{c['lr']}", c["lr"] != 0.01),
        (f"wd{c['weight_decay']}", c["weight_decay"] != 5e-4),
        (f"it{c['Iteration']}", c["Iteration"] != 1000),
        (f"factor{c['factor']}", True),
        (c["decode_type"], c["decode_type"] != "single"),
        (c["aug_type"], c["aug_type"] != "color_crop_cutout"),
        (f"lr{c['lr_img']}", True),
        (f"mom{c['momentum']}", c["momentum"] != 0.9),
        (f"b_real{c['batch_real']}", c["batch_real"] != 64),
        (c["init"], True),
        (f"ipc{c['ipc']}", True),
    )
    return "_".join(text for text, wanted in parts if wanted)


LEARNED_HERE = ("MTT", "IDC", "DM")


def base_method(config):
    """Return which base method a result with the options `config` (a dict) is of: MTT, IDC, DM or another's name."""
    if config.get("slct_type", "idc") != "idc":  # not learned here: random real images, DSA, KIP
        return "random real" if config["slct_type"] == "random" else config["slct_type"].upper()
    return "DM" if "calibration" in config else "IDC" if "factor" in config else "MTT"


def idc_summary(folder, stage):
    """Return the file that says that `stage` (from 1) of PDD+IDC is complete."""
    return Path(folder) / f"interval_{stage - 1}.json"


def read_idc_stage(folder, stage):
    """Return the summary of a complete stage (from 1); {} if there is no file: before its end, or published.

    Raises:
        UserError: the file is damaged.
    """
    path = idc_summary(folder, stage)
    return files.read_json(path, "the summary of a finished stage", {"complete": bool}) if path.exists() else {}


def dataset_title(name, subdir):
    """Return how reports call a data set: own images and parts of ImageNet by the name in their results' `subdir`."""
    return subdir.split("/")[1] if "/" in subdir else subdir if name == "ImageNet" else name


def idc_stages(folder):
    """Return the stages (from 1) of a PDD+IDC result that have learned their subsets."""
    return list(itertools.takewhile(lambda stage: idc_learned(folder, stage), itertools.count(1)))


def idc_learned(folder, stage):
    """True if `stage` (from 1) of a PDD+IDC result has learned its subset."""
    data, log = (Path(folder) / f"interval_{stage - 1}_{end}" for end in ("data.pt", "metrics.jsonl"))
    return is_learned(idc_summary(folder, stage), data, log)


def selection(config):
    """Return what a stage's summary says of the images that its accuracies were measured on."""
    held_out = {"val_fraction": config["val_fraction"]} if config["select_on"] == "val" else {}
    return {"select_on": config["select_on"], **held_out}


def selected_on(summaries):
    """Return the `select_on` of a report: test, val, unknown, or several of them joined by commas.

    Args:
        summaries: of the stages, {} for published results.
    """
    return ", ".join(sorted({known.get("select_on", "unknown") for known in summaries}))

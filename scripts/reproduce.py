"""Reproduce a row of the paper's tables: experts, distillation in stages, evaluation, one after the other.

    python scripts/reproduce.py --list                              # all rows: steps, memory, disk
    python scripts/reproduce.py cifar10-mtt-ipc10                   # PDD+MTT, 10 images per class in 5 stages of 2
    python scripts/reproduce.py cifar10-mtt-ipc10-oneshot           # its base method: the same images in one stage
    python scripts/reproduce.py cifar10-mtt-ipc10 --scale small     # a reduced version for a CPU
    python scripts/reproduce.py cifar10-mtt-ipc10 --preset datm     # with soft labels and windows that widen
    python scripts/reproduce.py cifar10-mtt-ipc10 --buffer_path buffers/seed1 -- --seed 1 --tag seed1

Each step's command is printed before it runs. Options after -- go to every script of the row that knows them. The same
command again continues an interrupted row; steps that are done say so. Random real images and the full training set
are rows of every evaluation.
"""

import argparse
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_mtt
from utils import options, sizes
from utils.data.info import IDC_NAMES, KNOWN
from utils.run import errors, files

PROJECT = Path(__file__).resolve().parent.parent
STAGES = 5
ONESHOT, CROSS = "-oneshot", "-cross"
ARCHITECTURES = "self,AlexNet,VGG11,ResNet18"

# The published commands, {row: {option: value}}. Every script of a row gets the options that it declares, so that
# experts, distillation and evaluation agree. A row -ipcN learns N images per class in `STAGES` stages; its -oneshot row
# learns them in one, with the same options otherwise; its -cross row evaluates with `ARCHITECTURES`.
CIFAR = {"model": "ConvNet", "zca": True, "lr_img": 1000, "lr_teacher": 0.01, "train_epochs": 50}
CIFAR10, CIFAR100 = {"dataset": "CIFAR10", **CIFAR}, {"dataset": "CIFAR100", **CIFAR}
LARGE = {"expert_epochs": 2, "lr_lr": 1e-05, "batch_syn": 512, "kept_steps": 0}
TINY = {
    "dataset": "Tiny", "data_path": "data/tiny-imagenet-200", "model": "ConvNetD4", "lr_img": 10000, "lr_teacher": 0.01,
    "train_epochs": 24, "syn_steps": 20, "expert_epochs": 2, "max_start_epoch": 20, "lr_lr": 1e-04, "batch_syn": 64,
}  # fmt: skip
DM = {
    "model": "ConvNet", "factor": 2, "lr_teacher": 0.02, "mom": 0.9, "num_experts": 5, "train_epochs": 20,
    "metric": "cf", "calibration": 0.5, "buffer_path": "buffers/dm", "method": "dm",
}  # fmt: skip
TINY_FOLDERS = dict.fromkeys(("data_path", "data_dir"), "data/tiny-imagenet-200")
PRESETS = {
    "cifar10-mtt-ipc10": CIFAR10 | {"syn_steps": 50, "expert_epochs": 2, "max_start_epoch": 5, "lr_lr": 1e-07},
    "cifar10-mtt-ipc50": CIFAR10 | {"syn_steps": 30, "expert_epochs": 2, "max_start_epoch": 15, "lr_lr": 1e-05},
    "cifar100-mtt-ipc10": CIFAR100 | {"syn_steps": 20, "expert_epochs": 3, "max_start_epoch": 20, "lr_lr": 1e-05},
    "cifar100-mtt-ipc50": CIFAR100 | {
        "syn_steps": 20, "expert_epochs": 2, "max_start_epoch": 20, "lr_lr": 1e-05, "batch_syn": 512,
    },
    "tiny-mtt-ipc10": TINY,
    "tiny-mtt-ipc50": TINY,
    # Considerably larger sets, which the paper describes and the release has no settings for: those of 50 images per
    # class, in constant memory.
    "cifar10-mtt-ipc100": CIFAR10 | LARGE | {"syn_steps": 30, "max_start_epoch": 15},
    "cifar10-mtt-ipc200": CIFAR10 | LARGE | {"syn_steps": 30, "max_start_epoch": 15},
    "cifar100-mtt-ipc100": CIFAR100 | LARGE | {"syn_steps": 20, "max_start_epoch": 20},
    "cifar100-mtt-ipc200": CIFAR100 | LARGE | {"syn_steps": 20, "max_start_epoch": 20},
    "cifar10-idc-ipc10": {"reproduce": True, "dataset": "cifar10", "factor": 2, "niter": 2000},
    "cifar10-idc-ipc50": {"reproduce": True, "dataset": "cifar10", "factor": 2, "niter": 2000},
    "cifar100-idc-ipc10": {"reproduce": True, "dataset": "cifar100", "factor": 2, "niter": 2000},
    "cifar100-idc-ipc50": {"reproduce": True, "dataset": "cifar100", "factor": 2, "niter": 1000},
    # Not in the paper: settings of this project.
    "cifar10-dm-ipc10": DM | {"dataset": "cifar10"},
    "cifar10-dm-ipc50": DM | {"dataset": "cifar10"},
    "cifar100-dm-ipc10": DM | {"dataset": "cifar100"},
    "cifar100-dm-ipc50": DM | {"dataset": "cifar100"},
    "tiny-dm-ipc10": DM | TINY_FOLDERS | {"dataset": "tiny-imagenet", "model": "ConvNetD4"},
    "tiny-dm-ipc50": DM | TINY_FOLDERS | {"dataset": "tiny-imagenet", "model": "ConvNetD4"},
}  # fmt: skip

# --scale small changes these. The one-shot rows of MTT and DM make as many iterations as the stages of the PDD row
# together; MTT's on minibatches of the same size, so that every image takes part in as many steps. IDC's makes as many
# as one stage, as published, which also moves every image as often; its learning rate grows with the images of a stage,
# so that one image moves as far in both only if the one-shot row's is set so much lower.
SMALL = {
    "mtt": {
        "model": "ConvNetW32", "zca": False, "lr_teacher": 0.02, "lr_lr": 1e-05, "batch_syn": 20, "syn_steps": 20,
        "expert_epochs": 1, "max_start_epoch": 2, "Iteration": 200, "eval_it": 100, "override_epoch_eval_train": 100,
        "train_epochs": 3, "buffer_path": "buffers/small",
    },
    "idc": {"width": 0.25, "niter": 2, "inner_loop": 20, "n_data": 500, "lr_img": 0.25, "epochs": 100, "print-freq": 1,
        "eval_models": "self"},
    "dm": {"model": "ConvNetW32", "num_experts": 2, "train_epochs": 8, "Iteration": 400, "epochs": 200,
        "eval_models": "self", "buffer_path": "buffers/small/dm"},
}  # fmt: skip
SMALL_ONESHOT = {
    "mtt": {"Iteration": 200 * STAGES, "eval_it": 100 * STAGES},
    "idc": {"lr_img": 0.25 / STAGES},
    "dm": {"Iteration": 400 * STAGES},
}

SCRIPTS = {
    "mtt": ("buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py"),
    "idc": ("distill_idc.py", "evaluate_idc.py"),
    "dm": ("buffer_mtt.py", "distill_dm.py", "evaluate_idc.py"),
}
# What one script alone gets, besides.
OWN = {
    "full": {
        "evaluate_mtt.py": {"num_experts": 5, "epoch_eval_train": 500},
        "evaluate_idc.py": {"repeat": 3},
    },
    "small": {
        "buffer_mtt.py": {"num_experts": 6}, "distill_mtt.py": {"num_eval": 2},
        "evaluate_mtt.py": {"num_experts": 6, "num_eval": 3, "epoch_eval_train": 100, "full_epochs": 4},
        "evaluate_idc.py": {"repeat": 3, "checks": 5, "full_epochs": 4},
    },
}  # fmt: skip

SUCCESSORS = ("datm", "seqmatch")
ROWS = [name + end for name in PRESETS for end in ("", ONESHOT, CROSS)]
TRAIN_IMAGES = {"CIFAR10": 50_000, "CIFAR100": 50_000, "Tiny": 100_000}
NOTES = """memory: estimated for a GPU from the sizes of images, parameters and saved tensors, not measured;
if a range is given, from --kept_steps 0 to all steps kept (auto keeps what fits half of the free memory)
steps: evaluations inside a stage and the trainings of a transition come on top
time: not measured at full scale; benchmarks/RESULTS.md has that of rows at --scale small"""


# What benchmarks/breakdown.py has measured on this machine.
SPEED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdd" / "speed.json"


class Step(NamedTuple):
    """One command of a row: the script, the words of its command line, and the namespace that it makes of them."""

    script: str
    words: list
    args: argparse.Namespace


def parse(words):
    parser = options.Parser(__doc__)
    parser.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help="of the table; see --list")
    parser.add_argument("--list", action="store_true", help="print all rows, or ROW, with steps, memory and disk")
    parser.add_argument("--scale", default="full", choices=("full", "small"), help="small: ends on a CPU")
    parser.add_argument("--preset", choices=SUCCESSORS, help="a row of PDD+MTT with the ideas of DATM or SeqMatch")
    parser.add_argument("--data_path", help="folder of the data set, instead of the scripts' default")
    parser.add_argument("--buffer_path", help="root folder of the experts, instead of the scripts' default")
    parser.add_argument("--root_log_dir", help="root folder of the results, instead of logged_files or results")
    parser.add_argument("--dry_run", action="store_true", help="print the row's commands and sizes, then stop")
    args = parser.parse_args(words)
    if args.preset and "-mtt-" not in (args.row or ""):
        parser.error(f"--preset {args.preset}: expected a row of PDD+MTT, found {args.row or 'none'}")
    if not args.row and not args.list:
        parser.error("expected the name of a row, or --list")
    return args


def main():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, extra = parse(words[:end]), named(words[end + 1 :])
    rows = {row: steps_of(row, args, extra) for row in ([args.row] if args.row else ROWS)}
    refuse_unknown(extra, [step for steps in rows.values() for step in steps], args.row or "any row")
    if args.dry_run and not args.list:
        print(*map(command, rows[args.row]), sep="\n")
    if args.list or args.dry_run:
        print(table(rows, args.scale, timed=not (extra or args.preset)))
        return
    for step in rows[args.row]:
        print(f"$ {command(step)}", flush=True)
        if status := run([sys.executable, PROJECT / step.script, *step.words]):
            sys.exit(status)


def named(words):
    """Return the options in `words` as {name: words of its value}.

    Raises:
        UserError: a word stands before any long option.
    """
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            found[name] = value
        elif name:
            found[name].append(word)
        else:
            raise errors.UserError(f"expected an option like --seed after --, found {word!r}; spell options out")
    return found


def successor(preset, options, stages):
    """Return the options that add the ideas of DATM or SeqMatch to a row of PDD+MTT; not their authors' settings.

    DATM learns soft labels and widens the window of start epochs from easy to hard. SeqMatch gives each subset a later
    part of the trajectories, and a learning rate of its own in evaluation.
    """
    last, steps = options["max_start_epoch"], range(stages)
    begins, ends = [last * step // stages for step in steps], [-(-last * (step + 1) // stages) for step in steps]
    if preset == "datm":
        begins, own = [0] * stages, {"soft_labels": True, "grow_start_epoch": options.get("Iteration", 5000) // 2}
    else:
        own = {"stage_lr": ",".join(f"{1 - step / stages:g}" for step in steps)}
    return own | {"start_epochs": ",".join(f"{begin}:{end}" for begin, end in zip(begins, ends, strict=True))}


def presets(row, scale, preset=None):
    """Return {script: {option: value}} of a row; not every script declares all of them."""
    oneshot, cross, small = row.endswith(ONESHOT), row.endswith(CROSS), scale == "small"
    name = row.removesuffix(ONESHOT).removesuffix(CROSS)
    method, stages = name.split("-")[1], 1 if oneshot else STAGES
    kind = "oneshot" if oneshot else "progressive" if method != "mtt" else ""
    tag = "_".join(filter(None, ("small" if small else "", kind, preset)))
    shared = {"ipc": int(name.rpartition("ipc")[2]) // stages, "num_intervals": stages}
    shared |= ({"tag": tag} if tag else {}) | PRESETS[name]
    if small:
        shared |= SMALL[method] | (SMALL_ONESHOT[method] if oneshot else {})
    if preset:
        shared |= successor(preset, shared, stages)
    if cross:
        shared["eval_models"] = ARCHITECTURES
    found = {script: shared | OWN[scale].get(script, {}) for script in SCRIPTS[method]}
    if method == "dm":
        found["buffer_mtt.py"] = shared | {"dataset": IDC_NAMES[shared["dataset"]]}
    return found


def steps_of(row, args, extra):
    """Return the `Step`s of a row.

    Args:
        row: name.
        args: this script's options.
        extra: what `named` returned; a script that does not know an option goes without.
    """
    folders = dict.fromkeys(("data_path", "data_dir"), args.data_path) | {"buffer_path": args.buffer_path}
    folders |= dict.fromkeys(("root_log_dir", "save_path", "results"), args.root_log_dir)
    folders = {name: folder for name, folder in folders.items() if folder}
    steps = []
    for script, preset in presets(row, args.scale, args.preset).items():
        first = ["--ipc", "1"] if script not in SCRIPTS["mtt"] else []
        method = ["--method", "dm"] if script == "evaluate_idc.py" and "-dm-" in row else []
        declared = vars(options_of(script, [*first, *method]))
        words = []
        for name, value in (preset | folders | extra).items():
            if name.replace("-", "_") in declared and value is not False:
                words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [str(value)])]
        steps.append(Step(script, words, options_of(script, words)))
    return steps


def refuse_unknown(extra, steps, what):
    """Refuse options of `extra` that none of `steps` knows; `what` is the name of these steps together.

    Raises:
        UserError: there is such an option.
    """
    known = {name for step in steps for name in vars(step.args)}
    if unknown := [name for name in extra if name.replace("-", "_") not in known]:
        raise errors.UserError(f"no script of {what} knows --{unknown[0]}; spell options out as their --help does")


def options_of(script, words):
    """Return what `script` makes of the command line `words`, all defaults and presets in it."""
    before, sys.argv = sys.argv, [script, *words]
    try:
        return importlib.import_module(Path(script).stem).parse()
    finally:
        sys.argv = before


def command(step):
    """Return the command of a step as a person types it here."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    script = step.script if Path.cwd() == PROJECT else str(PROJECT / step.script)
    return shlex.join([python, script, *step.words])


def measured_speed():
    """Return {"ROW SCALE": {"on": device, "seconds": {script: seconds}}}, empty if nothing was measured."""
    return files.read_json(SPEED, "what benchmarks/breakdown.py measured") if SPEED.exists() else {}


def table(rows, scale, timed=True):
    """Return the text table of {row: list of `Step`s}; if `timed`, with the times measured on this machine."""
    lines, speed, machines = [], measured_speed() if timed else {}, set()
    for row, steps in rows.items():
        times = speed.get(f"{row} {scale}", {"seconds": {}})
        machines.update({times["on"]} if "on" in times else ())
        for step, size in zip(steps, sizes_of(steps), strict=True):
            memory = " to ".join(dict.fromkeys(files.human_bytes(value) for value in size.memory()))
            time = f"{times['seconds'][step.script] / 3600:.3g} h" if step.script in times["seconds"] else ""
            lines.append((row, step.script, size.steps, memory, files.human_bytes(size.disk), time))
            row = ""
    head, notes = ["row", "script", "steps", "memory", "disk", "time"], NOTES
    if machines:
        notes += f"\ntime: estimated by benchmarks/breakdown.py on this machine ({'; '.join(sorted(machines))})"
    else:
        head, lines = head[:-1], [line[:-1] for line in lines]
    return tabulate(lines, head, disable_numparse=True) + f"\n\n{notes}"


def sizes_of(steps):
    """Return the `sizes.Size` of each of a row's steps.

    Raises:
        UserError: the data set is none of the paper's.
    """
    first = steps[0].args
    name = getattr(first, "data", first.dataset)
    if name not in TRAIN_IMAGES:
        raise errors.UserError(f"--dataset {name}: sizes are known for {', '.join(TRAIN_IMAGES)}; leave --dry_run out")
    data, pool_of = (KNOWN[name], TRAIN_IMAGES[name]), evaluate_mtt.pool_of
    found = {
        "buffer_mtt.py": lambda args: sizes.experts(vars(args), *data),
        "distill_mtt.py": lambda args: sizes.mtt_distillation(vars(args), *data, first.num_experts),
        "evaluate_mtt.py": lambda args: sizes.mtt_evaluation(vars(args), *data, pool_of(args)),
        "distill_dm.py": lambda args: sizes.dm_distillation(vars(args), *data),
        "distill_idc.py": lambda args: sizes.idc_distillation(vars(args), *data),
        "evaluate_idc.py": lambda args: sizes.idc_evaluation(vars(args), *data),
    }
    return [found[step.script](step.args) for step in steps]


def run(words):
    """Run a command in a process group of its own: a Ctrl-C reaches it once, passed on by this process.

    Returns:
        Its exit status; 128 + n if signal n ended it, or if it ended well after this process got signal n.
    """
    received, child = [], None

    def pass_on(number, _frame):
        received.append(number)
        if child:
            child.send_signal(number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    heard = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, pass_on) for number in heard}
    child = subprocess.Popen(words, process_group=0)
    if received:  # while it started
        child.send_signal(received[-1])
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status == 0 and received:
        status = -received[-1]
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    errors.run(main)

"""Reproduce a row of the paper's tables: experts, distillation in stages, evaluation, one after the other.

    python scripts/reproduce.py --list                              # all rows: steps, memory, disk
    python scripts/reproduce.py cifar10-mtt-ipc10                   # PDD+MTT, 10 images per class in 5 stages of 2
    python scripts/reproduce.py cifar10-mtt-ipc10-oneshot           # its base method: the same images in one stage
    python scripts/reproduce.py cifar10-mtt-ipc10 --scale small     # a reduced version for a CPU
    python scripts/reproduce.py cifar10-mtt-ipc10 -- --seed 1 --tag seed1

Each step's command is printed before it runs. Options after -- go to every script of the row that knows them. The same
command again continues an interrupted row; steps that are done say so. Random real pictures and the full training set
are rows of every evaluation.
"""

import argparse
import contextlib
import dataclasses
import importlib
import shlex
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_mtt
import utils.options as o
from scripts import sizes
from utils import errors, files, idc_options, report

PROJECT = Path(__file__).resolve().parent.parent

# The published commands, {option: value}. Every script of a row gets the options that it declares, so that experts,
# distillation and evaluation agree; what only one of them gets stands apart. A row -ipcN learns N images per class in
# `STAGES` stages; its -oneshot row learns them in one, by its own options otherwise.
STAGES = 5
CIFAR = {"model": "ConvNet", "zca": True, "lr_img": 1000, "lr_teacher": 0.01}
TINY = {"model": "ConvNetD4", "data_path": "data/tiny-imagenet-200", "lr_img": 10000, "lr_teacher": 0.01}
MTT = {
    "cifar10-mtt-ipc10": {
        "dataset": "CIFAR10", **CIFAR, "syn_steps": 50, "expert_epochs": 2, "max_start_epoch": 5, "lr_lr": 1e-07,
    },
    "cifar10-mtt-ipc50": {
        "dataset": "CIFAR10", **CIFAR, "syn_steps": 30, "expert_epochs": 2, "max_start_epoch": 15, "lr_lr": 1e-05,
    },
    "cifar100-mtt-ipc10": {
        "dataset": "CIFAR100", **CIFAR, "syn_steps": 20, "expert_epochs": 3, "max_start_epoch": 20, "lr_lr": 1e-05,
    },
    "cifar100-mtt-ipc50": {
        "dataset": "CIFAR100", **CIFAR, "syn_steps": 20, "expert_epochs": 2, "max_start_epoch": 20, "lr_lr": 1e-05,
        "batch_syn": 512,
    },
    "tiny-mtt-ipc10": {
        "dataset": "Tiny", **TINY, "syn_steps": 20, "expert_epochs": 2, "max_start_epoch": 20, "lr_lr": 1e-04,
        "batch_syn": 64,
    },
    "tiny-mtt-ipc50": {
        "dataset": "Tiny", **TINY, "syn_steps": 20, "expert_epochs": 2, "max_start_epoch": 20, "lr_lr": 1e-04,
        "batch_syn": 64,
    },
}  # fmt: skip
EXPERTS = {
    "CIFAR10": {"train_epochs": 50, "num_experts": 100},
    "CIFAR100": {"train_epochs": 50, "num_experts": 100},
    "Tiny": {"train_epochs": 24},
}
MTT_EVALUATION = {
    "CIFAR10": {"num_experts": 5, "epoch_eval_train": 500},
    "CIFAR100": {"num_experts": 5, "epoch_eval_train": 500},
    "Tiny": {"epoch_eval_train": 500},
}
IDC = {
    "cifar10-idc-ipc10": {"reproduce": True, "dataset": "cifar10", "factor": 2, "niter": 2000},
    "cifar10-idc-ipc50": {"reproduce": True, "dataset": "cifar10", "factor": 2, "niter": 2000},
    "cifar100-idc-ipc10": {"reproduce": True, "dataset": "cifar100", "factor": 2, "niter": 2000},
    "cifar100-idc-ipc50": {"reproduce": True, "dataset": "cifar100", "factor": 2, "niter": 1000},
}
IDC_EVALUATION = {"repeat": 3}

# --scale small changes these. MTT's one-shot row makes as many iterations as the stages of its PDD row together, on
# minibatches of the same size, so that every image takes part in as many steps. IDC's makes as many as one stage, as
# published, which also moves every image as often; its learning rate grows with the images of a stage, so that one
# image moves as far in both only where the one-shot row's is set so much lower.
SMALL_MTT = {
    "model": "ConvNetW32", "zca": False, "lr_teacher": 0.02, "lr_lr": 1e-05, "batch_syn": 20, "syn_steps": 20,
    "expert_epochs": 1, "max_start_epoch": 2, "Iteration": 200, "eval_it": 100, "override_epoch_eval_train": 100,
    "buffer_path": "buffers/small",
}  # fmt: skip
SMALL_EXPERTS = {"train_epochs": 3, "num_experts": 6}
SMALL_DISTILLATION = {"num_eval": 2}
SMALL_MTT_EVALUATION = {"num_experts": 6, "num_eval": 3, "epoch_eval_train": 100, "full_epochs": 4}
SMALL_IDC = {
    "width": 0.25, "niter": 2, "inner_loop": 20, "n_data": 500, "lr_img": 0.25, "epochs": 100, "print-freq": 1,
}  # fmt: skip
SMALL_IDC_EVALUATION = {"repeat": 3, "eval_models": "self", "full_epochs": 4}

ONESHOT = "-oneshot"
ROWS = [name + end for name in (*MTT, *IDC) for end in ("", ONESHOT)]


def parse(words):
    parser = o.Parser(__doc__)
    parser.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help="of the table; see --list")
    parser.add_argument("--list", action="store_true", help="print all rows, or ROW, with steps, memory and disk")
    parser.add_argument("--scale", default="full", choices=("full", "small"), help="small: ends on a CPU")
    parser.add_argument("--data_path", help="folder of the data set, instead of the scripts' default")
    parser.add_argument("--buffer_path", help="root folder of the experts, instead of the scripts' default")
    parser.add_argument("--root_log_dir", help="root folder of the results, instead of logged_files or results")
    parser.add_argument("--dry_run", action="store_true", help="print the row's commands and sizes, then stop")
    options = parser.parse_args(words)
    if not options.row and not options.list:
        parser.error("expected the name of a row, or --list")
    return options


def main():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, extra = parse(words[:end]), named(words[end + 1 :])
    rows = {row: steps_of(row, options, extra) for row in ([options.row] if options.row else ROWS)}
    if options.dry_run and not options.list:
        for step in rows[options.row]:
            print(step.command())
    if options.list or options.dry_run:
        print(sizes.table(rows))
        return
    for step in rows[options.row]:
        step.run()


def named(words):
    """Return the options in `words` as {name: words of its value, True for a flag}.

    Raises:
        UserError: a word stands before any long option.
    """
    found = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else True
        elif not found:
            raise errors.UserError(f"expected an option like --seed after --, found {word!r}; spell options out")
        else:
            name, value = found.popitem()
            found[name] = [*([] if value is True else value), word]
    return found


def presets(row, scale):
    """Return what a row's scripts get: ({option: value} of all, {script: {option: value}} of one alone)."""
    name, oneshot, small = row.removesuffix(ONESHOT), row.endswith(ONESHOT), scale == "small"
    method, total = name.split("-")[1], int(name.rpartition("ipc")[2])
    stages = 1 if oneshot else STAGES
    kind = "oneshot" if oneshot else "progressive" if method == "idc" else ""
    tag = "_".join(["small"] * small + [kind] * bool(kind))
    both = {"ipc": total // stages} | ({"tag": tag} if tag else {})
    if method == "idc":
        both |= {**IDC[name], "num-intervals": stages} | (SMALL_IDC if small else {})
        if small and oneshot:
            both["lr_img"] /= STAGES
        return both, {"distill_idc.py": {}, "evaluate_idc.py": SMALL_IDC_EVALUATION if small else IDC_EVALUATION}
    dataset = MTT[name]["dataset"]
    both |= {**MTT[name], "num_intervals": stages} | (SMALL_MTT if small else {})
    if small and oneshot:
        both |= {key: both[key] * STAGES for key in ("Iteration", "eval_it")}
    return both, {
        "buffer_mtt.py": SMALL_EXPERTS if small else EXPERTS[dataset],
        "distill_mtt.py": SMALL_DISTILLATION if small else {},
        "evaluate_mtt.py": SMALL_MTT_EVALUATION if small else MTT_EVALUATION[dataset],
    }


def steps_of(row, given, extra):
    """Return the `Step`s of a row.

    Args:
        row: name.
        given: this script's options.
        extra: what `named` returned.

    Raises:
        UserError: no script of the row knows an option of `extra`.
    """
    both, alone = presets(row, given.scale)
    for names, value in (
        (("data_path", "data_dir"), given.data_path),
        (("buffer_path",), given.buffer_path),
        (("root_log_dir", "save_path", "results"), given.root_log_dir),
    ):
        both |= dict.fromkeys(names, value) if value else {}
    steps, known = [], set()
    for script, own in alone.items():
        declared = vars(options_of(script, ["--ipc", "1"] if "idc" in script else []))
        words = []
        for name, value in {**both, **own, **extra}.items():
            if name.replace("-", "_") in declared and value is not False:
                words += [f"--{name}", *([] if value is True else value if isinstance(value, list) else [str(value)])]
                known.add(name)
        steps.append(Step(script, words, options_of(script, words)))
    if unknown := extra.keys() - known:
        raise errors.UserError(
            f"no script of {row} knows --{min(unknown)}; see the --help of {', '.join(alone)} and spell options out"
        )
    return steps


@contextlib.contextmanager
def command_line(script, words):
    """Import `script`; inside, it sees `words` as its command line."""
    before, sys.argv = sys.argv, [script, *words]
    try:
        yield importlib.import_module(Path(script).stem)
    finally:
        sys.argv = before


def options_of(script, words):
    """Return what `script` makes of the command line `words`, all defaults and presets in it."""
    with command_line(script, words) as module:
        return module.parse()


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a row.

    Attributes:
        script: of the project.
        words: its command line.
        options: what the script makes of it.
    """

    script: str
    words: list
    options: argparse.Namespace

    def command(self):
        """Return the command as a person types it here."""
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        script = PROJECT / self.script
        script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
        return shlex.join([python, str(script), *self.words])

    def run(self):
        """Run the script in this process, so that signals reach it and its exit status is this one's."""
        print(f"$ {self.command()}", flush=True)
        if done := self.evaluated():
            print(report.table(done) + f"\n{self.script}: done already")
            return
        # The script before may have left its handlers; until this one sets its own, a signal ends the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with command_line(self.script, self.words) as module:
            module.main()

    def evaluated(self):
        """Return the report of an evaluation that was done with these options; None without one."""
        if self.script == "evaluate_mtt.py":
            folder = evaluate_mtt.experiment_folder(self.options)
        elif self.script == "evaluate_idc.py":
            folder = Path(self.options.override_load_dir or idc_options.result_folder(self.options))
        else:
            return None
        if not (folder / "report.json").exists():
            return None
        found = files.read_json(folder / "report.json", "the report of an evaluation")
        config = {key: value for key, value in found.get("config", {}).items() if key != "versions"}
        wanted = {key: value for key, value in vars(self.options).items() if key not in o.FREE}
        return found if config and all(wanted.get(key) == value for key, value in config.items()) else None


if __name__ == "__main__":
    errors.run(main)

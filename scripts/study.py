"""Run a study: rows of reproduce.py over several seeds of experts, distillation and evaluation, and one table of them.

    python scripts/study.py base-methods --scale small --jobs 2 --data_path data/cifar10-jpeg
    python scripts/study.py stages --methods mtt,idc --seeds 5 -- --device cuda

base-methods  PDD in 5 stages; one stage with as many iterations and epochs of evaluation as one of them; one stage with
              as many as all together
stages        1, 2, 5 and 10 stages, 10 images per class and the same iterations in all
experts       PDD+MTT with 3, 6, 12 and 24 experts, in 2 stages: each stage trains all of them anew
larger        10, 50 and 100 images per class, in 5 stages and in one with as many iterations

Options after -- go to every script that knows them. The same command again continues a study; studies of one --out
share what they have in common. Hours are those of the CPU, or of the clock on a GPU, with those of interrupted runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_idc
import evaluate_mtt
from scripts import reproduce
from utils.options import COUNT, RESUMABLE_CHANGES, Parser, config_of, mtt
from utils.results import compare, hours, page, seeds
from utils.run import errors, files, signals
from utils.run.log import log0, print0
from utils.trajectories import buffer_folder

ALL = reproduce.STAGES
# {study: (images per class, [(stages, share of the iterations and of the evaluation's epochs on a union)], [experts])}
# A share of 1 is what one of 5 stages makes.
STUDIES = {
    "base-methods": ([10], [(ALL, 1), (1, 1), (1, ALL)], [None]),
    "stages": ([10], [(1, ALL), (2, ALL / 2), (5, ALL / 5), (10, ALL / 10)], [None]),
    "experts": ([10], [(2, ALL / 2)], [3, 6, 12, 24]),
    "larger": ([10, 50, 100], [(ALL, 1), (1, ALL)], [None]),
}
OWN = {"seed", "tag", "ipc", "num_intervals", "buffer_path", "results", "root_log_dir", "save_path"}  # set here
EPOCHS = {"epochs", "epoch_eval_train"}  # of an evaluation on a union


def parse(words):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=STUDIES, help="which one, see above")
    parser.add_argument("--methods", help="base methods, joined by commas (default: mtt,idc,dm; experts: mtt)")
    parser.add_argument("--scale", default="full", choices=("full", "small"), help="small: ends on a CPU")
    parser.add_argument("--seeds", type=COUNT, default=3, help="seeds of the whole pipeline: 0, 1, …")
    parser.add_argument("--jobs", type=COUNT, default=1, help="scripts at the same time; several GPUs are shared out")
    parser.add_argument("--data_path", help="folder of the data set, instead of the scripts' default")
    parser.add_argument("--out", default="studies", help="folder of experts, results and tables")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, then stop")
    args = parser.parse_args(words)
    args.methods = args.methods or ("mtt" if args.name == "experts" else "mtt,idc,dm")
    if args.name == "experts" and args.methods != "mtt":
        parser.error(f"--methods {args.methods}: expected mtt, the only one of the study experts; leave it out")
    if unknown := set(args.methods.split(",")) - reproduce.SCRIPTS.keys():
        parser.error(f"--methods: expected names out of {', '.join(reproduce.SCRIPTS)}, found {min(unknown)!r}")
    return args


def main():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, extra = parse(words[:end]), reproduce.named(words[end + 1 :])
    if own := OWN & {name.replace("-", "_") for name in extra}:
        raise errors.UserError(f"--{min(own)} after --: the study gives its runs this option; leave it out")
    runs = dict(setting(*shape, args, extra) for shape in shapes_of(args))
    everything = [steps for many in runs.values() for steps in many]
    reproduce.refuse_unknown(extra, [step for steps in everything for step in steps], args.name)
    commands = commands_of(everything)
    out, kept = Path(args.out) / args.scale, settings_of(extra)
    refuse_to_replace(out / f"{args.name}.json", runs, kept)
    if args.dry_run:
        print(*(reproduce.command(step) for step, *_ in commands.values()), sep="\n")
        return
    signals.listen()
    with files.locked(out, alone=False):
        run_all(commands, args.jobs, out / "log.txt")
        for steps in everything:
            if steps[0].script == "buffer_mtt.py":  # the experts' hours, beside the result's own
                hours.copy(folder_of(steps[0]), folder_of(steps[-1]))
        folders = {label: [folder_of(steps[-1]) for steps in many] for label, many in runs.items()}
        rows = [seeds.summary(label, of_seeds) for label, of_seeds in folders.items()]
        files.write_json(out / f"{args.name}.json", {"options": kept, "rows": rows})
        text, first = seeds.table(rows), page.render([compare.read(of_seeds[0]) for of_seeds in folders.values()])
        for name, content in ((f"{args.name}.md", text + "\n"), (f"{args.name}.html", first)):
            with files.atomic(out / name, "w") as file:
                file.write(content)
        seeds.draw(rows, out / f"{args.name}.png")
    print0(f"{text}\n\nwritten: {out / args.name}.md, .json, .png (accuracy against hours), .html (the first seed)")


def settings_of(extra):
    """Return the options after -- that results depend on, in one spelling."""
    named = {name.replace("-", "_"): values for name, values in extra.items()}
    return {name: values for name, values in named.items() if name not in RESUMABLE_CHANGES}


def refuse_to_replace(path, labels, extra):
    """Refuse to write a table in place of one with other settings than `labels`, or of runs with other options.

    Raises:
        UserError: `path` holds such a table.
    """
    if not path.exists():
        return
    before = files.read_json(path, "the table of a study", {"rows": list})
    before, others = before.get("options", extra), {str(row["setting"]) for row in before["rows"]} - labels.keys()
    if others or before != extra:
        raise errors.UserError(
            f"{path}: expected the table of these settings and options, found that of others; give another --out"
        )


def shapes_of(args):
    """Return the settings of a study as (row, stages, share of iterations, experts), the last as STUDIES has them."""
    totals, shapes, experts = STUDIES[args.name]
    rows = [f"cifar10-{method}-ipc{total}" for method in args.methods.split(",") for total in totals]
    return [(row, *shape, n) for row in rows if row in reproduce.PRESETS for shape in shapes for n in experts]


def setting(row, stages, share, experts, args, extra):
    """Return (label, [steps of each seed]) of `row` in `stages` stages; `share` and `experts` are those of STUDIES."""
    method, steps = row.split("-")[1], reproduce.steps_of(row, places(args, 0), extra)
    before, experts = vars(steps[-2].args), experts or getattr(steps[0].args, "num_experts", None)
    ipc = before["ipc"] * before["num_intervals"] // stages
    changed = {name: round(before[name] * share) for name in ("Iteration", "eval_it") if name in before}
    if "niter" in before:
        changed["niter"] = f"{before['niter'] * share:g}"
    if args.scale == "small" and "lr_img_scaled" in before:  # an image moves as far in a sweep, as in reproduce.SMALL
        changed["lr_img"] = f"{before['lr_img'] * before['ipc'] / ipc:g}"
    length = " ".join(f"{name} {changed[name]}" for name in ("Iteration", "niter") if name in changed)
    label, tag = f"{method.upper()}, {stages} × {ipc}, {length}", f"{args.scale}_p{stages}_{length}"
    if experts:
        label, tag, changed["num_experts"] = f"{label}, {experts} experts", f"{tag}_experts{experts}", experts
    changed |= {"ipc": ipc, "tag": tag.replace(" ", ""), "num_intervals": stages}
    found = []
    for seed in range(args.seeds):
        words = {name: [str(value)] for name, value in (changed | {"seed": seed}).items()}
        steps = reproduce.steps_of(row, places(args, seed, f"{method}{experts}"), extra | words)
        script, words, last = steps[-1]
        if script == "evaluate_mtt.py":  # evaluations have as many networks, however many experts there are
            count = extra.get("num_experts", [reproduce.OWN[args.scale][script]["num_experts"]])[0]
            words = [*words, "--num_experts", str(count)]
        for name in EPOCHS & vars(last).keys():
            words = [*words, f"--{name}", str(round(vars(last)[name] * share))]
        steps[-1] = reproduce.Step(script, words, reproduce.options_of(script, words))
        found.append(steps)
    return label, found


def places(args, seed, experts=""):
    """Return reproduce.py's options of the folders of one seed; `experts` tells apart those that are not the same."""
    root = Path(args.out) / args.scale / f"seed{seed}"
    folders = {"buffer_path": str(root / f"buffers_{experts}"), "root_log_dir": str(root / "results")}
    return argparse.Namespace(scale=args.scale, data_path=args.data_path, preset=None, **folders)


def folder_of(step):
    """Return the folder of experts or of an evaluation's report."""
    if step.script == "buffer_mtt.py":
        return buffer_folder(step.args.buffer_path, mtt.dataset_subdir(step.args), step.args.model, step.args.zca)
    return (evaluate_mtt.experiment_folder if "mtt" in step.script else evaluate_idc.result_folder)(step.args)


def finished(step):
    """True if an evaluation was done with the step's options."""
    path = folder_of(step) / "report.json"
    if not path.exists():
        return False
    found = files.read_json(path, "the report of an evaluation", {"config": dict})
    return not files.differing(found["config"], json.loads(json.dumps(config_of(step.args))))


def commands_of(runs):
    """Return the steps of `runs` (lists of steps), in order and without finished runs.

    Returns:
        {its words: (step, folder that its hours belong to, words of the step that must be done before or None)}.
    """
    found = {}
    for steps in runs:
        after = None
        for step in () if finished(steps[-1]) else steps:
            words = (step.script, *step.words)
            folder = folder_of(step if step.script == "buffer_mtt.py" else steps[-1])
            found.setdefault(words, (step, folder, after))
            after = words
    return found


def run_all(commands, jobs, log):
    """Run what `commands_of` returned, `jobs` at the same time; what they print is appended to the file `log`.

    Raises:
        UserError: one of them failed; the others have been stopped, and a later call continues them.
    """
    left, running = dict(commands), {}
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} | os.environ
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",") if torch.cuda.device_count() > 1 else [None]
    try:
        while left or running:
            undone = {*left, *(words for words, *_ in running.values())}
            ready = [words for words, (*_, after) in left.items() if after not in undone]
            for words in ready[: jobs - len(running)]:
                log0(f"$ {reproduce.command(left.pop(words)[0])}")
                gpu = min(gpus, key=[used for *_, used in running.values()].count)  # the one that does least
                environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
                with open(log, "ab") as out:
                    whole = [sys.executable, reproduce.PROJECT / words[0], *words[1:]]
                    process = subprocess.Popen(whole, stdout=out, stderr=out, env=environment, process_group=0)
                running[process.pid] = words, process, time.monotonic(), gpu
            words, status = finish_one(running, commands)
            if status:
                raise errors.UserError(
                    f"{words[0]} ended with status {status}: {log} says why; the same command continues the study"
                )
    finally:
        for _, process, *_ in running.values():
            process.terminate()
        while running:
            finish_one(running, commands)


def finish_one(running, commands):
    """Wait until one of `running` ({pid: (words, process, when it began, GPU)}) ends; its hours go to its folder's.

    Returns:
        (words, exit status).
    """
    pid, status, used = os.wait4(-1, 0)
    words, process, begun, _ = running.pop(pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    step, folder, _ = commands[words]
    on_gpu = step.args.device.startswith("cuda") or (step.args.device == "auto" and torch.cuda.is_available())
    seconds = time.monotonic() - begun if on_gpu else used.ru_utime + used.ru_stime
    if folder.is_dir():  # else it refused to begin
        hours.add(folder, step.script, seconds / 3600, "GPU" if on_gpu else "CPU")
    return words, process.returncode


if __name__ == "__main__":
    errors.run(main)

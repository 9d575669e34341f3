"""Every command of the READMEs can be parsed, and is one that a test runs or that cannot run here."""

import ast
import importlib
import re
import shlex
import sys

import pytest

import distill_mtt
import evaluate_mtt
from scripts import reproduce, study
from tests.conftest import PROJECT
from tests.support.published import SEED_COMMANDS

READMES = [(PROJECT / name).read_text() for name in ("README.md", "scripts/README.md")]
# How a command begins, and the test that runs it: as it stands, with shorter trainings, or with fewer processes.
RUN_BY = {
    "runs/test_quickstart.py": {
        "bash scripts/quickstart.sh": "test_distilled_digits_teach_more_than_random_ones",
    },
    "runs/test_evaluate_mtt.py": {
        "python buffer_mtt.py --dataset=CIFAR10": "test_a_published_command_runs_from_experts_to_report",
        "python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2":
            "test_a_published_command_runs_from_experts_to_report",
        "python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=10":
            "test_every_published_command_runs_from_experts_to_report",
        "python evaluate_mtt.py --dataset=CIFAR10": "test_a_published_command_runs_from_experts_to_report",
    },
    "runs/test_idc.py": {
        "python evaluate_idc.py --reproduce": "test_published_commands_run_and_evaluate",
        "python -u distill_idc.py --reproduce": "test_published_commands_run_and_evaluate",
    },
    "runs/test_distill_dm.py": {
        "python buffer_mtt.py --dataset CIFAR10 --model ConvNetW32": "test_files_are_those_of_idc",
        "python distill_dm.py -d cifar10": "test_files_are_those_of_idc",
        "python evaluate_idc.py --method dm": "test_variants_run_evaluate_and_load",
    },
    "runs/test_from_anywhere.py": {
        "python buffer_mtt.py --dataset folder": "test_own_images_go_through_all_scripts",
        "python distill_mtt.py --dataset folder": "test_own_images_go_through_all_scripts",
        "python evaluate_mtt.py --dataset folder": "test_own_images_go_through_all_scripts",
        "python distill_idc.py -d folder": "test_own_images_go_through_all_scripts",
        "python evaluate_idc.py -d folder": "test_own_images_go_through_all_scripts",
        "python distill_dm.py -d folder": "test_own_images_go_through_all_scripts",
        "python evaluate_idc.py --method dm -d folder": "test_own_images_go_through_all_scripts",
    },
    "runs/test_distributed.py": {
        "torchrun": "test_a_killed_rank_ends_the_job_and_torchruns_restart_resumes",
        "python buffer_mtt.py … --shard": "test_shards_are_bit_identical_and_the_last_one_merges",
    },
    "scripts/test_reproduce.py": {
        "python scripts/reproduce.py --list": "test_list_shows_every_row",
        "python scripts/reproduce.py cifar10-mtt-ipc10": "test_an_interrupted_row_continues",
        "python scripts/reproduce.py cifar10-mtt-ipc10-oneshot": "test_a_baseline_runs_from_experts_to_report",
    },
    "scripts/test_study.py": {"python scripts/study.py": "test_the_table_is_that_of_the_reports"},
    "scripts/test_export.py": {"python scripts/export.py": "test_export_as_a_user_runs_it"},
    "scripts/test_download.py": {"python scripts/download.py": "test_buffers_arrive_and_are_named_for_the_next_script"},
    "utils/results/test_compare.py": {
        "python scripts/compare.py": "test_the_table_holds_every_number_of_the_reports",
    },
}  # fmt: skip
NOT_RUN = ("bash scripts/test.sh", "python3 -m venv", "export HOST0", "srun")  # these tests; set-up; SLURM


def commands():
    """Return the lines of the READMEs' shell blocks without comments."""
    blocks = [block for readme in READMES for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(re.split(r"\s+# ", line)[0] for line in lines if line and not line.startswith("#")))


def test_every_command_is_run_by_a_test():
    starts = {start for tests in RUN_BY.values() for start in tests}
    used = set()
    for command in commands():
        if not command.startswith(NOT_RUN):
            found = {start for start in starts if command.startswith(start)}
            assert found, f"no test runs: {command}"
            used |= found
    assert used == starts
    for file, tests in RUN_BY.items():
        tree = ast.parse((PROJECT / "tests" / file).read_text())
        assert set(tests.values()) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_and_is_parsed(command, monkeypatch):
    words = [word for word in shlex.split(command) if word != "…"]
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if script is None:
        assert command.startswith(NOT_RUN)
        return
    assert (PROJECT / script).exists()
    own = words[words.index(script) + 1 :]
    # [optional] and one of several|words; SLURM's numbers
    own = [re.sub(r"[][]", "", word).split("|")[0] for word in own]
    own = [word.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "1/8") for word in own]
    if script == "scripts/reproduce.py":
        end = own.index("--") if "--" in own else len(own)
        options = reproduce.parse(own[:end])
        assert not options.row or reproduce.steps_of(options.row, options, reproduce.named(own[end + 1 :]))
    elif script == "scripts/study.py":
        assert study.parse(own)
    elif script.endswith(".py"):
        monkeypatch.setattr(sys, "argv", [script, *own])
        assert importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse()


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_rows_of_the_table_are_the_published_ones(number, monkeypatch):
    rows = re.findall(r"^\| (?:CIFAR-100|Tiny ImageNet), (?:10|50) \| `(.*)` \|$", READMES[0], re.MULTILINE)
    assert len(rows) == 4
    found, published = [], SEED_COMMANDS[number]
    for script, words in (
        (distill_mtt, published[0]),
        (distill_mtt, rows[number - 2]),
        (evaluate_mtt, rows[number - 2]),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *words.split()])
        found.append(script.parse())
    assert vars(found[0]) | {"root_log_dir": None} == vars(found[1]) | {"root_log_dir": None}
    evaluated, distilled = (evaluate_mtt.experiment_folder(found[2]), distill_mtt.mtt.experiment_folder(found[1], ""))
    assert evaluated.name == distilled.name

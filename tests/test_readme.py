"""Every command of the README is one that a test runs, or one that the README says was not run."""

import ast
import re
import shlex
import sys

import pytest

import distill_mtt
import evaluate_mtt
from scripts import reproduce
from tests.conftest import PROJECT
from tests.test_evaluate_mtt import SEED_COMMANDS
from utils import download, export

README = (PROJECT / "README.md").read_text()
# How a command begins, and the test that runs it: as it stands, with shorter trainings, or with fewer processes.
RUN_BY = {
    "test_quickstart.py": {
        "bash scripts/quickstart.sh": "test_distilled_digits_teach_more_than_random_ones",
    },
    "test_evaluate_mtt.py": {
        "python buffer_mtt.py --dataset=CIFAR10": "test_a_published_command_runs_from_experts_to_report",
        "python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=2":
            "test_a_published_command_runs_from_experts_to_report",
        "python distill_mtt.py --dataset=CIFAR10 --model=ConvNet --ipc=10":
            "test_every_published_command_runs_from_experts_to_report",
        "python evaluate_mtt.py --dataset=CIFAR10": "test_a_published_command_runs_from_experts_to_report",
    },
    "test_idc.py": {
        "python evaluate_idc.py --reproduce": "test_published_commands_run_and_evaluate",
        "python -u distill_idc.py --reproduce": "test_published_commands_run_and_evaluate",
    },
    "test_reproduce.py": {
        "bash scripts/cifar10_mtt_ipc10.sh": "test_every_published_row_has_a_shell_file",
        "python scripts/reproduce.py --list": "test_list_shows_every_row",
        "python scripts/reproduce.py cifar10-mtt-ipc10-oneshot": "test_a_baseline_runs_from_experts_to_report",
        "python scripts/reproduce.py cifar10-mtt-ipc10 --scale small": "test_an_interrupted_row_continues",
        "python scripts/reproduce.py cifar10-mtt-ipc10 --dry_run": "reproduced",
        "python scripts/reproduce.py cifar10-mtt-ipc10 -- --device": "arguments",
    },
    "test_distributed.py": {
        "torchrun": "test_stages_agree_with_one_process_to_rounding",
        "python buffer_mtt.py … --shard": "test_shards_are_bit_identical_and_the_last_one_merges",
    },
    "test_collect.py": {"python -m utils.report": "test_the_table_holds_every_number_of_the_reports"},
    "test_export.py": {"python -m utils.export": "test_export_as_a_user_runs_it"},
    "test_download.py": {"python -m utils.download": "test_buffers_arrive_and_are_named_for_the_next_script"},
}  # fmt: skip
NOT_RUN = ("bash scripts/test.sh", "python3 -m venv", "export HOST0", "srun")  # these tests; set-up; SLURM


def commands():
    """Return the lines of the README's shell blocks without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [re.split(r"\s+# ", line)[0] for line in lines if line and not line.startswith("#")]


def test_every_command_is_run_by_a_test_or_said_not_to_be():
    starts = {start for tests in RUN_BY.values() for start in tests}
    used = set()
    for command in commands():
        if not command.startswith(NOT_RUN):
            found = {start for start in starts if command.startswith(start)}
            assert found, f"no test runs: {command}"
            used |= found
    assert used == starts
    for words in ("these lines have not been run", "not yet run on\nseveral GPUs", "None of them has been run at full"):
        assert words in README
    for file, tests in RUN_BY.items():
        tree = ast.parse((PROJECT / "tests" / file).read_text())
        assert set(tests.values()) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_every_option_exists(command, monkeypatch):
    words = [word for word in shlex.split(command) if word != "…"]
    script = next((word for word in words if word.endswith(".py")), None)
    if words[0] == "bash" and script is None:
        assert (PROJECT / words[1]).exists()
    elif script == "scripts/reproduce.py":
        own = words[words.index(script) + 1 :]
        end = own.index("--") if "--" in own else len(own)
        options = reproduce.parse(own[:end])
        if options.row:
            assert reproduce.steps_of(options.row, options, reproduce.named(own[end + 1 :]))
    elif script:
        own = [word.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "1/8")
               for word in words[words.index(script) + 1 :]]  # fmt: skip
        if "--node_rank=$SLURM_NODEID" not in words:
            assert reproduce.options_of(script, [*own, *(["--dataset", "CIFAR10"] if not own else [])])
    elif words[:3] in (["python", "-m", "utils.export"], ["python", "-m", "utils.download"]):
        module = {"utils.export": export, "utils.download": download}[words[2]]
        # [optional] and one of several|words
        own = [re.sub(r"[][]", "", word).split("|")[0] for word in words[3:]]
        monkeypatch.setattr(sys, "argv", ["module", *own])
        assert module.parse()


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_rows_of_the_table_are_the_published_ones(number, monkeypatch):
    rows = re.findall(r"^\| (?:CIFAR-100|Tiny ImageNet), (?:10|50) \| `(.*)` \|$", README, re.MULTILINE)
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
    assert evaluate_mtt.experiment_folder(found[2]) == distill_mtt.experiment_folder(found[1])

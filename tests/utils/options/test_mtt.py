import pytest

import distill_mtt
import evaluate_mtt
from tests.support.published import SEED_COMMANDS
from utils.options.mtt import experiment_folder


@pytest.mark.parametrize("number", range(len(SEED_COMMANDS)))
def test_published_commands_agree_on_the_folder(number, monkeypatch):
    distillation, evaluation = SEED_COMMANDS[number]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *distillation.split()])
    written = experiment_folder(distill_mtt.parse(), "logged_files")
    monkeypatch.setattr("sys.argv", ["evaluate_mtt.py", *evaluation.split()])
    assert evaluate_mtt.experiment_folder(evaluate_mtt.parse()) == written

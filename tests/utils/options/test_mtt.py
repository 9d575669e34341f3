import pytest

import distill_mtt
import evaluate_mtt
from tests.support.published import SEED_COMMANDS
from utils.data import datasets
from utils.options.mtt import experiment_folder, load_data


@pytest.mark.parametrize("number", range(len(SEED_COMMANDS)))
def test_published_commands_agree_on_the_folder(number, monkeypatch):
    distillation, evaluation = SEED_COMMANDS[number]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *distillation.split()])
    written = experiment_folder(distill_mtt.parse(), "logged_files")
    monkeypatch.setattr("sys.argv", ["evaluate_mtt.py", *evaluation.split()])
    assert evaluate_mtt.experiment_folder(evaluate_mtt.parse()) == written


def test_both_spellings_of_the_images_learning_rate_are_found(monkeypatch, tmp_path):  # SPEC 8.7
    """The default prints as img1000, one on the command line as img1000.0."""

    def folder(*words):
        monkeypatch.setattr("sys.argv", ["distill_mtt.py", *words])
        return experiment_folder(distill_mtt.parse(), tmp_path)

    name = "CIFAR10_ConvNet_S_ipc1_max25_syn20_real3_img{}_1e-05_0.01_increase"
    default, given = (tmp_path / "CIFAR10" / name.format(lr) for lr in ("1000", "1000.0"))
    for words in (["--lr_img", "1000"], ["--lr_img", "1e3"]):
        assert folder() == default and folder(*words) == given
    given.mkdir(parents=True)
    assert folder() == given
    default.mkdir()
    assert folder() == default and folder("--lr_img=1000") == given
    given.rmdir()
    assert folder("--lr_img=1000") == default
    assert folder("--lr_img=2.5").name == name.format("2.5")
    for words in ([], ["--lr_img", "1000"]):  # an evaluation does the same
        monkeypatch.setattr("sys.argv", ["evaluate_mtt.py", *words])
        assert evaluate_mtt.experiment_folder(evaluate_mtt.parse()) is not None


def test_imagenet_alone_is_resized_without_antialiasing(monkeypatch):  # SPEC 8.10
    asked = []
    monkeypatch.setattr(datasets, "load", lambda *_, antialias, **__: asked.append(antialias))
    for dataset in ("ImageNet", "folder"):
        monkeypatch.setattr("sys.argv", ["distill_mtt.py", "--dataset", dataset])
        load_data(distill_mtt.parse(), None)
    assert asked == [False, True]

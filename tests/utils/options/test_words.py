"""Options that misled new users, and what is said to them."""

import ast
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import buffer_mtt
import distill_idc
import distill_mtt
import evaluate_idc
import evaluate_mtt
from tests.conftest import PROJECT
from utils import options
from utils.data.datasets import RES
from utils.options import mtt

SCRIPTS = ["buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py", "distill_idc.py", "evaluate_idc.py", "distill_dm.py"]


def parsed(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    return script.parse()


@pytest.mark.parametrize("text,name", [("vgg11", "VGG11"), ("convnetw32", "ConvNetW32"), ("ResNet18", "ResNet18")])
def test_networks_are_found_in_any_case(text, name):
    assert options.network_name(text) == name


def test_a_list_of_networks_keeps_names_that_differ_in_case_alone():
    assert options.network_list("self,vgg11,resnet18,ResNet18") == ["self", "VGG11", "resnet18", "ResNet18"]


def test_own_images_have_the_same_size_in_both_methods(monkeypatch):
    assert parsed(distill_idc, "-d folder --ipc 1", monkeypatch).size == RES
    assert parsed(distill_idc, "-d folder --ipc 1 --size 48", monkeypatch).size == 48
    assert f"(default: {RES})" in {row[0]: row[3] for row in mtt.DATA}["--res"]


def test_a_named_folder_needs_no_ipc(monkeypatch):
    assert parsed(evaluate_idc, "-d digits --override-load-dir somewhere", monkeypatch).override_load_dir == "somewhere"
    with pytest.raises(Exception, match="--ipc: expected the number of images"):
        parsed(evaluate_idc, "-d digits", monkeypatch)


def test_help_has_one_group_of_each_title(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(distill_idc, "--help", monkeypatch)
    titles = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and line[:1].isalpha()]
    assert "machine:" in titles and len(titles) == len(set(titles))


UNUSED = {
    "buffer_mtt": ["--batch_real"],
    "distill_mtt": ["--batch_real", "--num_experts", "--lr_init", "--epoch_eval_train"],
    "evaluate_mtt": ["--batch_real", "--mom", "--l2", "--save_interval"],
    "distill_idc": ["--load_memory", "--workers", "--phase", "--nclass_sub", "--pretrained", "--verbose"],
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_options_are_accepted_hidden_and_listed(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        parsed(script, "--help", monkeypatch)
    said, listed = capsys.readouterr().out, (PROJECT / "scripts" / "README.md").read_text()
    assert said.rstrip().endswith("are accepted; scripts/README.md lists them.")
    shown = {word.rstrip(",") for line in said.splitlines() if line.startswith("  -") for word in line.split()}
    assert "--dry_run" in shown
    more = "--ipc 1 -d digits " if name == "distill_idc" else ""
    for option in UNUSED[name]:
        assert option not in shown and f"`{option}`" in listed
        parsed(
            script, f"{more}{option}" if option in ("--pretrained", "--verbose") else f"{more}{option} 1", monkeypatch
        )


@pytest.mark.parametrize(
    "script,words,found",
    [
        (distill_mtt, "--num-intervals 7 --lr-img=5", {"num_intervals": 7, "lr_img": 5.0}),
        (distill_mtt, "--num_intervals 7 --start-sampling-epoch 2", {"num_intervals": 7, "start_sampling_epoch": 2}),
        (evaluate_mtt, "--num-intervals=3 --save-path a-b_c", {"num_intervals": 3, "save_path": "a-b_c"}),
        (buffer_mtt, "--use_random_pruning --sparse_ratio 0.5", {"use_random_pruning": True, "sparse_ratio": 0.5}),
        (distill_idc, "--ipc 1 --num_intervals 3 --weight_decay=1e-3", {"num_intervals": 3, "weight_decay": 1e-3}),
        (
            evaluate_idc,
            "--ipc 1 --num-intervals 3 --override_load_dir x",
            {"num_intervals": 3, "override_load_dir": "x"},
        ),
    ],
)
def test_names_of_options_are_spelled_with_dashes_or_underscores(script, words, found, monkeypatch):
    args = vars(parsed(script, words, monkeypatch))
    assert {name: args[name] for name in found} == found


def test_presets_do_not_replace_an_option_that_is_spelled_the_other_way(monkeypatch):
    args = parsed(distill_idc, "-d cifar10 --reproduce --ipc 1 --n-data 100 --weight_decay 0.1", monkeypatch)
    assert (args.n_data, args.weight_decay, args.metric) == (100, 0.1, "mse")


def data(per_class):
    """Two classes of so many images."""
    return SimpleNamespace(train=range(2 * per_class), smallest_class=per_class)


@pytest.mark.parametrize(
    "per_class,batch,warns", [(60, 256, True), (60, 17, True), (60, 16, False), (1280, 256, False)]
)
def test_few_steps_in_an_epoch_are_warned_of(per_class, batch, warns, capsys):
    options.warn_of_few_images(data(per_class), batch)
    said = capsys.readouterr().err
    assert ("lower --batch_train" in said) == warns and said.count("\n") == warns


@pytest.mark.parametrize("ipc,warns", [(10, False), (11, True)])
def test_more_images_than_a_class_has_are_warned_of(ipc, warns, capsys):
    options.warn_of_few_images(data(10), ipc=ipc)
    assert ("more than the 10 real ones" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_modules_are_imported_prints_no_traceback(script):
    """The first import of a script lets SIGINT end the process as the system does."""
    first = next(node for node in ast.parse((PROJECT / script).read_text()).body if isinstance(node, ast.Import))
    assert first.names[0].name == "utils.run.quiet_imports"
    code = "import utils.run.quiet_imports, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == -2 and done.stderr == ""

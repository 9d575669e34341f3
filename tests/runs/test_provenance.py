"""Results belong to their data: all five scripts tell changed data from data that only moved."""

import json
import shutil

import pytest

from tests.conftest import call, make_tree

CLASSES = ["ape", "bee", "cow"]
SIZE = 16
EXPERTS = f"--dataset folder --res {SIZE} --model ConvNetW32 --batch_train 8"
STAGES = "--ipc 1 --num_intervals 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --lr_img 10"
IDC = f"-d folder --size {SIZE} --ipc 1 --num-intervals 2 --depth 2 --width 0.1 --niter 0.02 --inner_loop 2 --n_data 8"
COMMANDS = {
    "buffer_mtt.py": f"{EXPERTS} --num_experts {{more}} --train_epochs 2",
    "distill_mtt.py": f"{EXPERTS} {STAGES} --Iteration 1 --num_eval 1 --override_epoch_eval_train 1",
    "evaluate_mtt.py": f"{EXPERTS} {STAGES} --num_experts 1 --num_eval 1 --epoch_eval_train 1 --skip_full",
    "distill_idc.py": f"{IDC} --epochs 2",
    "evaluate_idc.py": f"{IDC} --epochs 2 --skip_full --eval_models self",
}
FOLDERS = {
    "buffer_mtt.py": "--buffer_path {out}/b",
    "distill_mtt.py": "--buffer_path {out}/b --root_log_dir {out}/l",
    "evaluate_mtt.py": "--buffer_path {out}/b --save_path {out}/l",
    "distill_idc.py": "--results {out}/r",
    "evaluate_idc.py": "--results {out}/r",
}


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script on a tree, its results below `out`; returns (status, stderr)."""

    def run(script, tree, out, experts=1):
        words = COMMANDS[script].format(more=experts) + " " + FOLDERS[script].format(out=out)
        data = "--data_dir" if "idc" in script else "--data_path"
        return call(script, *words.split(), data, tree, capsys=capsys, monkeypatch=monkeypatch)

    return run


@pytest.fixture
def made(tmp_path, run):
    """A tree named animals, and the results of all scripts on it."""
    tree = make_tree(tmp_path / "animals", CLASSES, 4, 2, SIZE)
    for script in COMMANDS:
        status, message = run(script, tree, tmp_path)
        assert status == 0, message
    return tree, tmp_path


def replaced_class(tree):
    for part in ("train", "test"):
        (tree / part / "cow").rename(tree / part / "dog")
    return "class 'cow' is gone, class 'dog' is new"


def removed_class(tree):
    for part in ("train", "test"):
        shutil.rmtree(tree / part / "cow")
    return "class 'cow' is gone"


def added_file(tree):
    first = next((tree / "train" / "bee").iterdir())
    shutil.copy(first, first.with_name("extra.png"))
    return "class 'bee': 4 train images, now 5"


@pytest.mark.parametrize("change", [replaced_class, removed_class, added_file])
def test_every_script_names_what_changed(made, run, change):
    tree, out = made
    words = change(tree)
    for script in COMMANDS:
        status, message = run(script, tree, out, experts=2)
        assert status == 2 and message.count("\n") == 1 + message.count("note: ") + message.count("warning: "), message
        for word in words.split(", "):
            assert word in message, (script, message)


def test_data_that_moved_unchanged_go_on(made, run, tmp_path):
    tree, out = made
    elsewhere = tmp_path / "elsewhere" / "animals"
    elsewhere.parent.mkdir()
    shutil.copytree(tree, elsewhere)  # other times, other path
    shutil.rmtree(tree)
    for script in COMMANDS:
        status, message = run(script, elsewhere, out, experts=2)
        assert status == 0, (script, message)


def test_results_that_do_not_say_their_data_are_read_with_a_note(made, run):
    tree, out = made
    for path in [*out.rglob("data.json"), *out.rglob("buffer.json")]:
        content = json.loads(path.read_text())
        del content["fingerprint"]
        path.write_text(json.dumps(content))
    for script in ("evaluate_mtt.py", "evaluate_idc.py", "buffer_mtt.py"):
        status, message = run(script, tree, out, experts=2)
        assert status == 0 and "nothing says which data" in message, (script, message)


def test_a_damaged_fingerprint_is_one_line(made, run):
    tree, out = made
    for path in out.rglob("data.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": {"train": 7}}))
    status, message = run("evaluate_idc.py", tree, out)
    assert status == 2 and "expected the fingerprint of its data" in message

import itertools
import json
import re
import shutil

import pytest
import torch

import distill_mtt
import evaluate_mtt
import networks
from tests.conftest import EXPERIMENT, STAGES, call, make_tree, run_script
from utils import datasets, files, progressive, report, synset, training
from utils.augment import DSA
from utils.datasets import Source
from utils.runtime import stream
from utils.trajectories import load_buffer

QUICK = ["--num_experts", "2", "--num_eval", "2", "--epoch_eval_train", "6", "--full_epochs", "2"]


@pytest.fixture(scope="module")
def evaluated(distilled, buffers):
    done = run_script(
        "evaluate_mtt.py", *STAGES, *QUICK, "--buffer_path", buffers, "--save_path", distilled.parent.parent
    )
    return done.stdout, json.loads((distilled / "report.json").read_text())


def test_report_has_the_documented_form(evaluated, distilled):
    printed, found = evaluated
    assert found["dataset"] == "Digits" and found["model"] == "ConvNetW32"
    assert [(s["stage"], s["ipc_total"]) for s in found["stages"]] == [(1, 1), (2, 2), (3, 3)]
    for row in (*found["stages"], found["random"], found["full"]):
        assert 0 <= row["accuracy_mean"] <= 100 and row["accuracy_std"] >= 0
    assert found["models"]["ConvNetW32"]["stages"] == found["stages"]
    assert found["config"]["ipc"] == 1 and found["config"]["versions"]["torch"] == torch.__version__
    assert "stage 1-3" in printed and "random real" in printed and "full training set" in printed
    assert f"{found['stages'][2]['accuracy_mean']:.2f}" in printed
    assert (distilled / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_each_network_starts_from_its_own_expert_and_carries_momentum(evaluated, distilled, buffers):
    _, found = evaluated
    real = datasets.load("Digits", "", torch.device("cpu"))
    experts = load_buffer(buffers / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    final = []
    for k in range(2):
        network = networks.get_network("ConvNetW32", 1, 10, 8)
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), experts[k][0], strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
        for stage in range(3):
            folder = sorted(distilled.glob("interval*"))[stage]
            images = torch.load(folder / "images_best.pt", weights_only=True)
            labels = torch.load(folder / "labels_best.pt", weights_only=True)
            for epoch in range(6):
                lr = float(torch.load(folder / "syn_lr_best.pt", weights_only=True))
                optimizer.param_groups[0]["lr"] = lr * (0.1 if epoch > 6 // 2 + 1 else 1)
                rng = stream(0, "distilled", "ConvNetW32", k, stage, epoch)
                order = torch.from_numpy(rng.permutation(len(labels)))
                x = dsa.apply(images[order], dsa.draw(len(order), rng))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(x), labels[order]).backward()
                optimizer.step()
        final.append(training.accuracy(network, real.test))
    assert found["stages"][2]["accuracy_mean"] == pytest.approx(sum(final) / 2)


def test_momentum_is_carried_and_not_started_again():
    torch.manual_seed(0)
    real = datasets.load("Digits", "", torch.device("cpu"))
    source = Source(*real.train.batch(slice(0, 20)))

    def recipe(stage):
        return training.Recipe(3, 0.01, 0.9)

    network = training.new_network("MLP", real, 0)
    progressive.staged_accuracies(network, [source, source], recipe, real.test, 0, ("x",), files.Checkpoint())
    twin = training.new_network("MLP", real, 0)
    optimizer = training.train(twin, source, recipe(0), 0, ("x", 0))
    training.train(twin, source, recipe(1), 0, ("x", 1), optimizer)
    alone = training.new_network("MLP", real, 0)
    training.train(alone, source, recipe(0), 0, ("x", 0))
    training.train(alone, source, recipe(1), 0, ("x", 1))
    same = [torch.equal(p, q) for p, q in zip(network.parameters(), twin.parameters(), strict=True)]
    other = [torch.equal(p, q) for p, q in zip(network.parameters(), alone.parameters(), strict=True)]
    assert all(same) and not any(other)


@pytest.mark.parametrize("mode", ["A", "P", "C"])
def test_other_networks_stand_in_one_report(mode, distilled, buffers, capsys, monkeypatch):
    arguments = [*STAGES, *QUICK, "--num_eval", 1, "--skip_random", "--skip_full", "--override_load_path", EXPERIMENT]
    arguments[arguments.index("--epoch_eval_train") + 1] = "1"
    status, _ = call("evaluate_mtt.py", *arguments, "--eval_mode", mode, "--buffer_path", buffers, "--save_path",
                     distilled.parent.parent, capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
    found = json.loads((distilled / "report.json").read_text())
    assert status == 0
    assert list(found["models"]) == networks.eval_pool(mode, "ConvNetW32")
    assert found["random"] is None and found["full"] is None


def test_saved_models_are_lists_of_parameters(distilled, buffers, capsys, monkeypatch):
    arguments = [*STAGES, *QUICK, "--skip_random", "--skip_full", "--save_model", "--save_model_prefix", "net"]
    status, _ = call("evaluate_mtt.py", *arguments, "--buffer_path", buffers, "--save_path", distilled.parent.parent,
                     capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
    saved = torch.load(distilled / "net_ConvNetW32_1.pt", weights_only=True)
    shapes = [p.shape for p in networks.get_network("ConvNetW32", 1, 10, 8).parameters()]
    assert status == 0 and [t.shape for t in saved] == shapes


def test_stage_folders_can_be_named(distilled, buffers, capsys, monkeypatch):
    arguments = [*STAGES, *QUICK, "--skip_random", "--skip_full", "--num_intervals", 2, "--override_interval_names"]
    common = ["--buffer_path", buffers, "--save_path", distilled.parent.parent]
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    assert call("evaluate_mtt.py", *arguments, "interval1_epoch1-2.interval3_epoch5-6", *common, **options)[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert [s["ipc_total"] for s in found["stages"]] == [1, 3]
    status, message = call("evaluate_mtt.py", *arguments, "interval1_epoch1-2", *common, **options)
    assert status == 2 and "expected 2 names" in message


def test_random_unions_grow_by_real_pictures():
    real = datasets.load("Digits", "", torch.device("cpu"))
    unions = progressive.random_unions(real, [2, 4, 6], 0, (1,))
    assert [len(u) for u in unions] == [20, 40, 60]
    train = {tuple(x.flatten().tolist()) for x in real.train.batch(slice(None))[0]}
    for small, large in itertools.pairwise(unions):
        rows = [tuple(x.flatten().tolist()) for x in large.images]
        assert set(rows) <= train
        assert {tuple(x.flatten().tolist()) for x in small.images} <= set(rows)
    assert torch.bincount(unions[2].labels).tolist() == [6] * 10


SEED_COMMANDS = [  # (distillation, evaluation) of the published readme, in its own words
    ("--dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 --max_start_epoch=5 --zca "
     "--lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 --max_start_epoch=5 --zca "
     "--lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR10 --model=ConvNet --ipc=10 --syn_steps=30 --expert_epochs=2 --max_start_epoch=15 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR10 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=15 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR10_ConvNet_S_ipc10_max15_syn30_real2_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR100 --model=ConvNet --ipc=2 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR100 --model=ConvNet --ipc=2 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR100_ConvNet_S_ipc2_max20_syn20_real3_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR100 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files --batch_syn 512",
     "--dataset=CIFAR100 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR100_ConvNet_S_ipc10_max20_syn20_real2_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=Tiny --model=ConvNetD4 --ipc=2 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --batch_syn 64",
     "--dataset=Tiny --model=ConvNetD4 --ipc=2 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --num_intervals 5 "
     "--override_load_path Tiny_ConvNetD4_S_ipc2_max20_syn20_real2_img10000.0_0.0001_0.01_increase "
     "--epoch_eval_train 500 --save_path logged_files"),
    ("--dataset=Tiny --model=ConvNetD4 --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --batch_syn 64",
     "--dataset=Tiny --model=ConvNetD4 --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --num_intervals 5 "
     "--override_load_path Tiny_ConvNetD4_S_ipc10_max20_syn20_real2_img10000.0_0.0001_0.01_increase "
     "--epoch_eval_train 500 --save_path logged_files"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SEED_COMMANDS)))
def test_published_commands_agree_on_the_folder(number, monkeypatch):
    distillation, evaluation = SEED_COMMANDS[number]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *distillation.split()])
    written = distill_mtt.experiment_folder(distill_mtt.parse())
    monkeypatch.setattr("sys.argv", ["evaluate_mtt.py", *evaluation.split()])
    assert evaluate_mtt.experiment_folder(evaluate_mtt.parse()) == written


def run_published(number, published, epochs, tree, tmp_path):
    """Run a row in its own words, made short by options that its folder's name does not hold."""
    data = ["--data_path", tree, "--buffer_path", tmp_path / "buffers"]
    # Small minibatches, so that experts on so few pictures move about as far as students do.
    run_script("buffer_mtt.py", *published.split(), *data, "--num_experts", 1, "--train_epochs", epochs,
               "--batch_train", {0: 4, 1: 4, 4: 8}.get(number, 32))  # fmt: skip
    distillation, evaluation = (command.split() for command in SEED_COMMANDS[number])
    batches = {0: (2, 12), 1: (8, 4), 4: (8, 8)}.get(number, (8, 32))
    short = ["--Iteration", 1, "--batch_syn", batches[0], "--batch_train", batches[1], "--num_eval", 1]
    run_script("distill_mtt.py", *distillation, *data, "--root_log_dir", tmp_path / "logs", *short,
               "--override_epoch_eval_train", 1)  # fmt: skip
    done = run_script("evaluate_mtt.py", *evaluation, *data, "--save_path", tmp_path / "logs", "--num_experts", 1,
                      "--epoch_eval_train", 1, "--num_eval", 1, "--skip_full", "--skip_random")  # fmt: skip
    assert "stage 1-5" in done.stdout
    return sorted(path.name for path in (tmp_path / "logs").glob("*/*/interval*"))


CIFAR_EXPERTS = "--dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca"


def test_a_published_command_runs_from_experts_to_report(cifar_tree, tmp_path):
    stages = run_published(0, CIFAR_EXPERTS, 7, cifar_tree, tmp_path)
    assert stages == [f"interval{p}_epoch{5 * p - 4}-{5 * p}" for p in range(1, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_published_command_runs_from_experts_to_report(number, tmp_path):
    """Takes half an hour: python -m pytest -m slow."""
    classes, size, part = ((10, 32, "test"), (100, 32, "test"), (200, 64, "val"))[number // 2]
    pictures = {4: 3, 5: 10}.get(number, 12)  # of each class; 200 classes of 64 pixels take long
    tree = make_tree(tmp_path / "data", [f"class{n:03d}" for n in range(classes)], pictures, 1, size, part, wrong=0.5)
    published = CIFAR_EXPERTS.replace("CIFAR10", "CIFAR100") if number in (2, 3) else CIFAR_EXPERTS
    if number >= 4:
        published = "--dataset Tiny --model=ConvNetD4 --train_epochs 24"
    reach = {1: 15, 2: 20, 3: 20, 4: 20, 5: 20}[number]
    stages = run_published(number, published, reach + 3, tree, tmp_path)
    assert sorted(stages) == sorted(f"interval{p}_epoch{reach * (p - 1) + 1}-{reach * p}" for p in range(1, 6))


PUBLISHED = "CIFAR10_ConvNetW32_S_ipc1_max2_syn2_real1_img1000.0_1e-05_0.01_increase"
WORDS = ["--dataset", "CIFAR10", "--model", "ConvNetW32", "--ipc", 1, "--num_intervals", 2, "--max_start_epoch", 2,
         "--override_load_path", PUBLISHED]  # fmt: skip


def write_published(root, new_format):
    """Write results and experts as the published code saves them: leaves that require gradients, parameters."""

    def save(value, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path, _use_new_zipfile_serialization=new_format)

    images = torch.randn(20, 3, 32, 32)
    for stage in (1, 2):
        folder = root / "logs" / "CIFAR10" / PUBLISHED / f"interval{stage}_epoch{2 * stage - 1}-{2 * stage}"
        save(images[: 10 * stage].clone().requires_grad_(), folder / "images_best.pt")
        save(torch.arange(10).repeat(stage), folder / "labels_best.pt")
        save(torch.tensor(0.012, requires_grad=True), folder / "syn_lr_best.pt")
    network = networks.get_network("ConvNetW32", 3, 10, 32)
    as_tensors = [p.detach().clone() for p in network.parameters()]
    moved = [p * 1.1 for p in as_tensors]
    trajectories = [[list(network.parameters()), moved, as_tensors], [as_tensors, moved, as_tensors]]
    save(trajectories, root / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt")
    return root / "logs" / "CIFAR10" / PUBLISHED


@pytest.mark.parametrize("new_format", [True, False])
def test_published_files_are_read_as_they_are(new_format, cifar_tree, tmp_path, capsys, monkeypatch):
    folder = write_published(tmp_path, new_format)
    entry = load_buffer(tmp_path / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt")[0][0]
    assert isinstance(entry[0], torch.nn.Parameter)
    paths = ["--data_path", cifar_tree, "--buffer_path", tmp_path / "buffers", "--save_path", tmp_path / "logs"]
    status, message = call("evaluate_mtt.py", *WORDS, *QUICK, *paths, "--skip_full", capsys=capsys,
                           monkeypatch=monkeypatch)  # fmt: skip
    assert status == 0 and "no experts" not in message, message
    found = json.loads((folder / "report.json").read_text())
    assert [s["ipc_total"] for s in found["stages"]] == [1, 2]
    data = synset.load_distilled(folder)
    assert not data.images.requires_grad and data.syn_lr == pytest.approx(0.012) and data.stage.tolist()[9:11] == [1, 2]


@pytest.mark.parametrize("new_format", [True, False])
def test_published_experts_and_unions_are_distilled_on(new_format, cifar_tree, tmp_path):
    """Stage 2 from the published union of stage 1 and the published experts in its folder."""
    folder = write_published(tmp_path, new_format)
    shutil.rmtree(folder / "interval2_epoch3-4")
    shutil.copytree(tmp_path / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32", folder / "interval1_epoch1-2",
                    dirs_exist_ok=True)  # fmt: skip
    run_script("distill_mtt.py", *WORDS[:-2], "--data_path", cifar_tree, "--root_log_dir", tmp_path / "logs",
               "--start_interval", 2, "--expert_epochs", 1, "--syn_steps", 2, "--Iteration", 1, "--num_eval", 1,
               "--override_epoch_eval_train", 1, "--override_experiment_path", folder)  # fmt: skip
    before, after = (synset.load_distilled(folder, stage=stage).images for stage in (1, 2))
    assert torch.equal(after[:10], before) and len(after) == 20


OTHER_SHAPES = [
    ("images_best.pt", torch.zeros(20, 3, 16, 16), "expected pictures 3x32x32 for CIFAR10, found 3x16x16"),
    ("images_best.pt", torch.zeros(19, 3, 32, 32), "labels_best.pt: expected 19 integer labels"),
    ("labels_best.pt", torch.zeros(20, 1).long(), r"expected labels \(N,\), found shape \(20, 1\)"),
    ("syn_lr_best.pt", torch.ones(3), r"expected one number, found shape \(3,\)"),
]


@pytest.mark.parametrize("name,tensor,words", OTHER_SHAPES)
@pytest.mark.parametrize("new_format", [True, False])
def test_published_files_of_another_shape_are_named(new_format, name, tensor, words, cifar_tree, tmp_path, capsys,
                                                    monkeypatch):  # fmt: skip
    path = write_published(tmp_path, new_format) / "interval2_epoch3-4" / name
    torch.save(tensor, path, _use_new_zipfile_serialization=new_format)
    paths = ["--data_path", cifar_tree, "--buffer_path", tmp_path / "buffers", "--save_path", tmp_path / "logs"]
    status, message = call("evaluate_mtt.py", *WORDS, *paths, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.count("\n") == 1 and re.search(words, message), message
    assert message.startswith(f"error: {path.parent}") and "_best.pt: " in message


@pytest.mark.parametrize("new_format", [True, False])
def test_published_experts_of_another_shape_are_named(new_format, cifar_tree, tmp_path, capsys, monkeypatch):
    write_published(tmp_path, new_format)
    path = tmp_path / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt"
    trajectories = load_buffer(path, mmap=False)
    trajectories[1][0][2] = torch.nn.Parameter(torch.zeros(33))
    torch.save(trajectories, path, _use_new_zipfile_serialization=new_format)
    paths = ["--data_path", cifar_tree, "--buffer_path", tmp_path / "buffers", "--save_path", tmp_path / "logs"]
    status, message = call("evaluate_mtt.py", *WORDS, *QUICK, *paths, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.startswith(f"error: {path}: ") and "found (33,)" in message


def test_table_and_spread():
    assert report.mean_std([1.0, 3.0]) == (2.0, 1.0)
    rows = report.stage_rows([1, 2], [[10.0, 20.0], [12.0, 24.0]])
    assert rows[1] == {"stage": 2, "ipc_total": 2, "accuracy_mean": 22.0, "accuracy_std": 2.0}
    text = report.table({"models": {"ConvNet": {"stages": rows, "random": None, "full": rows[0]}}})
    assert "ConvNet  stage 1-2          2                 22.00 ± 2.00" in text


def test_grids_have_one_row_for_each_class(tmp_path):
    from PIL import Image

    pixels = torch.zeros(6, 3, 32, 32)
    pixels[[1, 4]] = 1.0
    report.save_grid(tmp_path / "grid.png", pixels, torch.tensor([0, 1, 2, 0, 1, 2]))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)
        assert picture.getpixel((30, 66 + 30)) == (255, 255, 255) and picture.getpixel((30, 30)) == (0, 0, 0)


def test_loaded_sets_are_checked(distilled):
    union = synset.load_set(distilled / "interval2_epoch3-4")
    assert len(union) == 20 and union.first_learned == 20


def test_stages_that_are_left_out_are_told(distilled, capsys):
    assert len(progressive.find_stages(distilled, 3)) == 3 and capsys.readouterr().err == ""
    assert len(progressive.find_stages(distilled, 2)) == 2
    assert "--num_intervals 2 leaves out 1 more stages" in capsys.readouterr().err

import json
import re
import shutil

import pytest
import torch

import evaluate_mtt
import networks
from networks.reparam import flatten
from tests.conftest import EXPERIMENT, SHORT, STAGES, call, files_of, make_tree, run_script
from tests.support.published import MTT_EXPERIMENT, SEED_COMMANDS, write_mtt
from utils import training
from utils.augment import DSA
from utils.data import datasets
from utils.results import names
from utils.results.load import load_distilled
from utils.results.report import table_rows
from utils.run.streams import stream
from utils.stages import evaluation_config, random_unions, staged_accuracies
from utils.trajectories import load_buffer

QUICK = ["--num_experts", "2", "--num_eval", "2", "--epoch_eval_train", "6", "--full_epochs", "2"]
ALONE = ["--skip_random", "--skip_full"]


@pytest.fixture(scope="module")
def evaluated(distilled, buffers):
    paths = ["--buffer_path", buffers, "--save_path", distilled.parent.parent]
    done = run_script("evaluate_mtt.py", *STAGES, *QUICK, *paths)
    return done.stdout, json.loads((distilled / "report.json").read_text())


@pytest.fixture
def evaluate(distilled, buffers, capsys, monkeypatch):
    """Evaluates the distilled digits; returns (exit status, stderr)."""
    paths = ["--buffer_path", buffers, "--save_path", distilled.parent.parent]
    return lambda *words: call("evaluate_mtt.py", *STAGES, *QUICK, *paths, *words, capsys=capsys,
                               monkeypatch=monkeypatch)  # fmt: skip


def test_report_has_the_documented_form(evaluated, distilled):
    printed, found = evaluated
    assert found["dataset"] == "Digits" and found["model"] == "ConvNetW32"
    assert [(s["stage"], s["ipc_total"]) for s in found["stages"]] == [(1, 1), (2, 2), (3, 3)]
    for row, count in [*((row, 2) for row in found["stages"]), (found["random"], 2), (found["full"], 1)]:
        assert 0 <= row["accuracy_mean"] <= 100 and row["accuracy_std"] >= 0 and row["networks"] == count
    assert found["models"]["ConvNetW32"]["stages"] == found["stages"]
    assert found["config"]["ipc"] == 1 and found["config"]["versions"]["torch"] == torch.__version__
    assert "stage 1-3" in printed and "random real" in printed and "full training set" in printed
    assert f"{found['stages'][2]['accuracy_mean']:.2f}" in printed
    assert (distilled / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not (distilled / "partial").exists()


def step(network, optimizer, images, labels, rng):
    """One epoch of one minibatch, written out."""
    dsa, order = DSA("color_crop_cutout_flip_scale_rotate"), torch.from_numpy(rng.permutation(len(labels)))
    x = dsa.apply(images[order], dsa.draw(len(order), rng))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(x), labels[order]).backward()
    optimizer.step()


def test_each_network_starts_from_its_own_expert_and_carries_momentum(evaluated, distilled, buffers):
    _, found = evaluated
    real = datasets.load("Digits", "", torch.device("cpu"))
    experts = load_buffer(buffers / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
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
            for epoch in range(7):  # of --epoch_eval_train 6: SPEC 8.1
                lr = float(torch.load(folder / "syn_lr_best.pt", weights_only=True))
                optimizer.param_groups[0]["lr"] = lr * (0.1 if epoch > 6 // 2 + 1 else 1)
                step(network, optimizer, images, labels, stream(0, "distilled", "ConvNetW32", k, stage, epoch))
        final.append(training.accuracy(network, real.test))
    assert found["stages"][2]["accuracy_mean"] == pytest.approx(sum(final) / 2)


def test_fresh_starts_are_those_without_experts_and_the_headline(evaluated, evaluate, distilled):
    printed, found = evaluated
    assert "stage 1-3, fresh start" in printed and "last union alone, fresh start" in printed
    last, random, full = found["fresh"][-1], found["random"], found["full"]
    assert found["headline"] == {"row": "fresh", **last,
                                 "over_random": last["accuracy_mean"] - random["accuracy_mean"],
                                 "share_of_full": 100 * last["accuracy_mean"] / full["accuracy_mean"]}  # fmt: skip
    assert f"{last['accuracy_mean'] - random['accuracy_mean']:+.2f}" in printed
    status, message = evaluate("--buffer_path", distilled, "--eval_epochs", "6,2", "--skip_full")
    assert status == 0 and "random initialisations" in message
    without = json.loads((distilled / "report.json").read_text())
    assert without["stages"] == found["fresh"] and "fresh" not in without
    assert without["headline"]["row"] == "stages" and without["headline"]["share_of_full"] is None
    assert without["last_union"] == found["last_union"]
    assert [row["epochs"] for row in without["lengths"]] == [2, 6]
    same = {key: value for key, value in without["lengths"][1].items() if key != "epochs"}
    assert same.items() <= found["fresh"][-1].items() and without["lengths"][0] != without["lengths"][1]


def test_the_last_union_at_once_takes_the_epochs_of_all_stages(evaluated, distilled):
    _, found = evaluated
    real = datasets.load("Digits", "", torch.device("cpu"))
    (folder,) = distilled.glob("interval3_*")
    images, labels, lr = (torch.load(folder / f"{part}_best.pt", weights_only=True)
                          for part in ("images", "labels", "syn_lr"))  # fmt: skip
    final = []
    for k in range(2):
        network = training.new_network("ConvNetW32", real, 0, "start", "ConvNetW32", k)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
        for epoch in range(3 * 7):
            optimizer.param_groups[0]["lr"] = float(lr) * (0.1 if epoch > 20 // 2 + 1 else 1)
            step(network, optimizer, images, labels, stream(0, "last union", "ConvNetW32", k, 0, epoch))
        final.append(training.accuracy(network, real.test))
    assert found["last_union"]["accuracy_mean"] == pytest.approx(sum(final) / 2)


@pytest.mark.parametrize("words", [["--eval_epochs", "0"], ["--eval_epochs", "10,x"]])
def test_wrong_lengths_are_one_line(words, evaluate):
    status, message = evaluate(*words)
    assert status == 2 and "--eval_epochs: expected a whole number >= 1" in message


@pytest.mark.parametrize("mode", ["A", "P", "C"])
def test_pools_of_networks(mode, evaluate, distilled):
    short = ["--num_eval", 1, "--epoch_eval_train", 1, "--override_load_path", EXPERIMENT]
    assert evaluate(*ALONE, *short, "--eval_mode", mode)[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert set(networks.eval_pool(mode, "ConvNetW32")) <= set(found["models"])
    assert found["random"] is None and found["full"] is None


def test_an_evaluation_with_other_networks_completes_the_report(evaluate, distilled, monkeypatch):
    def report():
        return json.loads((distilled / "report.json").read_text())

    short = ["--num_eval", 1, "--epoch_eval_train", 2, "--full_epochs", 1]
    status, message = evaluate(*ALONE, *short, "--eval_models", "ConvNetAS")
    assert status == 0 and "report.json: replaced, its accuracies are of other images or options (" in message
    assert "epoch_eval_train 1 there, 2 now" in message
    first = report()
    assert list(first["models"]) == ["ConvNetAS"] and first["model"] == "ConvNetAS"
    status, message = evaluate(*short, "--skip_full", "--eval_models", "ConvNetNP,self")
    assert status == 0 and "replaced" not in message
    second = report()
    assert list(second["models"]) == ["ConvNetW32", "ConvNetAS", "ConvNetNP"]
    assert second["model"] == "ConvNetW32" and second["stages"] == second["models"]["ConvNetW32"]["stages"]
    assert second["models"]["ConvNetAS"] == first["models"]["ConvNetAS"]
    rows = [(row["network"], row["kind"], row["networks"]) for row in table_rows(second)]
    expected = [("ConvNetW32", 2), ("ConvNetAS", 1), ("ConvNetNP", 1)]  # as many on random real images
    fresh = ["fresh"] * 3 + ["last_union"]
    assert rows == [
        (name, kind, count)
        for name, count in expected
        for kind in ["stages"] * 3 + fresh * (name == "ConvNetW32") + ["random"] * (name != "ConvNetAS")
    ]
    assert evaluate(*short, "--skip_random", "--eval_models", "self")[0] == 0
    own = report()["models"]["ConvNetW32"]
    assert own == second["models"]["ConvNetW32"] | {"full": own["full"]} and own["full"]["networks"] == 1

    before = files_of(distilled)
    monkeypatch.setattr(training, "train", None)  # nothing is left to train
    assert evaluate(*short, "--eval_models", "self")[0] == 0
    assert files_of(distilled) == before


def test_a_report_of_other_images_is_replaced(evaluated, distilled, evaluate):
    words = [*ALONE, "--num_experts", 1, "--epoch_eval_train", 1, "--eval_models"]
    assert evaluate(*words, "ConvNetAS")[0] == 0
    path = distilled / "interval3_epoch5-6" / "images_best.pt"
    images = path.read_bytes()
    torch.save(torch.load(path, weights_only=True).flip(-1), path)
    status, message = evaluate(*words, "self")
    path.write_bytes(images)
    assert status == 0 and "report.json: replaced, its accuracies are of other images or options (images" in message
    assert list(json.loads((distilled / "report.json").read_text())["models"]) == ["ConvNetW32"]


def test_an_evaluation_that_continues_says_what_is_done(evaluate, distilled, monkeypatch):
    words = [*ALONE, "--num_experts", 3, "--epoch_eval_train", 3]
    tested, accuracy = [], training.accuracy

    def stop_in_the_third(*arguments):
        if len(tested) == 2 * 3:
            raise KeyboardInterrupt
        return tested.append(accuracy(*arguments)) or tested[-1]

    monkeypatch.setattr(training, "accuracy", stop_in_the_third)
    status, message = evaluate(*words)
    assert status == 130 and re.search(r"ConvNetW32, distilled, 3 networks, epoch \d+/36, loss=\S+, accuracy=", message)
    monkeypatch.setattr(training, "accuracy", accuracy)
    status, message = evaluate(*words)
    assert status == 0 and "distilled-ConvNetW32: 2 of 3 done already" in message


def test_saved_models_are_lists_of_parameters(evaluate, distilled):
    assert evaluate(*ALONE, "--save_model", "--save_model_prefix", "net")[0] == 0
    saved = torch.load(distilled / "net_ConvNetW32_1.pt", weights_only=True)
    shapes = [p.shape for p in networks.get_network("ConvNetW32", 1, 10, 8).parameters()]
    assert [t.shape for t in saved] == shapes


def test_stage_folders_can_be_named(evaluate, distilled):
    words = [*ALONE, "--num_intervals", 2, "--override_interval_names"]
    assert evaluate(*words, "interval1_epoch1-2.interval3_epoch5-6")[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert [s["ipc_total"] for s in found["stages"]] == [1, 3]
    status, message = evaluate(*words, "interval1_epoch1-2")
    assert status == 2 and "expected 2 names" in message


def test_stages_that_are_left_out_are_told(distilled, capsys):
    assert len(names.find_mtt_stages(distilled, 3)) == 3 and capsys.readouterr().err == ""
    assert len(names.find_mtt_stages(distilled, 2)) == 2
    assert "evaluating 2 of 3 stages; --num_intervals 3 evaluates all" in capsys.readouterr().err


@pytest.fixture
def copied(distilled, buffers, tmp_path, capsys, monkeypatch):
    """A copy of the experiment, and a function that evaluates it: (folder, of words to (status, stderr))."""
    folder = shutil.copytree(distilled, tmp_path / "Digits" / EXPERIMENT)
    words = [*STAGES, *QUICK, *ALONE, "--buffer_path", buffers, "--save_path", tmp_path]
    return folder, lambda *more: call("evaluate_mtt.py", *words, *more, capsys=capsys, monkeypatch=monkeypatch)


def test_a_distillation_that_is_not_finished(copied):
    folder, evaluate = copied
    (folder / "interval3_epoch5-6" / "stage.json").unlink()  # its images are those of the best iteration so far
    status, message = evaluate()
    assert status == 2 and message == (
        f"error: {folder}: expected 3 finished stages, found stages 1 to 2; finish with the same distillation "
        "command, or evaluate what is there with --num_intervals 2\n"
    )
    status, message = evaluate("--num_intervals", 2)
    assert status == 0 and "evaluating" not in message


def run_published(number, published, epochs, tree, tmp_path):
    """Run a row in its own words, made short by options that its folder's name does not hold."""
    data = ["--data_path", tree, "--buffer_path", tmp_path / "buffers"]
    # Small minibatches, so that experts on so few images move about as far as students do.
    run_script("buffer_mtt.py", *published.split(), *data, "--num_experts", 1, "--train_epochs", epochs,
               "--batch_train", {0: 4, 1: 4, 4: 8}.get(number, 32))  # fmt: skip
    distillation, evaluation = (command.split() for command in SEED_COMMANDS[number])
    batches = {0: (2, 12), 1: (8, 4), 4: (8, 8)}.get(number, (8, 32))
    short = ["--Iteration", 1, "--batch_syn", batches[0], "--batch_train", batches[1], "--num_eval", 1]
    run_script("distill_mtt.py", *distillation, *data, "--root_log_dir", tmp_path / "logs", *short,
               "--override_epoch_eval_train", 1)  # fmt: skip
    done = run_script("evaluate_mtt.py", *evaluation, *data, "--save_path", tmp_path / "logs", "--num_experts", 1,
                      "--epoch_eval_train", 1, "--num_eval", 1, *ALONE)  # fmt: skip
    assert "stage 1-5" in done.stdout
    return sorted(path.name for path in (tmp_path / "logs").glob("*/*/interval*"))


CIFAR_EXPERTS = "--dataset=CIFAR10 --model=ConvNet --train_epochs=50 --num_experts=100 --zca"


@pytest.mark.long
def test_a_published_command_runs_from_experts_to_report(cifar_tree, tmp_path):
    stages = run_published(0, CIFAR_EXPERTS, 7, cifar_tree, tmp_path)
    assert stages == [f"interval{p}_epoch{5 * p - 4}-{5 * p}" for p in range(1, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_published_command_runs_from_experts_to_report(number, tmp_path):
    """Takes half an hour: python -m pytest -m slow."""
    classes, size, part = ((10, 32, "test"), (100, 32, "test"), (200, 64, "val"))[number // 2]
    images = {4: 3, 5: 10}.get(number, 12)  # of each class; 200 classes of 64 pixels take long
    tree = make_tree(tmp_path / "data", [f"class{n:03d}" for n in range(classes)], images, 1, size, part, wrong=0.5)
    published = CIFAR_EXPERTS.replace("CIFAR10", "CIFAR100") if number in (2, 3) else CIFAR_EXPERTS
    if number >= 4:
        published = "--dataset Tiny --model=ConvNetD4 --train_epochs 24"
    reach = {1: 15, 2: 20, 3: 20, 4: 20, 5: 20}[number]
    stages = run_published(number, published, reach + 3, tree, tmp_path)
    assert sorted(stages) == sorted(f"interval{p}_epoch{reach * (p - 1) + 1}-{reach * p}" for p in range(1, 6))


WORDS = ["--dataset", "CIFAR10", "--model", "ConvNetW32", "--ipc", 1, "--num_intervals", 2, "--max_start_epoch", 2]
both_formats = pytest.mark.parametrize("new_format", [True, False])


@pytest.fixture
def published(new_format, cifar_tree, tmp_path, capsys, monkeypatch):
    """Published files, and a function that evaluates them: (experiment's folder, of words to (status, stderr))."""
    paths = ["--data_path", cifar_tree, "--buffer_path", tmp_path / "buffers", "--save_path", tmp_path / "logs",
             "--override_load_path", MTT_EXPERIMENT]  # fmt: skip

    def run(*words):
        words = [*WORDS, *QUICK, *paths, *words]
        return call("evaluate_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)

    return write_mtt(tmp_path, new_format), run


def experts_file(experiment):
    return experiment.parents[2] / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt"


@both_formats
def test_published_files_are_read_as_they_are(published):
    folder, evaluate = published
    assert isinstance(load_buffer(experts_file(folder))[0][0][0], torch.nn.Parameter)
    status, message = evaluate("--skip_full")
    assert status == 0 and "no experts" not in message, message
    found = json.loads((folder / "report.json").read_text())
    assert [s["ipc_total"] for s in found["stages"]] == [1, 2]
    data = load_distilled(folder)
    assert not data.images.requires_grad and data.syn_lr == pytest.approx(0.012) and data.stage.tolist()[9:11] == [1, 2]


@both_formats
def test_published_experts_and_unions_are_distilled_on(published, cifar_tree, tmp_path, capsys, monkeypatch):
    """Stage 2 from the published union of stage 1 and the published experts in its folder."""
    folder, _ = published
    shutil.rmtree(folder / "interval2_epoch3-4")
    shutil.copy(experts_file(folder), folder / "interval1_epoch1-2")
    words = ["--start_interval", 2, "--expert_epochs", 1, "--syn_steps", 2, "--Iteration", 1, "--num_eval", 1,
             "--override_epoch_eval_train", 1, "--override_experiment_path", folder]  # fmt: skip
    status, message = call("distill_mtt.py", *WORDS, "--data_path", cifar_tree, *words, capsys=capsys,
                           monkeypatch=monkeypatch)  # fmt: skip
    assert status == 0, message
    before, after = (load_distilled(folder, stage=stage).images for stage in (1, 2))
    assert torch.equal(after[:10], before) and len(after) == 20


OTHER_SHAPES = [
    ("images_best.pt", torch.zeros(20, 3, 16, 16), "expected images 3x32x32 for CIFAR10, found 3x16x16"),
    ("images_best.pt", torch.zeros(19, 3, 32, 32), "labels_best.pt: expected 19 integer labels"),
    ("labels_best.pt", torch.zeros(20, 1).long(), r"or soft labels \(N, K\), found shape \(20, 1\)"),
    ("syn_lr_best.pt", torch.ones(3), r"expected one number, found shape \(3,\)"),
]


@pytest.mark.parametrize("name,tensor,words", OTHER_SHAPES)
@both_formats
def test_published_files_of_another_shape_are_named(new_format, name, tensor, words, published):
    folder, evaluate = published
    path = folder / "interval2_epoch3-4" / name
    torch.save(tensor, path, _use_new_zipfile_serialization=new_format)
    status, message = evaluate()
    *notes, error = message.splitlines()
    assert status == 2 and re.search(words, error), message
    assert error.startswith(f"error: {path.parent}") and "_best.pt: " in error
    assert all(note.startswith("note: ") for note in notes)


@both_formats
def test_published_experts_of_another_shape_are_named(new_format, published):
    folder, evaluate = published
    path = experts_file(folder)
    trajectories = load_buffer(path, mmap=False)
    trajectories[1][0][2] = torch.nn.Parameter(torch.zeros(33))
    torch.save(trajectories, path, _use_new_zipfile_serialization=new_format)
    status, message = evaluate()
    assert status == 2 and message.splitlines()[-1].startswith(f"error: {path}: ") and "found (33,)" in message


# Soft labels, and learning rates of stages ----------------------------------------------------------------------------


def test_soft_labels_stand_beside_hard_ones_and_softened_random_images(buffers, tmp_path, capsys, monkeypatch):
    stages_words = [*STAGES, "--num_intervals", 2, "--buffer_path", buffers]
    soft = ["--soft_labels", "--soft_temperature", 2, "--lr_label", 5, "--root_log_dir", tmp_path / "soft"]
    status, message = call("distill_mtt.py", *stages_words, *SHORT, *soft, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, message
    shutil.copytree(tmp_path / "soft", tmp_path / "hard")
    for path in (tmp_path / "hard").rglob("classes_best.pt"):
        path.replace(path.with_name("labels_best.pt"))
    found = {}
    for kind in ("soft", "hard"):
        words = [*stages_words, *QUICK, "--skip_full", "--save_path", tmp_path / kind]
        status, message = call("evaluate_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
        assert status == 0, message
        folder = tmp_path / kind / "Digits" / EXPERIMENT
        found[kind] = json.loads((folder / "report.json").read_text())["models"]["ConvNetW32"]
        assert not (folder / "partial").exists()
    assert "hard" not in found["hard"] and "random_soft" not in found["hard"]
    assert found["soft"]["random"] == found["hard"]["random"]
    mean = {kind: row["accuracy_mean"] for kind, row in found["soft"].items() if kind in ("hard", "random_soft")}
    assert mean["hard"] == found["hard"]["stages"][-1]["accuracy_mean"] != found["soft"]["stages"][-1]["accuracy_mean"]
    rows = table_rows({"models": {"ConvNetW32": found["soft"]}, "config": {}})
    assert [row["trained_on"] for row in rows] == [
        "stage 1-1", "stage 1-2", "the same, hard labels", "stage 1-1, fresh start", "stage 1-2, fresh start",
        "last union alone, fresh start", "random real", "random real, soft labels",
    ]  # fmt: skip

    real, accuracies = datasets.load("Digits", "", torch.device("cpu")), []
    experts = load_buffer(buffers / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
    (transition,) = (tmp_path / "soft").rglob("interval1_*/replay_buffer_0.pt")
    config = evaluation_config(6, 0.03, 128, DSA("color_crop_cutout_flip_scale_rotate"))
    teachers = [training.new_network("ConvNetW32", real, 0) for _ in range(2)]
    for teacher, expert in zip(teachers, (experts[0], load_buffer(transition)[0]), strict=True):
        torch.nn.utils.vector_to_parameters(flatten(expert[-1]), teacher.parameters())
    for k in range(2):
        network = training.new_network("ConvNetW32", real, 0)
        torch.nn.utils.vector_to_parameters(flatten(experts[k][0]), network.parameters())
        unions = random_unions(real, [(0, 1), (0, 2)], 0, (k,))
        with torch.no_grad():
            for number, union in enumerate(unions):  # the second one has an image of each stage in every class
                of_stages = [(teacher(union.batch(slice(None))[0]) / 2).softmax(1) for teacher in teachers]
                union.labels = of_stages[0]
                if number:
                    union.labels[1::2] = of_stages[1][1::2]
        keys = ("random", "ConvNetW32", k)
        accuracies.append(staged_accuracies(network, unions, lambda _: config, real.test, 0, keys)[-1][-1])
    assert mean["random_soft"] == pytest.approx(sum(accuracies) / 2)


def test_every_stage_can_have_its_own_factor_on_the_learning_rate(evaluate, distilled, monkeypatch):
    rates, union_config = [], evaluate_mtt.mtt.union_config

    def note(args, real, epochs, lr, dsa):
        rates.append(float(lr))
        return union_config(args, real, epochs, lr, dsa)

    monkeypatch.setattr(evaluate_mtt.mtt, "union_config", note)
    assert evaluate("--stage_lr", "1,0.5,2", "--num_experts", 1, *ALONE, "--skip_fresh")[0] == 0
    learned = [
        float(torch.load(path / "syn_lr_best.pt", weights_only=True)) for path in sorted(distilled.glob("interval*"))
    ]
    assert rates == pytest.approx([learned[0], 0.5 * learned[1], 2 * learned[2]])

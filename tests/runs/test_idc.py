import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import distill_idc
import evaluate_idc
from tests.conftest import call, files_of, make_tree, run_script
from tests.support.published import IDC_COMMANDS, write_idc
from utils import forgetting, idc_runs, training
from utils.data import datasets
from utils.options import idc as idc_options
from utils.results import compare
from utils.results.names import idc_learned
from utils.results.report import table_rows
from utils.run.errors import UserError
from utils.synthetic import SyntheticSet

D, E = "distill_idc.py", "evaluate_idc.py"
SHORT = shlex.split(
    "-d digits --ipc 2 --num-intervals 3 --niter 0.04 --inner_loop 2 --epochs 5 --net_epoch 1 --n_data 64 "
    "--batch_real 8"
)
NAME = "conv2in_w0.25_grad_mse_nd64_inloop2_cut_niter0.04_factor1_lr0.05_b_real8_random_ipc2"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    run_script(D, *SHORT, "--results", root)
    return root / "digits" / NAME


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script in this process; returns (exit status, stderr)."""
    return lambda script, *words: call(script, *words, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("words,folder", IDC_COMMANDS[:4])
def test_published_commands_run_and_evaluate(words, folder, tmp_path):
    """Shortened by options that the folder's name shows; takes minutes: python -m pytest -m slow."""
    dataset = "cifar100" if "cifar100" in words else "cifar10"
    classes = 100 if dataset == "cifar100" else 10
    tree = make_tree(tmp_path / "data", [f"class{n:03d}" for n in range(classes)], 48, 1)
    short = ["--niter", "0.01", "--inner_loop", "1", "--epochs", "5", "--num-intervals", "2"]
    both = [*shlex.split(words), "--data_dir", tree, "--results", tmp_path / "results", *short]
    run_script(D, *both)
    name = re.sub(r"niter\d+", "niter0.01", folder.replace("nd2000", "nd2000_inloop1"))
    images = [torch.load(tmp_path / "results" / name / f"interval_{s}_data.pt", weights_only=True)[0] for s in (0, 1)]
    assert len(images[1]) == 2 * len(images[0])
    both = [word for word in both if word not in ("--start-interval", "0")]
    done = run_script(E, *both, "--eval_models", "self", "--epochs", 1, "--skip_full", "--skip_random")
    assert "stage 1-2" in done.stdout


def test_files_have_the_documented_names_and_forms(distilled):
    names = {path.name for path in distilled.iterdir()}
    for stage in range(3):
        wanted = {"data.pt", "init.png", "img2.png", "metrics.jsonl"}
        assert {f"interval_{stage}_{name}" for name in wanted} | {f"interval_{stage}.json"} <= names
        images, labels = torch.load(distilled / f"interval_{stage}_data.pt", weights_only=True)
        assert images.shape == (20 * (stage + 1), 1, 8, 8) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert labels.dtype == torch.int64 and labels.tolist() == sorted(list(range(10)) * 2 * (stage + 1))
    assert {"args.txt", "log.txt", "config.json"} <= names
    assert not any(name.endswith("checkpoint.pt") or name == "partial" for name in names)
    assert "ipc: 2\n" in (distilled / "args.txt").read_text()
    assert "accuracy_mean" in (distilled / "log.txt").read_text()


def test_positions_are_side_by_side_and_frozen_bits_stay(distilled):
    unions = [torch.load(distilled / f"interval_{s}_data.pt", weights_only=True)[0] for s in range(3)]
    positions = [union.view(10, 2, s + 1, 1, 8, 8) for s, union in enumerate(unions)]
    for stage in (1, 2):
        assert torch.equal(positions[stage][:, :, :stage], positions[stage - 1])
    assert not torch.equal(positions[2][:, :, 2], positions[2][:, :, 1])


def test_images_have_moved_and_the_last_iteration_is_saved(distilled):
    real = datasets.load("Digits", "", torch.device("cpu"))
    digits = {tuple(x.flatten().tolist()) for x in real.train.images.float() / 255}
    images = torch.load(distilled / "interval_0_data.pt", weights_only=True)[0]
    assert not any(tuple(x.flatten().tolist()) in digits for x in images)
    rows = [json.loads(line) for line in (distilled / "interval_0_metrics.jsonl").read_text().splitlines()]
    assert [(r["iteration"], "loss" in r) for r in rows] == [(2, True), (2, False)]


def test_two_runs_are_bit_identical(distilled, run, tmp_path):
    assert run(D, *SHORT, "--results", tmp_path)[0] == 0
    found, expected = files_of(tmp_path / "digits" / NAME), files_of(distilled)
    for key in ("config.json", "args.txt"):
        found.pop(key), expected.pop(key)
    assert found.keys() >= {k for k in expected if k.startswith("interval")}
    assert [k for k in found if k in expected and found[k] != expected[k]] == []


def test_start_interval_goes_on_from_what_is_on_disk(distilled, run, tmp_path):
    folder = tmp_path / "digits" / NAME
    folder.mkdir(parents=True)
    (folder / "interval_1_data.pt").write_bytes((distilled / "interval_1_data.pt").read_bytes())
    assert run(D, *SHORT, "--results", tmp_path, "--start-interval", 2)[0] == 0
    assert (folder / "interval_2_data.pt").read_bytes() == (distilled / "interval_2_data.pt").read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        "--match feat --f_idx 0,1",
        pytest.param("-n densenet --lr_img 1e-5 --ipc 6", marks=pytest.mark.long),
        "--metric l1 --factor 3",
        "--factor 2 --decode_type multi --batch_syn_max 4 --init noise",
        "--factor 2 --decode_type bound --early 1 --fix_iter 2",
        "--mixup vanilla --mixup_net vanilla --transition_pool 1 --transition_batch 2",
        "--norm_type batch --metric cos",
        "--norm_type sn --metric l1_mean --bias True --fc True --time --save_ckpt True",
        "-n resnet --depth 10 --width 0.0625 --repeat 2",
    ],
)
def test_variants_run_and_evaluate(extra, run, tmp_path):
    words = [*SHORT, "--num-intervals", 2, "--batch_real", 4, "--epochs", 2, "--results", tmp_path]
    assert run(D, *words, *extra.split())[0] == 0
    extra = extra.partition("--transition_pool")[0]  # it is no option of evaluate_idc.py
    assert run(E, *words, *extra.split(), "--skip_full", "--skip_random")[0] == 0
    (path,) = tmp_path.rglob("report.json")
    assert len(json.loads(path.read_text())["stages"]) == 2


def test_pretrained_networks(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "--num-intervals", 2, "--pt_from", 1, "--pt_num", 2]
    status, message = run(D, *words)
    assert status == 2 and "expected pretrained networks" in message
    for seed in (3, 4):  # SPEC 8.15: epochs 1 and 2 of all seeds
        assert run(D, *words, "--pretrain", "--seed", seed)[0] == 0
    folder = tmp_path / "pretrained" / "digits" / "conv2in_w0.25"
    assert {p.name for p in folder.iterdir()} == {f"network_{s}_epoch{e}.pt" for s in (3, 4) for e in (1, 2)}
    loaded, load, starts = [], distill_idc.load_pretrained, []
    monkeypatch.setattr(
        distill_idc, "load_pretrained", lambda path, network: (loaded.append(path), load(path, network))[1]
    )
    monkeypatch.setattr(training, "train_together", lambda *_, **__: starts.append(1))
    assert run(D, *words, "--niter", "0.4", "--inner_loop", 1, "--epochs", 1, "--test")[0] == 0
    assert len(set(loaded)) == 4 and not starts  # nothing is taught by earlier unions


def test_a_stage_that_was_interrupted_is_no_start(distilled, run, tmp_path):
    folder = shutil.copytree(distilled, tmp_path / "digits" / distilled.name)
    (folder / "interval_0.json").unlink()
    before = files_of(tmp_path)
    status, message = run(D, *SHORT, "--results", tmp_path, "--start-interval", 1)
    assert status == 2 and "expected stage 1 finished, found it interrupted; continue it" in message
    assert files_of(tmp_path) == before


def test_a_stage_that_stops_after_its_first_images_is_not_finished(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise UserError("stopped before the first row of the log")

    monkeypatch.setattr(idc_runs.Log, "write", stop)
    assert run(D, *SHORT, "--results", tmp_path)[0] == 2
    folder = tmp_path / "digits" / NAME
    assert (folder / "interval_0_data.pt").exists() and not idc_learned(folder, 1)


@pytest.mark.parametrize("words", [["--width", 0.5], ["--depth", 3], ["--norm_type", "batch"]])
def test_another_network_is_not_the_distillations_own(words, distilled, run):
    words = [*words, "--override-load-dir", distilled, "--dry_run"]
    status, message = run(E, *SHORT, *words)
    assert status == 2 and f"{distilled}: made with {words[0]}" in message
    assert run(E, *SHORT, *words, "--eval_models", "resnet10")[0] == 0  # which the option does not change


def test_a_dry_run_refuses_what_the_run_would_refuse(distilled, run):
    before = files_of(distilled)
    status, message = run(D, *SHORT, "--results", distilled.parent.parent, "--seed", 3, "--dry_run")
    assert status == 2 and "holds a run with other options (seed" in message
    assert files_of(distilled) == before


def test_a_result_that_is_not_there_is_not_to_be_finished(run, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        status, message = run(E, *SHORT, "--override-load-dir", folder)
        assert status == 2 and "found no stage; give the options it was made with, or its folder with" in message


def test_another_ipc_than_the_results_is_refused(distilled, run):
    status, message = run(E, *SHORT, "--ipc", 3, "--override-load-dir", distilled)
    assert status == 2 and "expected 3 images of each class, found 2; check --ipc" in message


def test_evaluation_reports_every_mode(distilled, run):
    base = [*SHORT, "--results", distilled.parent.parent, "--epochs", 2, "--full_epochs", 1]
    alone = ["--skip_random", "--skip_full"]

    def report(*words, folder=distilled):
        assert run(E, *base, *words)[0] == 0
        return json.loads((folder / "report.json").read_text())

    found = report("--eval_models", "self,resnet10,densenet", "--epochs", 1, *alone)
    assert list(found["models"]) == ["conv2in_w0.25", "resnet10", "densenet"]
    found = report("--repeat", 2, "--eval_epochs", "2,1")
    assert list(found["models"]) == ["conv2in_w0.25"]
    assert [row["epochs"] for row in found["lengths"]] == [1, 2]
    assert found["lengths"][1]["accuracy_mean"] == found["stages"][-1]["accuracy_mean"]
    assert [s["ipc_total"] for s in found["stages"]] == [2, 4, 6] and found["random"] and found["full"]
    for extra, totals, words in (
        (["--new_only"], [2, 2, 2], ["stage 1", "stage 2", "stage 3"]),
        (["--last_only"], [6], ["stage 1-3"]),
        (["--same_compute", "True"], [2, 4, 6], ["stage 1-1", "stage 1-2", "stage 1-3"]),
    ):
        found = report(*extra, *alone)
        assert [s["ipc_total"] for s in found["stages"]] == totals and found["random"] is None
        assert [row["trained_on"] for row in table_rows(found)] == words
    chosen = report("--slct_type", "random", *alone, folder=distilled.with_name(f"{distilled.name}_random"))
    assert [s["ipc_total"] for s in chosen["stages"]] == [2, 4, 6] and chosen["random"] is None
    assert json.loads((distilled / "report.json").read_text()) == found  # the learned images' own
    assert compare.read(distilled.with_name(f"{distilled.name}_random")).method == "random real"


both_formats = pytest.mark.parametrize("new_format", [True, False])


@pytest.fixture
def published(new_format, cifar_tree, run, tmp_path):
    """Published files, and a function that evaluates them: (folder, function without arguments to (status, stderr))."""
    folder = tmp_path / "published"
    write_idc(folder, new_format)
    words = ["--reproduce", "-d", "cifar10", "-f", 2, "--ipc", 2, "--override-load-dir", folder, "--num-intervals", 2,
             "--epochs", 1, "--eval_models", "self", "--skip_full", "--data_dir", cifar_tree]  # fmt: skip
    return folder, lambda: run(E, *words)


@both_formats
def test_published_files_are_read_as_they_are(published):
    folder, evaluate = published
    assert evaluate()[0] == 0
    assert json.loads((folder / "report.json").read_text())["stages"][1]["ipc_total"] == 4


@both_formats
@pytest.mark.parametrize(
    "index,tensor,words",
    [
        (0, torch.zeros(40, 3, 28, 28), "expected images 3x32x32 for CIFAR10, found 3x28x28"),
        (0, torch.zeros(40, 1, 32, 32), "found 1x32x32"),
        (0, torch.zeros(39, 3, 32, 32), r"expected \[images"),
        (1, torch.zeros(40, 1).long(), r"expected \[images"),
    ],
)
def test_published_files_of_another_shape_are_named(index, tensor, words, new_format, published):
    folder, evaluate = published
    path = folder / "interval_1_data.pt"
    value = torch.load(path, weights_only=True)
    value[index] = tensor
    torch.save(value, path, _use_new_zipfile_serialization=new_format)
    status, message = evaluate()
    assert status == 2 and re.search(words, message), message
    assert message.splitlines()[-1].startswith(f"error: {path}: ")


@pytest.mark.parametrize(
    "words,message",
    [
        ("-d digits", "--ipc: expected the number of images"),
        ("-d digits --ipc 0", "expected a whole number >= 1"),
        ("-d digits --ipc 3 -f 9", "larger than the images of 8 pixels"),
        ("-d digits --ipc 5000", "class '0' of Digits: expected at least 5000 training images"),
        ("-d digits --ipc 1 --num-intervals 2 --start-interval 2", "expected less than --num-intervals 2"),
        ("-d digits --ipc 1 --start-interval 1", "found no file"),
        ("-d digits --ipc 1 --pt_from 3", "expected pretrained networks"),
        ("-d digits --ipc 1 --pt_from 3 --transition_pool 2", "--transition_pool: changes nothing with --pt_from"),
        ("-d digits --ipc 1 --metric l3", "invalid choice"),
        ("-d imagenet --ipc 1 --nclass 101", "expected 2 to 100"),
        ("-d cifar10 --ipc 1 --data_dir /nowhere/x", "/nowhere/x"),
        ("-d digits --ipc 1 -n resnet --depth 11", "depth 11"),
    ],
)
def test_mistakes_on_the_command_line(words, message, run, tmp_path):
    status, found = run(D, *words.split(), "--results", tmp_path)
    assert status == 2 and message in found and found.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_infinite_losses_stop_the_run_and_keep_the_last_good_files(distilled, run, tmp_path):
    for path in distilled.glob("interval_0*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = files_of(tmp_path)
    status, message = run(D, *SHORT, "--lr_img", "1e38", "--override-save-dir", tmp_path, "--start-interval", 1)
    assert status == 2 and re.search(r"stage 2, outer iteration \d.* lower --lr_img", message.splitlines()[-1])
    assert {k: files_of(tmp_path)[k] for k in before} == before
    assert not (tmp_path / "interval_1_data.pt").exists()


def test_a_folder_of_another_run_is_refused(distilled, run):
    status, message = run(D, *SHORT, "--results", distilled.parent.parent, "--seed", 3)
    assert status == 2 and "seed 0 there, 3 now" in message


def test_pools_and_batches_of_transition_networks(distilled, run, tmp_path):
    words = [*SHORT, "--num-intervals", 2, "--override-save-dir"]
    assert run(D, *words, tmp_path / "two", "--transition_batch", 2)[0] == 0
    assert run(D, *words, tmp_path / "pool", "--transition_pool", 1)[0] == 0
    one, two, pool = ((f / "interval_1_data.pt").read_bytes() for f in (distilled, tmp_path / "two", tmp_path / "pool"))
    assert one == two and one != pool


# What the release does -----------------------------------------------------------------------------------------------


def digits():
    return datasets.load("Digits", "", torch.device("cpu"))


def parsed(module, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    return module.parse()


def test_a_subset_starts_from_every_second_pixel_of_real_images(run, tmp_path):  # SPEC 8.8
    """With steps too small to move a pixel, the saved images are the first ones."""
    words = [*SHORT, "-f", 2, "--num-intervals", 1, "--lr_img", 1e-30, "--test", "--results", tmp_path]
    assert run(D, *words)[0] == 0
    images, labels = torch.load(tmp_path / "test" / "interval_0_data.pt", weights_only=True)
    real = digits().train
    halves = {
        label: {tuple(x.flatten().tolist()) for x in real.images[real.labels == label][:, :, ::2, ::2]}
        for label in range(10)
    }
    assert float((255 * images - (255 * images).round()).abs().max()) < 1e-4
    for image, label in zip((255 * images).round().byte(), labels.tolist(), strict=True):
        parts = [image[:, y : y + 4, x : x + 4].flatten().tolist() for y in (0, 4) for x in (0, 4)]
        assert set(map(tuple, parts)) <= halves[label] and len(set(map(tuple, parts))) == 4


def test_a_test_evaluates_nothing_and_writes_to_a_folder_of_its_own(run, tmp_path, monkeypatch):  # SPEC 8.16
    monkeypatch.setattr(idc_runs, "staged_accuracies", None)  # nobody may call it
    assert run(D, *SHORT, "--num-intervals", 1, "--test", "--results", tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
    assert (tmp_path / "test" / "interval_0_data.pt").exists()
    assert "accuracy_mean" not in (tmp_path / "test" / "interval_0_metrics.jsonl").read_text()


def test_evaluations_inside_a_stage_begin_each_union_with_a_new_optimiser(run, tmp_path, monkeypatch):  # SPEC 8.12
    given, train = [], training.train

    def note(network, images, config, seed, keys, optimizer=None, **more):
        given.append((keys[0], optimizer, config.epochs))
        return train(network, images, config, seed, keys, optimizer, **more)

    together, earlier = training.train_together, []
    monkeypatch.setattr(training, "train", note)
    monkeypatch.setattr(
        training, "train_together", lambda *a, **k: (earlier.append((a[2].epochs, len(a[1]))), together(*a, **k))[1]
    )
    words = [*SHORT, "--num-intervals", 3, "--epochs", 11, "--early", 1, "--results", tmp_path]
    assert run(D, *words)[0] == 0
    evaluated = [(optimizer, epochs) for kind, optimizer, epochs in given if kind == "evaluation"]
    assert evaluated == [(None, 11)] * (1 + 2 + 3)  # once in each stage, through all unions
    # Two outer iterations in each stage, 11 // 5 epochs on each earlier union of 20 images a stage.
    assert earlier == [(2, 20)] * 2 + [(2, 20), (2, 40)] * 2
    assert {epochs for kind, _, epochs in given if kind == "early"} == {1}


@pytest.mark.parametrize("decode,expected", [("bound", 180), ("single", 180), ("multi", 20 * (1 + 4 + 9))])
def test_evaluations_decode_bound_images_as_single_ones(decode, expected, monkeypatch):  # SPEC 8.11
    """ImageNet-10 -f 3 --ipc 20: 20 * 3 * 3 = 180 images of each class, where the distillation sees 125."""
    real = digits()
    union = SyntheticSet(torch.rand(200, 1, 8, 8), torch.arange(10).repeat_interleave(20), counts=[200])
    words = ["-d", "digits", "-f", 3, "--ipc", 20, "--decode_type", decode]
    args = parsed(evaluate_idc, monkeypatch, *words)
    assert torch.bincount(evaluate_idc.decoded(union, args, real).labels).tolist() == [expected] * 10
    if decode == "bound":
        args = parsed(distill_idc, monkeypatch, *words)
        assert torch.bincount(idc_runs.Run(args, real, idc_options).decoded(union).labels).tolist() == [125] * 10


def test_an_evaluation_reports_the_last_and_the_best_of_its_checks(distilled, run, monkeypatch):  # SPEC 8.11
    base = [*SHORT, "--results", distilled.parent.parent, "--skip_random", "--full_epochs", 2]
    measured, accuracy = [], training.accuracy
    monkeypatch.setattr(training, "accuracy", lambda *a: measured.append(accuracy(*a)) or measured[-1])
    assert run(E, *base, "--epochs", 60)[0] == 0
    found = json.loads((distilled / "report.json").read_text())
    assert len(measured) == 3 * 50 + 1
    for stage, row in enumerate(found["stages"]):
        own = measured[50 * stage : 50 * (stage + 1)]
        assert row["checks"] == 50 and row["best_mean"] == max(own) and row["accuracy_mean"] == own[-1]
    assert "best_mean" not in found["full"]
    measured.clear()
    assert run(E, *base, "--epochs", 4, "--checks", 2, "--skip_full")[0] == 0
    assert len(measured) == 6 and json.loads((distilled / "report.json").read_text())["stages"][0]["checks"] == 2


@pytest.mark.parametrize("stages,halved", [(5, []), (6, []), (7, [5, 6]), (8, [5, 6, 7])])  # unions from 0
def test_the_learning_rate_halves_where_a_seventh_union_follows(stages, halved, monkeypatch):  # SPEC 8.16
    args = parsed(evaluate_idc, monkeypatch, *SHORT, "--num-intervals", stages, "--lr", 0.4)
    model = evaluate_idc.eval_model("self", args, digits(), [None] * stages)
    assert [config.lr for config in model.configs["distilled"]] == [0.2 if i in halved else 0.4 for i in range(stages)]


@pytest.mark.parametrize("factor,epochs", [(1, 100), (2, 25), (3, 11)])
def test_the_same_compute_is_a_share_of_the_epochs(factor, epochs, monkeypatch):  # SPEC 8.16
    words = [*SHORT, "-f", factor, "--epochs", 100, "--same_compute"]
    for given, expected in (("True", epochs), ("False", 100)):
        model = evaluate_idc.eval_model("self", parsed(evaluate_idc, monkeypatch, *words, given), digits(), [None] * 3)
        assert [config.epochs for config in model.configs["distilled"]] == [expected] * 3


def test_sets_of_other_methods_are_evaluated(run, tmp_path):  # SPEC 8.18
    """Real digits in the files of DSA and KIP teach a network; the report stands beside the file."""
    real = digits()
    index = np.concatenate([indices[:10] for indices in real.class_indices])
    images, labels = real.train.batch(torch.from_numpy(index))
    torch.save({"data": [[images, labels]]}, tmp_path / "dsa.pt")
    np.savez(tmp_path / "kip.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.eye(10)[labels.numpy()])
    for name, method in (("dsa.pt", "dsa"), ("kip.npz", "kip")):
        words = ["-d", "digits", "-s", method, "--epochs", 60, "--eval_models", "self", "--skip_full", "--skip_random"]
        status, message = run(E, *words, "--override-load-dir", tmp_path / name)
        assert status == 0, message
        folder = tmp_path / f"{method}_evaluation"
        (row,) = json.loads((folder / "report.json").read_text())["stages"]
        assert row["ipc_total"] == 10 and row["accuracy_mean"] > 50
    status, message = run(E, "-d", "digits", "-s", "dsa", "--ipc", 1)
    assert status == 2 and "-s dsa: expected its file with --override-load-dir" in message


def test_a_result_is_evaluated_as_it_was_made(distilled, run, tmp_path):
    folder = shutil.copytree(distilled, tmp_path / "own name")
    words = ["-d", "digits", "--ipc", 2, "--num-intervals", 3, "--override-load-dir", folder]
    status, message = run(E, *words, "-f", 2)
    assert status == 2 and message.endswith(
        f"error: {folder}: made with --factor 1, found --factor 2; give --factor 1\n"
    )
    status, message = run(E, *words, "--decode_type", "multi")
    assert status == 2 and "made with --decode_type single, found --decode_type multi" in message


def test_networks_that_cannot_be_trained_are_refused_before_any_work(run, tmp_path):
    """Batch normalisation of one image whose last map is one pixel; no channels at all."""
    words = [*SHORT, "--ipc", 1, "--results", tmp_path]
    for extra, expected in (
        (["-n", "resnet", "--depth", 10], "network resnet10in_w0.25 on Digits: Expected more than 1 value per channel"),
        (["--width", "0.005"], "network conv2in_w0.005 on Digits: "),
    ):
        status, message = run(D, *words, *extra)
        assert status == 2 and message.splitlines()[-1].startswith("error: ") and expected in message
    assert not list(tmp_path.iterdir())


def test_pretraining_can_be_looked_at_first(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(D, *SHORT, "--pretrain", "--pt_from", 1, "--pt_num", 2, "--dry_run")[0] == 0
    assert not list(tmp_path.iterdir())


def test_images_are_matched_with_the_gradients_of_an_efficientnet(cifar_tree, run, tmp_path):  # SPEC 8.18
    words = ["-d", "cifar10", "--data_dir", cifar_tree, "-n", "efficient", "--ipc", 2, "--num-intervals", 1, "--test"]
    words += ["--niter", "0.01", "--inner_loop", 1, "--batch_real", 2, "--n_data", 8, "--batch_size", 8]
    status, message = run(D, *words, "--lr_img", 1e-5, "--results", tmp_path)
    assert status == 0, message
    assert torch.load(tmp_path / "test" / "interval_0_data.pt", weights_only=True)[0].shape == (20, 3, 32, 32)


def test_a_run_of_an_earlier_version_is_not_continued(distilled, run, tmp_path):
    """Its finished results are left alone; an unfinished one is refused."""
    for path in distilled.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("behaviour") == 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    words = [*SHORT, "--results", distilled.parent.parent, "--override-save-dir", tmp_path]
    assert run(D, *words)[0] == 0
    (tmp_path / "interval_2.json").unlink()
    before = files_of(tmp_path)
    status, message = run(D, *words)
    assert status == 2 and f"{tmp_path}: begun by an earlier version" in message
    assert files_of(tmp_path) == before


def test_later_stages_do_without_easy_images(distilled, run, tmp_path, monkeypatch):
    """--drop_easy; a share of 0 changes nothing."""
    monkeypatch.setattr(idc_runs, "FORGETTING_EPOCHS", 2)
    monkeypatch.setattr(forgetting, "NETWORKS", 2)
    matched, scored, score = [], [], forgetting.training_scores

    class Noted(distill_idc.GradientMatcher):
        def __init__(self, real, *rest):
            super().__init__(real, *rest)
            matched.append(real)

    monkeypatch.setattr(distill_idc, "GradientMatcher", Noted)
    monkeypatch.setattr(forgetting, "training_scores", lambda *a: scored.append(score(*a)) or scored[-1])
    assert run(D, *SHORT, "--override-save-dir", tmp_path / "all", "--drop_easy", "0.0")[0] == 0
    assert not scored and {len(real.train) for real in matched} == {1437}
    for stage in range(3):
        name = f"interval_{stage}_data.pt"
        assert (tmp_path / "all" / name).read_bytes() == (distilled / name).read_bytes()
    matched.clear()
    assert run(D, *SHORT, "--override-save-dir", tmp_path / "some", "--drop_easy", "0.5")[0] == 0
    assert len(scored) == 1 and (tmp_path / "some" / "forgetting.pt").exists()
    counts = torch.bincount(digits().train.labels).tolist()
    for real, share in zip(matched, (0, 0.25, 0.5), strict=True):
        assert [len(indices) for indices in real.class_indices] == [n - int(share * n) for n in counts]
    first, last = (f"interval_{stage}_data.pt" for stage in (0, 2))
    assert (tmp_path / "some" / first).read_bytes() == (distilled / first).read_bytes()
    assert (tmp_path / "some" / last).read_bytes() != (distilled / last).read_bytes()

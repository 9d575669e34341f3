"""Steps, disk and memory of the scripts, against what runs write and what the matching counts."""

import pytest
import torch

from networks.reparam import ReparamModule
from scripts.reproduce import options_of
from tests.conftest import EXPERTS, SHORT, STAGES
from utils import sizes
from utils import trajectory_matching as matching
from utils.data.info import KNOWN
from utils.trajectories import buffer_files, load_buffer

DIGITS, CIFAR10 = KNOWN["Digits"], KNOWN["CIFAR10"]
IDC = ["-d", "cifar10", "--ipc", "2", "-f", "2"]


def config_of(script, *words):
    return vars(options_of(script, list(words)))


def bytes_of_buffers(folder):
    return sum(
        tensor.nbytes
        for path in buffer_files(folder)
        for trajectory in load_buffer(path)
        for entry in trajectory
        for tensor in entry
    )


def test_disk_of_experts_is_what_buffer_mtt_writes(buffers):
    config = config_of("buffer_mtt.py", *EXPERTS, "--num_experts", "3", "--train_epochs", "4")
    size = sizes.experts(config, DIGITS, 1437)
    assert size.disk == bytes_of_buffers(buffers / "Digits" / "ConvNetW32")
    assert size.steps == "144 optimiser steps"  # 3 experts, 4 epochs, 12 minibatches of 128


@pytest.mark.parametrize("start,folders", [(1, 2), (2, 1), (3, 0)])
def test_disk_of_a_distillation_is_that_of_its_transitions(start, folders, distilled):
    config = config_of("distill_mtt.py", *STAGES, *SHORT, "--start_interval", str(start))
    transitions = sorted(distilled.glob("interval*"))[:-1]
    assert sum(bool(buffer_files(folder)) for folder in transitions) == 2
    size = sizes.mtt_distillation(config, DIGITS, 1437, num_experts=3)
    images = sum(10 * stage * 8 * 8 * 4 for stage in range(start, 4)) * 4  # the best ones and those of 3 evaluations
    assert size.disk == images + sum(bytes_of_buffers(folder) for folder in transitions[2 - folders :])
    assert size.steps == "3 stages of 5 iterations of 4 student steps"


def test_all_experts_of_the_buffers_count():  # SPEC 8.5
    config = config_of("distill_mtt.py", *STAGES, "--num_experts", "2")
    found = [sizes.mtt_distillation(config, DIGITS, 1437, count).disk for count in (0, 1, 2, 100)]
    one = found[1] - found[0]
    assert one > 0 and found == [found[0] + count * one for count in (0, 1, 2, 100)]


def test_one_stage_of_many_images_needs_disk_and_memory():
    words = ["--dataset", "Tiny", "--model", "ConvNetD4", "--ipc", "250", "--num_intervals", "1", "--kept_steps", "0"]
    union = 250 * 200 * 3 * 64 * 64 * 4
    size = sizes.mtt_distillation(config_of("distill_mtt.py", *words), KNOWN["Tiny"], 100_000, 100)
    assert size.disk > 10 * union and size.memory()[0] > 3 * union  # images, gradient, momentum


def test_an_evaluation_says_how_many_networks_of_each_architecture():
    config = config_of("evaluate_mtt.py", "--num_experts", "7", "--num_eval", "3", "--epoch_eval_train", "10")
    size = sizes.mtt_evaluation(config, CIFAR10, 50_000, ["ConvNet", "AlexNet"])
    assert size.steps == "2 stages of 10 epochs for 7 networks of ConvNet, 3 networks of AlexNet"
    # Mode S leaves out a BN suffix: that is another architecture than the experts'.
    config = config_of("evaluate_mtt.py", "--model", "ConvNetBN", "--num_experts", "7", "--num_eval", "3")
    assert sizes.mtt_evaluation(config, CIFAR10, 50_000, ["ConvNet"]).steps.endswith("3 networks of ConvNet")


def test_sizes_of_idc():
    size = sizes.idc_distillation(config_of("distill_idc.py", *IDC, "--niter", "3"), CIFAR10, 50_000)
    assert size.steps == "5 stages of 3 outer iterations of 100 sweeps over 10 classes"
    assert size.disk == 20 * 3 * 32 * 32 * 4 * (1 + 2 + 3 + 4 + 5 + 3)
    words = [*IDC, "--epochs", "9", "--repeat", "2", "--eval_models", "self,resnet10"]
    size = sizes.idc_evaluation(config_of("evaluate_idc.py", *words), CIFAR10, 50_000)
    assert size.steps == "5 stages of 9 epochs for 2 networks of each of self, resnet10"
    size = sizes.idc_evaluation(config_of("evaluate_idc.py", *words, "--last_only"), CIFAR10, 50_000)
    assert size.steps.startswith("1 stages of 9 epochs")


def test_sizes_of_dm():
    config = config_of("distill_dm.py", *IDC, "--model", "ConvNetW32", "--Iteration", "7")
    size = sizes.dm_distillation(config, CIFAR10, 50_000)
    assert size.steps == "5 stages of 7 iterations over 10 classes"
    assert size.disk == 20 * 3 * 32 * 32 * 4 * (1 + 2 + 3 + 4 + 5 + 4)
    (few, _), (many, _), (bounded, _), (larger, _) = (
        sizes.dm_distillation(config | {"ipc": ipc}, CIFAR10, 50_000).memory() for ipc in (2, 4, 7, 10)
    )
    assert few < many < bounded == larger  # 1280 decoded images at most go through the network together


@pytest.mark.parametrize("niter,inner_loop,iterations", [(2000, 100, 2000), (2, 20, 10), (0.02, 1, 2), (0.29, 1, 29),
                                                         (0.001, 100, 1)])  # fmt: skip
def test_outer_iterations_of_a_stage(niter, inner_loop, iterations):
    assert sizes.idc_iterations({"niter": niter, "inner_loop": inner_loop}) == iterations


def test_memory_is_computed_when_it_is_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("memory was computed")

    monkeypatch.setattr(matching, "saved_bytes", refuse)
    monkeypatch.setattr(sizes, "saved_bytes", refuse)
    config = config_of("distill_mtt.py", *STAGES)
    found = [sizes.mtt_distillation(config, DIGITS, 1437, 3), sizes.idc_distillation(
        config_of("distill_idc.py", *IDC), CIFAR10, 50_000)]  # fmt: skip
    for size in found:
        with pytest.raises(AssertionError, match="memory was computed"):
            size.memory()


def test_memory_grows_with_the_steps_whose_graph_is_kept():
    words = ["--model", "ConvNet", "--ipc", "10", "--batch_syn", "100", "--syn_steps"]
    few, many = (
        sizes.mtt_distillation(config_of("distill_mtt.py", *words, steps), CIFAR10, 50_000, 1).memory()
        for steps in ("30", "60")
    )
    parameters = 4 * 320_010  # bytes of a ConvNet: one vector for each student step
    graph = (many[1] - few[1]) / 30 - parameters
    assert graph > 100 * 128 * 32 * 32 * 4  # a block's output alone
    assert few[0] < few[1] and many[0] - few[0] == 30 * parameters


def test_memory_holds_whitened_images_as_floats():
    found = [sizes.experts(config_of("buffer_mtt.py", *zca), CIFAR10, 50_000).memory() for zca in ([], ["--zca"])]
    assert found[1][0] - found[0][0] == 60_000 * 3 * 32 * 32 * 3


def test_memory_of_a_graph_is_what_the_matching_counts():
    """On the device meta as with values."""
    found = []
    for device in ("meta", "cpu"):
        network = sizes._network({}, CIFAR10, "ConvNetW32").to_empty(device=device)
        student = ReparamModule(network)
        with torch.device(device):
            step = matching.Step(torch.arange(20), lambda images: images)
            images, labels = torch.zeros(20, 3, 32, 32), torch.zeros(20, dtype=torch.int64)
            found.append(matching.graph_bytes(student, torch.zeros(student.numel), images, labels, step))
    assert found[0] == pytest.approx(found[1], rel=0.02)

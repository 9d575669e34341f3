"""On a GPU: iterations in float64 equal the CPU's, and all scripts run, with every option for speed.

`scripts/check_gpu.sh` runs these tests and the benchmarks there; elsewhere, and in scripts/test.sh, they are skipped.
"""

import dataclasses
import json

import pytest
import torch

import networks
from networks.kernels import fused
from networks.reparam import ReparamModule
from tests.conftest import run_script
from tests.support import small
from tests.support.matching import case, relative
from utils import training
from utils.augment import DSA
from utils.data.datasets import ImageDataset
from utils.gradient_matching import class_sweep
from utils.memory import Stack
from utils.options import DSA_STRATEGY
from utils.stages import evaluation_config
from utils.trajectory_matching import Step, match

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not scripts/check_gpu.sh")
GPU = torch.device("cuda")


def case_there(**shape):
    """`case` on the GPU; its expected result stays on the CPU."""
    student, *tensors, steps, expected = case(**shape)
    steps = [Step(step.index.to(GPU), step.augment) for step in steps]
    return ReparamModule(student.network.to(GPU)), *(tensor.to(GPU) for tensor in tensors), steps, expected


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN", "MLP"])
@pytest.mark.parametrize("retained_graphs,slice_size", [(0, None), (3, None), (7, None), (2, 3)])
def test_an_iteration_is_full_unrolling_on_a_cpu(name, retained_graphs, slice_size):
    if name == "ConvNetBN" and slice_size:
        pytest.skip("batch statistics are not exact in slices")
    *problem, expected = case_there(name=name)
    found = match(*problem, retained_graphs=retained_graphs, slice_size=slice_size)
    for value, truth in zip(found, expected, strict=True):
        assert value.device.type == "cuda" and relative(value.cpu(), truth) < 1e-10


def test_as_many_planes_as_the_published_row_of_cifar100_has():
    """512 images of 128 channels: one plane more than the second axis of a grid holds."""
    x = torch.rand(512, 128, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(128, dtype=torch.float64), torch.zeros(128, dtype=torch.float64)
    _, state = fused.forward(x, weight, bias)
    there = [tensor.to(GPU) for tensor in state]
    for found, truth in zip(fused.project(x.to(GPU), x.to(GPU), there), fused.project(x, x, state), strict=True):
        assert relative(found.cpu(), truth) < 1e-10


def test_compiled_steps_are_exact():
    student, *problem, expected = case_there()
    notes = []
    compiled = ReparamModule(student.network, compiled=True, note=notes.append)
    for value, truth in zip(match(compiled, *problem), expected, strict=True):
        assert relative(value.cpu(), truth) < 1e-10
    assert notes == []


def test_parameters_wait_on_the_host():
    stack, like, tensors = (
        Stack(),
        torch.empty(1 << 20, device=GPU),
        [torch.rand(1 << 20, device=GPU) for _ in range(5)],
    )
    before = torch.cuda.memory_allocated()
    copies = [tensor.cpu() for tensor in tensors]
    for tensor in tensors:
        stack.push(tensor)
    tensors.clear()
    del tensor
    assert torch.cuda.memory_allocated() <= before - 5 * (4 << 20)
    for copy in reversed(copies):
        assert torch.equal(stack.pop(like).cpu(), copy)


def test_memory_does_not_grow_with_the_steps():
    peaks = []
    for count in (10, 10, 100):
        student, start, target, lr, images, labels, steps, _ = case_there(steps=4, batch=10, total=20, size=32)
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        match(student, start, target, lr, images, labels, (steps * count)[:count])
        peaks.append(torch.cuda.max_memory_allocated() - idle)
    assert peaks[2] < 1.1 * peaks[1]


def test_all_scripts_run_and_see_the_cpus_random_numbers(tmp_path):
    for script in small.SCRIPTS:
        for device in ("cpu", "cuda"):
            run_script(script, *small.arguments(script, tmp_path / device), "--device", device)
    experts = [tmp_path / device / small.EXPERT_FOLDER / "replay_buffer_0.pt" for device in ("cpu", "cuda")]
    for cpu, gpu in zip(*(torch.load(path, weights_only=True)[0] for path in experts), strict=True):
        for a, b in zip(cpu, gpu, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    stages = [tmp_path / device / small.STAGE / "images_0.pt" for device in ("cpu", "cuda")]
    torch.testing.assert_close(*(torch.load(path, weights_only=True) for path in stages), rtol=1e-5, atol=1e-5)
    for device in ("cpu", "cuda"):
        assert json.loads((tmp_path / device / small.EXPERIMENT / "report.json").read_text())["models"]
        assert (tmp_path / device / small.IDC_FOLDER / "report.json").exists()


def test_bf16_with_batch_statistics():
    student, *problem, _ = case_there(name="ConvNetBN")
    network = student.network.float()
    start, target, lr, images = (tensor.float() for tensor in problem[:4])
    loss, *gradients = match(ReparamModule(network, precision="bf16"), start, target, lr, images, *problem[4:])
    assert all(bool(value.isfinite().all()) for value in (loss, *gradients))


def test_nothing_waits():
    """PyTorch's own check, which also sees copies that wait."""
    student, *problem, _ = case_there()
    dataset = ImageDataset(torch.rand(12, 3, 32, 32, device=GPU), torch.zeros(12, dtype=torch.int64, device=GPU))
    members = [networks.get_network("ConvNetW32", 3, 10, 32).to(GPU) for _ in range(2)]
    config = dataclasses.replace(evaluation_config(1, 0.01, 5, DSA(DSA_STRATEGY)), cutmix=(0.5, 1.0))
    images, momentum_buffer = torch.rand(2, 2, 10, 3, 8, 8, device=GPU)
    for turn in range(2):  # the first one may wait while libraries get ready
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            match(student, *problem)
            training.train(members[0], dataset, config, 0, ("alone",))
            class_sweep(images, momentum_buffer, 0.1, 0.5, lambda x: (x.flatten(1).sum(1), x))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("option", ["--compile", "--bf16"])
def test_options_for_speed(option, tmp_path):
    run_script(small.BUFFER, *small.arguments(small.BUFFER, tmp_path), "--device", "cuda")
    done = run_script(small.DISTILL, *small.arguments(small.DISTILL, tmp_path), "--device", "cuda", option)
    assert "does not work here" not in done.stderr
    assert (tmp_path / small.EXPERIMENT / "interval2_epoch2-2" / "images_best.pt").exists()

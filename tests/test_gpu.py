"""On a GPU: iterations in float64 equal the CPU's, and all scripts run, with every way of being quick.

Skipped without a GPU. `scripts/check_gpu.sh` runs these tests and the benchmarks there.
"""

import json

import pytest
import torch

from tests import small
from tests.conftest import run_script
from tests.test_matching import case, relative
from utils.matching import Step, _Stack, match
from utils.reparam import FlatNetwork

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


def case_there(**shape):
    """`case` on the GPU; its expected result stays on the CPU."""
    student, *tensors, steps, expected = case(**shape)
    steps = [Step(step.index.to(GPU), step.augment) for step in steps]
    return FlatNetwork(student.network.to(GPU)), *(tensor.to(GPU) for tensor in tensors), steps, expected


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN", "MLP"])
@pytest.mark.parametrize("kept_steps,slice_size", [(0, None), (3, None), (7, None), (2, 3)])
def test_an_iteration_is_full_unrolling_on_a_cpu(name, kept_steps, slice_size):
    if name == "ConvNetBN" and slice_size:
        pytest.skip("batch statistics are not exact in slices")
    *problem, expected = case_there(name=name)
    found = match(*problem, kept_steps=kept_steps, slice_size=slice_size)
    for value, truth in zip(found, expected, strict=True):
        assert value.device.type == "cuda" and relative(value.cpu(), truth) < 1e-10


def test_compiled_steps_are_exact():
    student, *problem, expected = case_there()
    notes = []
    compiled = FlatNetwork(student.network, compiled=True, note=notes.append)
    for value, truth in zip(match(compiled, *problem), expected, strict=True):
        assert relative(value.cpu(), truth) < 1e-10
    assert notes == []


def test_parameters_wait_on_the_host():
    stack, tensors = _Stack(torch.empty(1 << 20, device=GPU)), [torch.rand(1 << 20, device=GPU) for _ in range(5)]
    before = torch.cuda.memory_allocated()
    copies = [tensor.cpu() for tensor in tensors]
    for tensor in tensors:
        stack.push(tensor)
    tensors.clear()
    del tensor
    assert torch.cuda.memory_allocated() <= before - 5 * (4 << 20)
    for copy in reversed(copies):
        assert torch.equal(stack.pop().cpu(), copy)


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


@pytest.mark.parametrize("option", ["--compile", "--bf16"])
def test_options_for_speed(option, tmp_path):
    run_script(small.BUFFER, *small.arguments(small.BUFFER, tmp_path), "--device", "cuda")
    done = run_script(small.DISTILL, *small.arguments(small.DISTILL, tmp_path), "--device", "cuda", option)
    assert "does not work here" not in done.stderr
    assert (tmp_path / small.EXPERIMENT / "interval2_epoch2-2" / "images_best.pt").exists()

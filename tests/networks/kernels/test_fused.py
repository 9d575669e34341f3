import pytest
import torch
from torch.nn import functional as F

from networks.kernels import fused


def plain(x, weight, bias):
    return F.avg_pool2d(F.relu(F.group_norm(x, x.shape[1], weight, bias)), 2)


def inputs(count, channels, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, size, size, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(2, channels, dtype=torch.float64, generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("size", [2, 6, 8, 10])
def test_first_and_second_derivatives(size):
    arguments = inputs(2, 3, size)
    torch.testing.assert_close(fused.norm_relu_pool(*arguments), plain(*arguments), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(fused.norm_relu_pool, arguments)
    assert torch.autograd.gradgradcheck(fused.norm_relu_pool, arguments)


def test_second_derivatives_equal_the_composed_ones():
    results = []
    for function in (fused.norm_relu_pool, plain):
        x, weight, bias = inputs(3, 4, 16)
        out = function(x, weight, bias)
        gradient = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).requires_grad_()
        first = torch.autograd.grad(out, (x, weight, bias), gradient, create_graph=True)
        second = torch.autograd.grad(sum((g * torch.cos(g)).sum() for g in first), (gradient, x, weight))
        results.append((*first, *second))
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-12


def test_more_planes_than_a_gpu_takes_at_once(monkeypatch):
    x, weight, bias = (tensor.detach() for tensor in inputs(5, 3, 4))
    _, state = fused.forward(x, weight, bias)
    v = torch.sin(torch.arange(float(x.numel()), dtype=torch.float64)).view_as(x)
    expected, calls, project = fused.project(v, x, state), [], fused.project
    monkeypatch.setattr(fused, "MOST_PLANES", {"cpu": 8})
    monkeypatch.setattr(fused, "project", lambda v, x, state: calls.append(len(v)) or project(v, x, state))
    for found, truth in zip(fused.project(v, x, state), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert calls == [5, 2, 2, 1]


def test_odd_planes_are_left_to_the_plain_layers():
    assert not fused.applies(torch.zeros(1, 1, 7, 8)) and fused.applies(torch.zeros(1, 1, 6, 8))

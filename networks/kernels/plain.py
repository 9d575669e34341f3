"""The functions of fused.py as formulas, for torch.compile to make kernels of.

fused.py calls kernels of PyTorch, which a compiler would take apart into more kernels than it needs for these. Names,
arguments and results are those of fused.py, but for the state: here it is the sum of each plane and that of its squared
deviations from the mean, both (N, C).
"""

import torch

from networks.kernels.fused import EPSILON

STATE = 2  # tensors of a state; fused.py has three


def _planes(scalars):
    return scalars[..., None, None]


def _statistics(x, state):
    """Return the mean and 1 / √(variance + ε) of each plane (N, C)."""
    mean, variance = (sums / x[0, 0].numel() for sums in state)
    return mean, (variance + EPSILON).rsqrt()


def _standardised(x, state):
    mean, rstd = _statistics(x, state)
    return (x - _planes(mean)) * _planes(rstd)


def _normed(x, weight, bias, state):
    return _standardised(x, state) * weight[:, None, None] + bias[:, None, None]


def _pool(z):
    return (z[..., ::2, ::2] + z[..., 1::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, 1::2]) / 4


def forward(x, weight, bias):
    total = x.sum((2, 3))
    mean = total / x[0, 0].numel()
    state = total, (x - _planes(mean)).square().sum((2, 3))
    return _pool(torch.relu(_normed(x, weight, bias, state))), state


def unpool_masked(p, x, weight, bias, state):
    count, channels, height, width = x.shape
    windows = (p / 4)[:, :, :, None, :, None].expand(count, channels, height // 2, 2, width // 2, 2)
    return torch.where(_normed(x, weight, bias, state) > 0, windows.reshape(x.shape), 0)


def project(v, x, state):
    u, (_, rstd), pixels = _standardised(x, state), _statistics(x, state), x[0, 0].numel()
    n_v0, n_v1 = v.sum((2, 3)), (v * u).sum((2, 3))
    return _planes(rstd) * (v - _planes(n_v0 / pixels) - u * _planes(n_v1 / pixels)), n_v1, n_v0


def second(v, f, g, a, a1, x, weight, bias, state):
    u, (_, r), pixels = _standardised(x, state), _statistics(x, state), x[0, 0].numel()
    v, v1, _ = project(v, x, state)
    gradient = v * weight[:, None, None] + u * f[:, None, None] + g[:, None, None]
    q = (v * a).sum((2, 3)) / r + a1 * v1 * r.pow(3) * (EPSILON / pixels)
    common = r * weight / -pixels
    planes = v * _planes(a1 * common) + a * _planes(v1 * common + f) + u * _planes(q * common)
    return _pool(torch.where(_normed(x, weight, bias, state) > 0, gradient, 0)), planes, q

"""Instance normalisation, ReLU and 2x2 average pooling in one differentiable step, twice differentiable by hand.

On CPUs a ConvNet spends more time in these three than in its convolutions, most of it in the second derivative, which
PyTorch composes of some thirty element-wise passes. Written out it needs few. Per image and channel let x be the
input plane of n pixels with mean μ and r = 1 / √(variance + ε), u = r (x − μ), output p = pool(relu(w u + b)).
With A the gradient of w u + b and a0 = mean(A), a1 = mean(A u), the first derivative is

    ∂x = r w (A − a0 − a1 u),   ∂w = Σ n a1,   ∂b = Σ n a0.

For cotangents V of ∂x, f of ∂w and g of ∂b let P(V) = r (V − v0 − v1 u) with v0 = mean(V), v1 = mean(V u), and
q = Σ P(V) A over the plane. Then

    ∂A = w P(V) + f u + g,   ∂w = Σ q,   ∂x = (f − r w v1) P(A) − r w a1 P(V) − r² w q (x − μ) / n.

P(A) and n a1 are what the first derivative finds with a scale of one, and q follows from them: since mean(u²) is
1 − ε r², q = Σ P(V) P(A) / r + ε r³ n a1 v1.
"""

import functools
import math

import torch
from torch.nn import functional as F

EPSILON = 1e-5  # of torch.nn.GroupNorm
MOST_PLANES = {"cuda": 65535}  # of one call of `project`, which PyTorch puts into the second axis of a grid


def applies(x):
    """True if the fused step is made for x: planes of even size, on a GPU in full precision.

    On a CPU x may be bfloat16; weight, bias and all statistics are float32 then.
    """
    device = x.device.type == "cpu" or (x.device.type in ("cuda", "meta") and x.element_size() >= 4)
    return device and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


def norm_relu_pool(x, weight, bias):
    """Return avg_pool2d(relu(instance_norm(x) * weight + bias), 2).

    Args:
        x: (N, C, H, W), H and W even.
        weight, bias: (C,).

    Returns:
        (N, C, H / 2, W / 2), twice differentiable.
    """
    return _Block.apply(x, weight, bias)


SMALL = 64  # planes of so few pixels are pooled by one product


@functools.lru_cache
def _column_matrix(width, dtype, device):
    """(width, width / 2) matrix that adds neighbouring columns and divides by the four pixels of a window."""
    return (torch.eye(width // 2, dtype=dtype, device=device) / 4).repeat_interleave(2, dim=0)


@functools.lru_cache
def _window_matrix(height, width, dtype, device):
    """(height * width, height * width / 4) matrix that averages windows of four pixels."""
    rows = torch.eye(height // 2, dtype=dtype, device=device).repeat_interleave(2, dim=0)
    return torch.kron(rows, _column_matrix(width, dtype, device))


def pool(z):
    """2x2 average pooling; on a CPU by products, which are quicker there; larger planes add their rows first."""
    if z.device.type != "cpu":
        return F.avg_pool2d(z, 2)
    count, channels, height, width = z.shape
    if height * width <= SMALL:
        pooled = z.reshape(count * channels, -1) @ _window_matrix(height, width, z.dtype, z.device)
        return pooled.view(count, channels, height // 2, width // 2)
    rows = z[:, :, 0::2] + z[:, :, 1::2]
    return rows @ _column_matrix(width, z.dtype, z.device)


def unpool_masked(p, x, weight, bias, state):
    """Return A (N, C, H, W): the transpose of `pool` where the activations are positive, zero elsewhere.

    Args:
        p: (N, C, H / 2, W / 2) gradient of the output.
        Others as for `forward`.
    """
    z = state[0]
    if z.device.type != "cpu":
        spread = torch.ops.aten.avg_pool2d_backward(p, z, [2, 2], [2, 2], [0, 0], False, True, None)
        return torch.ops.aten.threshold_backward(spread, z, 0)
    count, channels, height, width = z.shape
    if height * width <= SMALL:
        spread = p.reshape(count * channels, -1) @ _window_matrix(height, width, z.dtype, z.device).T
        return torch.ops.aten.threshold_backward(spread.view(z.shape), z, 0)
    spread = p @ _column_matrix(width, z.dtype, z.device).T
    gradient = torch.empty_like(z)
    for row in (0, 1):  # of each window
        target = gradient[:, :, row::2]
        torch.ops.aten.threshold_backward.grad_input(spread, z[:, :, row::2], 0, grad_input=target)
    return gradient


def _planes(scalars):
    return scalars[..., None, None]


def forward(x, weight, bias):
    """Return avg_pool2d(relu(instance_norm(x) * weight + bias), 2) and a state that the functions below need.

    The state is the activations before pooling, and mean and 1 / √(variance + ε) of each plane (N, C).
    """
    count, channels, height, width = x.shape
    z, mean, rstd = torch.ops.aten.native_group_norm(
        x, weight, bias, count, channels, height * width, channels, EPSILON
    )
    z = F.relu_(z)
    return pool(z), (z, mean, rstd)


def backward(gradient, x, weight, bias, state):
    """Return (A, ∂x, ∂w, ∂b) for the gradient (N, C, H / 2, W / 2) of the output."""
    count, channels, height, width = x.shape
    a, (_, mean, rstd) = unpool_masked(gradient, x, weight, bias, state), state
    return a, *torch.ops.aten.native_group_norm_backward(
        a, x, mean, rstd, weight, count, channels, height * width, channels, [True, True, True]
    )


@functools.lru_cache
def _ones(count, dtype, device):
    return torch.ones(count, dtype=dtype, device=device)


def project(v, x, state):
    """Return P(V) (N, C, H, W), and n v1 and n v0 (N, C) of each plane."""
    _, mean, rstd = state
    (count, channels), pixels = mean.shape, x[0, 0].numel()
    planes, most = count * channels, MOST_PLANES.get(v.device.type, math.inf)
    if planes > most and count > 1:
        parts = zip(*(tensor.split(max(1, most // channels)) for tensor in (v, x, mean, rstd)), strict=True)
        return tuple(map(torch.cat, zip(*(project(v, x, (None, *moments)) for v, x, *moments in parts), strict=True)))
    # Groups of one channel: with one image of N C channels the sums are those of single planes.
    projected, *sums = torch.ops.aten.native_group_norm_backward(
        v.view(1, planes, *v.shape[2:]), x.view(1, planes, *x.shape[2:]), mean.view(1, planes), rstd.view(1, planes),
        _ones(planes, mean.dtype, mean.device), 1, planes, pixels, planes, [True, True, True],
    )  # fmt: skip
    return projected.view(x.shape), *(total.view(mean.shape) for total in sums)


def second(v, f, g, a, a1, x, weight, bias, state):
    """Return the gradients of (output's gradient, x, w of each plane) for the cotangents V, f, g of (∂x, ∂w, ∂b).

    Args:
        a, a1: P(A) and n a1, the first two results of `project`.
        Others as for `forward` and `backward`.
    """
    (z, mean, r), (count, channels, height, width) = state, x.shape
    pixels = height * width
    v, v1, _ = project(v, x, state)
    gradient, *_ = torch.ops.aten.native_group_norm(x, f, g, count, channels, pixels, channels, EPSILON)
    gradient = pool(torch.ops.aten.threshold_backward(gradient.addcmul_(v, _planes(weight).to(v.dtype)), z, 0))

    q = (v * a).sum((2, 3), dtype=r.dtype).div_(r).addcmul_(a1 * v1, r.pow(3), value=EPSILON / pixels)
    factors = torch.stack([a1, v1, q]) * (r * weight).mul_(-1 / pixels)
    factors[1].add_(f)
    factors[2].mul_(r)
    for_v, for_a, for_x = factors.to(x.dtype)
    planes = (v * _planes(for_v)).addcmul_(a, _planes(for_a)).addcmul_(x, _planes(for_x))
    return gradient, planes.sub_(_planes(for_x * mean).to(x.dtype)), q


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.contiguous()
        pooled, state = forward(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, *state)
        return pooled

    @staticmethod
    def backward(ctx, gradient):
        return _BlockBackward.apply(gradient, *ctx.saved_tensors)


class _BlockBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, x, weight, bias, *state):
        a, *gradients = backward(gradient, x, weight, bias, state)
        ctx.save_for_backward(a, x, weight, bias, *state)
        return tuple(gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v, f, g):
        a, x, weight, bias, *state = ctx.saved_tensors
        a, a1, _ = project(a, x, state)
        gradient, of_x, of_scale = second(v.contiguous(), f, g, a, a1, x, weight, bias, state)
        return gradient, of_x, of_scale.sum(0), None, None, None, None

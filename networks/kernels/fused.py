"""Instance normalisation, ReLU and 2x2 average pooling in one differentiable step, twice differentiable by hand.

On CPUs a ConvNet spends more time in these three than in its convolutions, most of it in the second derivative, which
PyTorch composes of some thirty element-wise passes. Written out it needs few. Per image and channel let x be the
input plane of n pixels with mean μ and r = 1 / √(variance + ε), u = r (x − μ), output p = pool(relu(w u + b)).
With A the gradient of w u + b and a0 = mean(A), a1 = mean(A u), the first derivative is

    ∂x = r w (A − a0 − a1 u),   ∂w = Σ n a1,   ∂b = Σ n a0.

For cotangents V of ∂x, f of ∂w and g of ∂b, with v0 = mean(V), v1 = mean(V u) and q = mean(V A) − v0 a0 − v1 a1,

    ∂A = r w (V − v0 − v1 u) + f u + g,   ∂w = Σ n r q,
    ∂x = r (D − mean(D) − u (mean(D u) + r w q)),   D = −r w a1 V + (f − r w v1) A,

so that both planes are sums of V, A and x with one factor for each image and channel.
"""

import functools

import torch
from torch.nn import functional as F

EPSILON = 1e-5  # of torch.nn.GroupNorm


def applies(x):
    """True where the fused step is made for: planes of even size on a CPU, in full precision (float32 or float64)."""
    return x.device.type == "cpu" and x.element_size() >= 4 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


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
    """2x2 average pooling by products, quicker than avg_pool2d on a CPU; larger planes add their rows first."""
    count, channels, height, width = z.shape
    if height * width <= SMALL:
        pooled = z.reshape(count * channels, -1) @ _window_matrix(height, width, z.dtype, z.device)
        return pooled.view(count, channels, height // 2, width // 2)
    rows = z[:, :, 0::2] + z[:, :, 1::2]
    return rows @ _column_matrix(width, z.dtype, z.device)


def _unpool_masked(p, z):
    """The transpose of `pool` where the activations z (N, C, H, W) are positive, zero elsewhere."""
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


def _dot(a, b):
    """Mean of a * b over each plane, (N, C)."""
    return (a * b).mean((2, 3))


def _planes(scalars):
    return scalars[:, :, None, None]


def forward(x, weight, bias):
    """Return relu(instance_norm(x) * weight + bias), and mean and 1 / √(variance + ε) of each plane (N, C)."""
    count, channels, height, width = x.shape
    z, mean, rstd = torch.ops.aten.native_group_norm(
        x, weight, bias, count, channels, height * width, channels, EPSILON
    )
    return F.relu_(z), mean, rstd


def backward(gradient, x, weight, z, mean, rstd):
    """Return (A, ∂x, ∂w, ∂b) for the gradient (N, C, H / 2, W / 2) of the output."""
    count, channels, height, width = x.shape
    a = _unpool_masked(gradient, z)
    return a, *torch.ops.aten.native_group_norm_backward(
        a, x, mean, rstd, weight, count, channels, height * width, channels, [True, True, True]
    )


def second(v, f, g, a, x, weight, z, mean, r):
    """Return the gradients of (output's gradient, x, w) for the cotangents V, f, g of (∂x, ∂w, ∂b)."""
    pixels = x.shape[2] * x.shape[3]
    a0, v0 = a.mean((2, 3)), v.mean((2, 3))
    a1 = r * (_dot(a, x) - mean * a0)
    v1 = r * (_dot(v, x) - mean * v0)
    q = _dot(v, a) - v0 * a0 - v1 * a1
    rw = r * weight

    # ∂A as V · rw + x · along_x + rest, then back through ReLU and pooling.
    along_u = f - rw * v1
    along_x = along_u * r
    rest = g - rw * v0 - along_x * mean
    planes = (v * _planes(rw)).add_(_planes(rest)).addcmul_(x, _planes(along_x))
    gradient = pool(torch.ops.aten.threshold_backward(planes, z, 0))

    weight_gradient = (pixels * r * q).sum(0)

    # ∂x as V · for_v + A · for_a + x · for_x + constant.
    for_v, for_a = -r * rw * a1, r * along_u
    mean_d = -rw * (v0 * a1 + v1 * a0) + f * a0
    mean_du = -2 * rw * v1 * a1 + f * a1
    for_x = -r * r * (mean_du + rw * q)
    constant = -r * mean_d - for_x * mean
    planes = (v * _planes(for_v)).add_(_planes(constant)).addcmul_(a, _planes(for_a)).addcmul_(x, _planes(for_x))
    return gradient, planes, weight_gradient


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.contiguous()
        z, mean, rstd = forward(x, weight, bias)
        ctx.save_for_backward(x, weight, z, mean, rstd)
        return pool(z)

    @staticmethod
    def backward(ctx, gradient):
        return _BlockBackward.apply(gradient, *ctx.saved_tensors)


class _BlockBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, x, weight, z, mean, rstd):
        a, *gradients = backward(gradient, x, weight, z, mean, rstd)
        ctx.save_for_backward(a, x, weight, z, mean, rstd)
        return tuple(gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v, f, g):
        return *second(v.contiguous(), f, g, *ctx.saved_tensors), None, None, None

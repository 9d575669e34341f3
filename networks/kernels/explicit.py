"""The gradient of a ConvNet's loss, and products with its derivatives, written out without autograd.

Trajectory matching needs, for one student step, the gradient g(θ, x) of the cross-entropy with respect to the
parameters, and later (∂g/∂θ)ᵀλ and (∂g/∂x)ᵀλ for one vector λ (Pearlmutter, Neural Computation 1994). Autograd finds
them by recording the backward pass and going back through the record. Here both passes are plain functions of tensors:
no record is made, sums are taken in place, and a step takes less than half as many operations.

Names: a tensor's gradient is `g` and its name; the derivative of ⟨g, λ⟩ with respect to something is `d` and its name.
"""

import functools

import torch
from torch.nn import functional as F

from networks.convnet import ConvNet
from networks.kernels import fused, plain


def applies(network, images):
    """True if the functions below are made for this network: fused blocks, no global pooling; images (N, C, H, W)."""
    return (
        isinstance(network, ConvNet)
        and network.fuses
        and isinstance(network.pool, torch.nn.Identity)
        and fused.applies(images)
        and images.shape[2] % 2**network.depth == 0
        and network.features[0].padding == (1, 1)
    )


@functools.lru_cache
def _identity(classes, dtype, device):
    return torch.eye(classes, dtype=dtype, device=device)


def _one_hot(labels, classes, dtype):
    if torch.compiler.is_compiling():  # which warns of caches
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
    return _identity(classes, dtype, labels.device)[labels]


def gradient(parameters, x, labels, total):
    """The gradient of the sum of cross-entropies over `total`.

    The offsets of the convolutions, in front of a normalisation, have none.

    Args:
        parameters: list of the ConvNet's parameters: for each block kernel and offset of the convolution, scale and
            shift of the norm; then weight and bias of the linear layer.
        x: (B, C, H, W) images; bfloat16 ones make all maps bfloat16, while statistics and logits stay float32.
        labels: (B,) int64, or (B, K) probabilities.
        total: number that the sum is divided by.

    Returns:
        (list of the gradients of the parameters, what `vjp` needs).
    """
    kernels = plain if torch.compiler.is_compiling() else fused  # formulas where a compiler makes kernels of them
    *blocks, weight, bias = parameters
    blocks, saved = _by_block(blocks, x.dtype), []
    for kernel, offset, scale, shift in blocks:
        inputs = _laid_out(x)
        y = _convolve(inputs, kernel, offset, x.shape)
        x, state = kernels.forward(y, scale, shift)
        saved.append([inputs, y, state])
    features = x.flatten(1).to(weight.dtype)
    shares = torch.addmm(bias, features, weight.T).softmax(1)
    targets = labels if labels.is_floating_point() else _one_hot(labels, len(bias), weight.dtype)
    g_logits = (shares - targets).div_(total)
    gradients = [g_logits.T @ features, g_logits.sum(0)]
    g_x, nothing = (g_logits @ weight).view(x.shape).to(x.dtype), torch.zeros_like(shift)
    for number in reversed(range(len(blocks))):
        (kernel, _, scale, shift), (inputs, y, state) = blocks[number], saved[number]
        a, *sums = kernels.project(kernels.unpool_masked(g_x, y, scale, shift, state), y, state)
        saved[number] += [a, sums[0]]
        g_x, g_kernel = _convolution_backward(_scaled(a, scale), inputs, kernel, of_inputs=number > 0)
        gradients = [g_kernel, nothing, *(planes.sum(0) for planes in sums), *gradients]
    return gradients, [features, shares, g_logits, *saved]


def vjp(parameters, saved, vectors, total, of_parameters=True, of_labels=False):
    """The derivatives of ⟨g, λ⟩.

    Args:
        parameters: as for `gradient`.
        saved: what `gradient` returned.
        vectors: λ, a list shaped like the parameters.
        total: as for `gradient`.
        of_parameters: False leaves (∂g/∂θ)ᵀλ out.
        of_labels: True adds (∂g/∂y)ᵀλ for probabilities y.

    Returns:
        (list of the derivatives with respect to the parameters or None, that with respect to the images, and with
        of_labels that with respect to the labels).
    """
    *blocks, weight, _ = parameters
    *v_blocks, v_weight, v_bias = vectors
    features, shares, g_logits, *saved = saved
    kernels = plain if len(saved[0][2]) == plain.STATE else fused  # as `gradient` did, whoever runs this
    dtype = saved[0][0].dtype
    blocks, v_blocks = _by_block(blocks, dtype), _by_block(v_blocks, dtype)

    # Forward through the backward pass: what λ makes of the gradients of the maps, from the first block to the logits.
    derivatives, along = [], None
    for (kernel, _, scale, shift), (v_kernel, _, v_scale, v_shift), (inputs, y, state, a, a1) in zip(
        blocks, v_blocks, saved, strict=True
    ):
        d_g_y, along_inputs = _convolve(inputs, v_kernel, None, y.shape), None
        if along is not None:
            along_inputs = _laid_out(along)
            d_g_y += _convolve(along_inputs, kernel, None, y.shape)
        along, d_y, d_scale = kernels.second(d_g_y, v_scale, v_shift, a, a1, y, scale, shift, state)
        derivatives.append((along_inputs, d_y, d_scale))

    # The logits, where the backward pass began.
    shape, along = along.shape, along.flatten(1).to(weight.dtype)
    d_g_logits = torch.addmm(v_bias, along, weight.T).addmm_(features, v_weight.T)
    d_logits = torch.ops.aten._softmax_backward_data(d_g_logits, shares, 1, shares.dtype).div_(total)

    # Back through the forward pass.
    results = [(g_logits.T @ along).addmm_(d_logits.T, features), d_logits.sum(0)]
    d_x, nothing = (g_logits @ v_weight).addmm_(d_logits, weight).view(shape).to(dtype), torch.zeros_like(v_shift)
    for number in reversed(range(len(blocks))):
        (kernel, _, scale, shift), v_kernel = blocks[number], v_blocks[number][0]
        (inputs, y, state, a, _), (along_inputs, own_y, own_scale) = saved[number], derivatives[number]
        projected, d_scale, d_shift = kernels.project(kernels.unpool_masked(d_x, y, scale, shift, state), y, state)
        d_y = own_y.addcmul_(projected, scale[:, None, None].to(dtype))
        d_x, d_kernel = _convolution_backward(d_y, inputs, kernel, of_kernel=of_parameters)
        of_kernel = of_parameters and along_inputs is not None
        own_x, own_kernel = _convolution_backward(
            _scaled(a, scale), along_inputs if of_kernel else inputs, v_kernel, of_kernel=of_kernel
        )
        d_x += own_x
        if of_kernel:
            d_kernel += own_kernel
        if of_parameters:
            results = [d_kernel, nothing, d_scale.add_(own_scale).sum(0), d_shift.sum(0), *results]
    # Of −Σ y log p, whose derivative with respect to the logits is (Σ y) p − y.
    labels = [((shares * d_g_logits).sum(1, keepdim=True) - d_g_logits) / total] if of_labels else []
    return results if of_parameters else None, d_x, *labels


def compiled(function, note):
    """Return `function` under torch.compile; if that fails, `note` is called once with a line and it runs as it is.

    Args:
        function: `gradient` or `vjp`.
        note: function of a string.
    """
    # A union whose minibatches leave remainders has several shapes, and new ones in every stage.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Statistics are of planes, so that channels stay where they are.
    quick = torch.compile(function, dynamic=False, options={"layout_optimization": False})

    def call(*arguments):
        nonlocal quick
        if quick is not None:
            try:
                return quick(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in too many ways to name them
                quick = None
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                note(f"note: --compile does not work here ({reason[:100]}); running without")
        return function(*arguments)

    return call


def _by_block(parameters, dtype):
    """Return (kernel, offset, scale, shift) of every block, those of the convolution in `dtype`."""
    return [
        (kernel.to(dtype), offset.to(dtype), scale, shift)
        for kernel, offset, scale, shift in zip(*[iter(parameters)] * 4, strict=True)
    ]


def _scaled(planes, scale):
    return planes * scale[:, None, None].to(planes.dtype)


RGB_CHANNELS = 3  # channels of an image: for so few, gradients of inputs are quicker as columns on a CPU, too
SMALL = 512  # values of an image up to which its convolution is quicker as a product with its columns on a CPU


def _runs_on_cpu(x):
    return x.device.type == "cpu" and not torch.compiler.is_compiling()  # --compile is meant for GPUs


def _laid_out(x):
    """Return the input of a convolution: x (B, C, H, W), or its 3x3 neighbourhoods as columns (B, 9 C, H W)."""
    return F.unfold(x, 3, padding=1) if _runs_on_cpu(x) and x[0].numel() <= SMALL else x


def _rows(kernel):
    return kernel.reshape(len(kernel), -1)


def _convolve(inputs, kernel, offset, shape):
    """Return the 3x3 convolution (B, D, H, W) of what `_laid_out` returned; the height and width are `shape`'s last."""
    if inputs.dim() == 4:
        return F.conv2d(inputs, kernel, offset, padding=1)
    y = _rows(kernel) @ inputs
    if offset is not None:
        y += offset[:, None]
    return y.view(len(inputs), len(kernel), *shape[2:])


def _convolution_backward(g, inputs, kernel, of_inputs=True, of_kernel=True):
    """Return the gradients of a convolution's input (B, C, H, W) and kernel from that of its output, g (B, D, H, W).

    Either is None if it is not wanted.
    """
    columns = inputs.dim() == 3
    fold = of_inputs and (columns or (_runs_on_cpu(inputs) and inputs.shape[1] <= RGB_CHANNELS))
    g_inputs = g_kernel = None
    if columns and of_kernel:
        g_kernel = torch.bmm(g.flatten(2), inputs.transpose(1, 2)).sum(0).view(kernel.shape)
    elif of_kernel or (of_inputs and not fold):
        g_inputs, g_kernel, _ = torch.ops.aten.convolution_backward(
            g, inputs, kernel, [len(kernel)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [of_inputs and not fold, of_kernel, False],
        )  # fmt: skip
    if fold:
        g_inputs = F.fold(_rows(kernel).T @ g.flatten(2), g.shape[2:], 3, padding=1)
    return g_inputs, g_kernel

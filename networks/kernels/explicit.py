"""The gradient of a ConvNet's loss, and products with its derivatives, written out without autograd.

Trajectory matching needs, for one student step, the gradient g(θ, x) of the cross-entropy with respect to the
parameters, and later (∂g/∂θ)ᵀλ and (∂g/∂x)ᵀλ for one vector λ (Pearlmutter, Neural Computation 1994). Autograd finds
them by recording the backward pass and going back through the record. Here both passes are plain functions of tensors:
no record is made, sums are taken in place, and a compiler can see all of it.

Names: a tensor's gradient is `g` and its name; the derivative of ⟨g, λ⟩ with respect to something is `d` and its name.
"""

import torch
from torch.nn import functional as F

from networks.convnet import ConvNet
from networks.kernels import fused


def applies(network, images, compiled=False):
    """True where the functions below are made for: fused blocks, no global pooling, images (N, C, H, W) on a CPU.

    Other devices have quicker kernels for what autograd records, unless a compiler joins these operations.
    """
    return (
        isinstance(network, ConvNet)
        and network.fuses
        and isinstance(network.pool, torch.nn.Identity)
        and (compiled or images.device.type == "cpu")
        and images.shape[2] % 2**network.depth == 0
        and network.features[0].padding == (1, 1)
    )


def gradient(parameters, x, labels, total):
    """The gradient of the sum of cross-entropies over `total`.

    Args:
        parameters: list of the ConvNet's parameters: for each block kernel and offset of the convolution, scale and
            shift of the norm; then weight and bias of the linear layer.
        x: (B, C, H, W) images.
        labels: (B,) int64, or (B, K) probabilities whose rows sum to 1.
        total: number that the sum is divided by.

    Returns:
        (list of the gradients of the parameters, list of tensors that `vjp` needs).
    """
    *blocks, weight, bias = parameters
    saved_blocks = []
    for kernel, offset, scale, shift in _by_four(blocks):
        inputs = _laid_out(x)
        y = _convolve(inputs, kernel, offset, x.shape)
        z, mean, rstd = fused.forward(y, scale, shift)
        saved_blocks.append([inputs, y, z, mean, rstd])
        x = fused.pool(z)
    features = x.flatten(1)
    shares = torch.addmm(bias, features, weight.T).softmax(1)
    targets = labels if labels.is_floating_point() else F.one_hot(labels, len(bias))
    g_logits = (shares - targets) / total
    gradients = [g_logits.T @ features, g_logits.sum(0)]
    g_x = (g_logits @ weight).view(x.shape)
    for number in reversed(range(len(saved_blocks))):
        kernel, _, scale, _ = blocks[4 * number : 4 * number + 4]
        inputs, *own = saved_blocks[number]
        a, g_y, g_scale, g_shift = fused.backward(g_x, own[0], scale, *own[1:])
        gradients = [_kernel_gradient(g_y, inputs, kernel), g_y.sum((0, 2, 3)), g_scale, g_shift, *gradients]
        if number:
            g_x = _input_gradient([(g_y, kernel)], inputs)
        saved_blocks[number] += [a, g_y]
    return gradients, [features, shares, g_logits, *(tensor for block in saved_blocks for tensor in block)]


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
    *block_vectors, v_weight, v_bias = vectors
    features, shares, g_logits, *saved_blocks = saved
    saved_blocks = list(zip(*[iter(saved_blocks)] * 7, strict=True))

    # Forward through the backward pass: what λ makes of the gradients of the maps, from the first block to the logits.
    derivatives, along = [], None
    for block, vector, (inputs, y, z, mean, rstd, a, g_y) in zip(
        _by_four(blocks), _by_four(block_vectors), saved_blocks, strict=True
    ):
        (kernel, _, scale, _), (v_kernel, v_offset, v_scale, v_shift) = block, vector
        d_g_y, d_kernel = _convolve(inputs, v_kernel, v_offset, y.shape), None
        if along is not None:
            along_inputs = _laid_out(along)
            d_g_y += _convolve(along_inputs, kernel, None, y.shape)
            d_kernel = _kernel_gradient(g_y, along_inputs, kernel)
        along, d_y, d_scale = fused.second(d_g_y, v_scale, v_shift, a, y, scale, z, mean, rstd)
        derivatives.append((d_kernel, d_y, d_scale))

    # The logits, where the backward pass began.
    shape, along = along.shape, along.flatten(1)
    d_g_logits = torch.addmm(v_bias, along, weight.T).addmm_(features, v_weight.T)
    centred = d_g_logits - (shares * d_g_logits).sum(1, keepdim=True)  # the derivative of log softmax along λ
    d_logits = shares * centred / total
    results = [(g_logits.T @ along).addmm_(d_logits.T, features), d_logits.sum(0)]

    # Back through the forward pass.
    d_x = (g_logits @ v_weight).addmm_(d_logits, weight).view(shape)
    for number in reversed(range(len(saved_blocks))):
        kernel, _, scale, _ = blocks[4 * number : 4 * number + 4]
        inputs, y, z, mean, rstd, _, g_y = saved_blocks[number]
        own_kernel, own_y, own_scale = derivatives[number]
        _, d_y, d_scale, d_shift = fused.backward(d_x, y, scale, z, mean, rstd)
        d_y += own_y
        d_x = _input_gradient([(d_y, kernel), (g_y, block_vectors[4 * number])], inputs)
        if of_parameters:
            d_kernel = _kernel_gradient(d_y, inputs, kernel)
            if own_kernel is not None:
                d_kernel += own_kernel
            results = [d_kernel, d_y.sum((0, 2, 3)), d_scale.add_(own_scale), d_shift, *results]
    return results if of_parameters else None, d_x, *([centred / -total] if of_labels else [])


def compiled(function, note):
    """Return `function` under torch.compile; where that fails, `note` is called once with a line and it runs as it is.

    Args:
        function: `gradient` or `vjp`.
        note: function of a string.
    """
    # A union whose minibatches leave remainders has several shapes, and new ones in every stage.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    quick = torch.compile(function, dynamic=False)

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


def _by_four(parameters):
    return list(zip(*[iter(parameters)] * 4, strict=True))


RGB_CHANNELS = 3  # channels of an image: for so few, gradients of inputs are quicker as columns, too
SMALL = 512  # values of an image up to which its convolution is quicker as a product with its columns


def _laid_out(x):
    """Return the input of a convolution: x (B, C, H, W), or its 3x3 neighbourhoods as columns (B, 9 C, H W)."""
    return F.unfold(x, 3, padding=1) if x[0].numel() <= SMALL else x


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


def _kernel_gradient(g, inputs, kernel):
    """Return the gradient (D, C, 3, 3) of a convolution's kernel from that of its output, g (B, D, H, W)."""
    if inputs.dim() == 4:
        return _convolution_backward(g, inputs, kernel, [False, True, False])[1]
    return torch.bmm(g.flatten(2), inputs.transpose(1, 2)).sum(0).view(kernel.shape)


def _input_gradient(pairs, inputs):
    """Return the sum of the gradients (B, C, H, W) of a convolution's input over pairs (g, kernel)."""
    if inputs.dim() == 4 and inputs.shape[1] > RGB_CHANNELS:
        first, *others = [_convolution_backward(g, inputs, kernel, [True, False, False])[0] for g, kernel in pairs]
        return first.add_(others[0]) if others else first
    columns = sum(_rows(kernel).T @ g.flatten(2) for g, kernel in pairs)
    return F.fold(columns, pairs[0][0].shape[2:], 3, padding=1)


def _convolution_backward(g, inputs, kernel, wanted):
    return torch.ops.aten.convolution_backward(
        g, inputs, kernel, [len(kernel)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )

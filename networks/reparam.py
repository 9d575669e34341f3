"""A network as a function of one flat parameter vector.

Trajectories are matched on the flat vector (the norm of all parameters), and a student's parameters must stay
differentiable functions of the synthetic images: so the module lends its structure, and the vector its values.
"""

from functools import partial

import torch
from torch.func import functional_call
from torch.nn import functional as F

from networks.kernels import explicit
from networks.precision import forward


class ReparamModule:
    """Calls `network` with the parameters of a flat vector.

    The order is `network.parameters()`'s, as in the published buffers.

    Args:
        network: torch.nn.Module; its own parameters are only read for their shapes.
        compiled: differentiate ConvNets by compiled code; see networks/kernels/explicit.py.
        note: function of a string, told once if that does not work.
        precision: see networks/precision.py.
    """

    def __init__(self, network, compiled=False, note=print, precision="fp32"):
        self.network, self.precision = network, precision
        self.written_out = explicit.gradient, explicit.vjp
        if compiled:
            self.written_out = [explicit.compiled(function, note) for function in self.written_out]
        self.names = [name for name, _ in network.named_parameters()]
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self.sizes = [parameter.numel() for parameter in network.parameters()]
        self.numel = sum(self.sizes)

    def parts(self, flat):
        """Return a flat vector (numel,) as the list of its parts in the parameters' shapes."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def __call__(self, flat, x):
        """Return the logits (B, num_classes) of images x (B, C, H, W) under parameters `flat` (numel,)."""
        values = dict(zip(self.names, self.parts(flat), strict=True))
        # Running statistics of batch normalisation change in copies: a student leaves the network as it is.
        values |= {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return forward(lambda images: functional_call(self.network, values, (images,)), x, self.precision)

    def gradient(self, flat, x, labels, total, keep=True):
        """Return the gradient g (numel,) of the sum of cross-entropies over `total`, and its `vjp`.

        Args:
            flat: (numel,) parameters θ.
            x, labels: (B, C, H, W) images, and (B,) int64 or (B, K) probabilities.
            keep: False gives no `vjp`, and needs less memory.

        Returns:
            (g, `vjp`): a partial function of λ (numel,) and a bool `of_parameters` returning ((∂g/∂θ)ᵀ λ, None if it is
            not wanted; (∂g/∂x)ᵀ λ; of probabilities y also (∂g/∂y)ᵀ λ). What it holds are its arguments and what
            autograd saves.
        """
        soft = labels.is_floating_point()
        maps = x if self.precision == "fp32" else x.to(torch.bfloat16)
        if explicit.applies(self.network, maps):
            parameters = self.parts(flat)
            gradients, saved = self.written_out[0](parameters, maps, labels, total)
            return flatten(gradients), partial(self._vjp_written_out, parameters, saved, total, soft) if keep else None
        with torch.enable_grad():
            x, flat = x.detach().requires_grad_(keep), flat.detach().requires_grad_()
            data = [x]
            if soft:
                labels = labels.detach().requires_grad_(keep)
                data.append(labels)
            loss = F.cross_entropy(self(flat, x), labels, reduction="sum") / total
            (gradient,) = torch.autograd.grad(loss, flat, create_graph=keep)
        return gradient.detach(), partial(_vjp_by_autograd, flat, data, gradient)

    def _vjp_written_out(self, parameters, saved, total, soft, vector, of_parameters):
        wanted = of_parameters, soft
        products, of_images, *of_labels = self.written_out[1](parameters, saved, self.parts(vector), total, *wanted)
        return flatten(products) if of_parameters else None, of_images.to(vector.dtype), *of_labels


def _vjp_by_autograd(flat, data, gradient, vector, of_parameters):
    found = torch.autograd.grad(gradient, [flat, *data] if of_parameters else data, vector)
    return found if of_parameters else (None, *found)


def flatten(parameters):
    """Return the concatenation of all `parameters` (tensors) as one vector (numel,)."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def set_flat(network, vector):
    """Copy a flat vector (numel,) into the parameters of `network`, in order; on any device."""
    with torch.no_grad():
        parameters = list(network.parameters())
        for target, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            target.copy_(part.view_as(target))

"""A network as a function of one flat parameter vector.

Trajectories are matched on the flat vector (the norm of all parameters), and a student's parameters must stay
differentiable functions of the synthetic images: so the module lends its structure, and the vector its values.
"""

import torch
from torch.func import functional_call

from networks.kernels import explicit


class ReparamModule:
    """Calls `network` with the parameters of a flat vector.

    The order is `network.parameters()`'s, as in the published buffers.

    Args:
        network: torch.nn.Module; its own parameters are only read for their shapes.
        compiled: differentiate ConvNets by compiled code; see networks/kernels/explicit.py.
        note: function of a string, told once where that does not work.
        bf16: convolutions and products in bfloat16 (torch.autocast); parameters, normalisations, loss and gradients
            stay as they are.
    """

    def __init__(self, network, compiled=False, note=print, bf16=False):
        self.network, self.compiled, self.bf16 = network, compiled, bf16
        self.gradient, self.vjp = explicit.gradient, explicit.vjp
        if compiled:
            self.gradient, self.vjp = (explicit.compiled(f, note) for f in (self.gradient, self.vjp))
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
        if not self.bf16:
            return functional_call(self.network, values, (x,))
        with torch.autocast(x.device.type, torch.bfloat16):
            return functional_call(self.network, values, (x,)).to(x.dtype)

    def written_out(self, x):
        """Return whether `gradient` and `vjp` are made for this network and images x (B, C, H, W)."""
        return not self.bf16 and explicit.applies(self.network, x, self.compiled)


def flatten(parameters):
    """Return the concatenation of all `parameters` (tensors) as one vector (numel,)."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def set_flat(network, vector):
    """Copy a flat vector (numel,) into the parameters of `network`, in order; on any device."""
    with torch.no_grad():
        parameters = list(network.parameters())
        for target, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            target.copy_(part.view_as(target))

"""Full precision, or bfloat16 for convolutions and the tensors between layers (`--precision`)."""

import torch

PRECISIONS = ("fp32", "bf16")


def forward(network, x, precision="fp32"):
    """Return `network(x)` in the dtype of x, a tensor or a list of them.

    Args:
        network: function of images.
        x: (B, C, H, W).
        precision: `bf16` computes convolutions, products and the tensors between layers in bfloat16 (torch.autocast).
            Parameters, their gradients and the statistics of normalisations stay as they are.
    """
    if precision == "fp32":
        return network(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        output = network(x)
        return [each.to(x.dtype) for each in output] if isinstance(output, list) else output.to(x.dtype)

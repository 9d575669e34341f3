"""Normalisation layers and the padding of small images that the network families share."""

from torch import nn


def normalisation(kind, channels, size=None):
    """Return the normalisation layer called `kind`.

    Args:
        kind: none, batch, layer, instance or group (4 groups).
        channels: channels of the input (N, channels, size, size).
        size: height and width of the input in pixels; only `layer` needs it.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "layer":
        return nn.LayerNorm([channels, size, size])
    if kind == "instance":
        return nn.GroupNorm(channels, channels)
    if kind == "group":
        return nn.GroupNorm(4, channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"normalisation {kind!r}: none, batch, layer, instance or group expected")


def has_batch_statistics(network):
    """True if a layer of `network` keeps statistics of its minibatches: then a minibatch cannot be split."""
    return any(True for _ in network.buffers())


def draws_numbers(network):
    """True if a layer of `network` draws random numbers."""
    # Importing torchvision takes as long as importing torch; only EfficientNet has StochasticDepth.
    return any(
        isinstance(layer, nn.modules.dropout._DropoutNd) or type(layer).__name__ == "StochasticDepth"
        for layer in network.modules()
    )


def is_padded_28(channel, im_size):
    """True for one-channel 28-pixel input, whose first convolution pads it to 32 pixels."""
    return channel == 1 and im_size == 28

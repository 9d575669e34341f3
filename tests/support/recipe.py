"""The closed-form weights and images with which tests/facts/*.json were computed."""

import math

import torch


def fill_parameters(network, named=None):
    """Fill the parameters of `network` (in place) by the recipe of the facts; returns the network in float64.

    `named` lists (name, parameter) in the order of the published network, if that is not the network's own.
    """
    network = network.double()
    for index, (name, parameter) in enumerate(named or network.named_parameters()):
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        wave = torch.cos(0.11 * k + 0.37 * index).reshape(parameter.shape)
        if parameter.dim() > 1:
            wave = wave / math.sqrt(parameter[0].numel())
        elif name.endswith("weight"):
            wave = 1 + 0.1 * wave
        else:
            wave = 0.1 * wave
        parameter.data.copy_(wave)
    return network


def wave_images(count, channel, im_size, frequency=0.013):
    """Return the recipe's images (count, channel, im_size, im_size) in float64."""
    k = torch.arange(count * channel * im_size * im_size, dtype=torch.float64)
    return torch.sin(frequency * k).reshape(count, channel, im_size, im_size)

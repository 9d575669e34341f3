"""ZCA whitening of images through kornia, with its inverse."""

import torch

from .run.errors import UserError

FILE = "zca.pt"  # the transform, beside a result


def _unfitted():
    from kornia.enhance import ZCAWhitening  # takes seconds, and only --zca needs it

    return ZCAWhitening(eps=0.1, compute_inv=True)  # the constants of KIP and MTT


def fit(images):
    """Return a kornia.enhance.ZCAWhitening fitted on images (N, C, H, W), float in [0, 1].

    Call it on images (N, C, H, W), and its `inverse_transform` on whitened ones.
    """
    with torch.no_grad():
        return _unfitted().fit(images)


def state(whitening):
    """Return what `restore` needs, as a dict of tensors."""
    names = ("mean_vector", "transform_matrix", "transform_inv")
    return {name: getattr(whitening, name).cpu() for name in names}


def restore(saved, values, device):
    """Return the whitening that `state` described, on `device`, for images of `values` numbers.

    Raises:
        UserError: it is of other images, or damaged.
    """
    shapes = {"mean_vector": (1, values), "transform_matrix": (values, values), "transform_inv": (values, values)}
    tensors = saved if isinstance(saved, dict) else {}
    found = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.isfinite().all()}
    if found != shapes or len(tensors) != len(shapes):
        raise UserError(f"expected a ZCA transform for {values} numbers, found something else")
    return assemble({name: tensor.to(device) for name, tensor in tensors.items()})


def assemble(tensors):
    """Return the whitening that has `tensors`, a dict as of `state`; without transform_inv it has no inverse."""
    whitening = _unfitted()
    for name, tensor in tensors.items():
        setattr(whitening, name, tensor)
    whitening.fitted = True
    return whitening

"""ZCA whitening of pictures through kornia, with its inverse."""

import torch

from utils.errors import UserError


def fit(images):
    """Fit ZCA whitening on pictures.

    Args:
        images: (N, C, H, W) float in [0, 1].

    Returns:
        kornia.enhance.ZCAWhitening with eps 0.1 and its inverse computed; call it on (N, C, H, W) pictures, and
        `inverse_transform` on whitened ones. The constants are those of KIP and MTT.
    """
    from kornia.enhance import ZCAWhitening  # heavy, and needed by --zca alone

    whitening = ZCAWhitening(eps=0.1, compute_inv=True)
    with torch.no_grad():
        return whitening.fit(images)


def state(whitening):
    """Return what `restore` needs, as a dict of tensors."""
    names = ("mean_vector", "transform_matrix", "transform_inv")
    return {name: getattr(whitening, name).cpu() for name in names}


def restore(saved, values, device):
    """Return the whitening that `state` described, on `device`, for pictures of `values` numbers.

    Raises:
        UserError: it is of other pictures, or damaged.
    """
    shapes = {"mean_vector": (1, values), "transform_matrix": (values, values), "transform_inv": (values, values)}
    tensors = saved if isinstance(saved, dict) else {}
    good = [isinstance(t, torch.Tensor) and bool(t.isfinite().all()) and tuple(t.shape) for t in tensors.values()]
    if dict(zip(tensors, good, strict=True)) != shapes:
        raise UserError(f"expected a ZCA transform for {values} numbers, found something else")
    from kornia.enhance import ZCAWhitening

    whitening = ZCAWhitening(eps=0.1, compute_inv=True)
    for name, tensor in saved.items():
        setattr(whitening, name, tensor.to(device))
    whitening.fitted = True
    return whitening

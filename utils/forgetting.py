"""How hard real images are to learn, by forgetting events, and training without the easy ones in later stages.

An image is forgotten if a network classifies it right after one epoch and wrong after the next (Toneva et al., ICLR
2019). PDD's paper leaves easy images out of later stages; its release does not.
"""

import numpy as np
import torch

from networks.reparam import set_flat

from . import training
from .run import files
from .run.log import Progress, log0
from .run.streams import stream
from .training import correct

NETWORKS = 5  # whose forgetting is counted, at most
FILE = "forgetting.pt"


def hardness(history):
    """Return how hard each image is for one network.

    Args:
        history: (T, N) bool: classified right after each epoch.

    Returns:
        (N,) float32: forgetting events, T if it was never learned, plus the share of the epochs before it was first
        learned (below 1), which tells images apart that are never forgotten.
    """
    history = history.float()
    forgotten = (history[:-1] > history[1:]).sum(0)
    learned = history.any(0)
    first = torch.where(learned, history.argmax(0), len(history))
    return torch.where(learned, forgotten, len(history)) + first / (len(history) + 1)


def expert_scores(network, experts, epochs, images):
    """Return the mean hardness (N,) of training images over the trajectories of up to `NETWORKS` experts.

    Args:
        network: one of the experts' architecture; its parameters are overwritten.
        experts: `Experts`.
        epochs: epochs of a trajectory to look at.
        images: `ImageDataset`, the real training images.
    """
    # Trajectories hold no statistics of batches: a minibatch's own count, so the images come in random order.
    order = torch.from_numpy(stream(0, "forgetting").permutation(len(images)))
    images = images.subset(order.to(images.labels.device))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    count, total = min(len(experts), NETWORKS), torch.zeros(len(images))
    progress = Progress(count * epochs, "forgetting events, epoch")
    for expert in range(count):
        history = []
        for epoch in range(1, epochs + 1):
            set_flat(network, experts.parameters(expert, epoch))
            history.append(correct(network, images).cpu())
            progress.update()
        total += hardness(torch.stack(history))
    progress.close()
    return (total / count)[order.argsort()]


def cached_expert_scores(path, network, experts, images, fingerprint, held_out):
    """Return `expert_scores` over whole trajectories, kept in the file `path` for the same experts and images.

    Args:
        fingerprint: of the data set that `images` are from.
        held_out: fraction of its training images that they lack.
        Others as for `expert_scores`.
    """
    last = experts.entries - 1
    ends = [experts.parameters(k, last) for k in range(min(len(experts), NETWORKS))]
    compute = lambda: expert_scores(network, experts, last, images)  # noqa: E731
    return cached(path, [fingerprint, ends, experts.entries, held_out], len(images), compute)


def training_scores(new_network, config, images, seed):
    """Return the mean hardness (N,) of training images over `NETWORKS` networks that are trained for it.

    Args:
        new_network: function of k returning network k at its start.
        config: `TrainConfig`.
        images: `ImageDataset` of the real training images.
        seed: of the random streams.
    """
    total, progress = torch.zeros(len(images)), Progress(NETWORKS * config.epochs, "forgetting events, epoch")
    for k in range(NETWORKS):
        network, history = new_network(k), []

        def after(_epoch, _loss, network=network, history=history):
            history.append(correct(network, images).cpu())
            progress.update()

        training.train(network, images, config, seed, ("forgetting", k), after_epoch=after)
        total += hardness(torch.stack(history))
    progress.close()
    return total / NETWORKS


def cached(path, key, count, compute):
    """Return the scores (count,) kept in the file `path` for the same `key`; else those of `compute()`, kept there."""
    key = files.digest(key)
    found = files.load_trusted(path)
    if found and found.get("key") == key and len(found["scores"]) == count:
        return found["scores"]
    scores = compute()
    try:
        files.save_with_digest(path, {"scores": scores, "key": key})
    except OSError as error:
        log0(f"note: {path}: not kept for later runs ({error.strerror})")
    return scores


def dropped_fraction(fraction, stage, stages):
    """Return which fraction of each class is left out in `stage` (from 1): 0 in the first, `fraction` in the last."""
    return fraction * (stage - 1) / (stages - 1) if stages > 1 else 0.0


def note_one_stage(fraction, stages):
    """Print that nothing is left out, if there is one of `stages` only."""
    if fraction and stages == 1:
        log0("note: --drop_easy changes nothing with one stage: the first one learns from all images")


def as_many(real, drop_easy, stage, stages):
    """Return `RealData` of as many images as `stage` (of `stages`) has; which ones does not matter."""
    return without_easy(real, torch.zeros(len(real.train)), dropped_fraction(drop_easy, stage, stages))


def without_easy(real, scores, fraction):
    """Return `RealData` without the easiest `fraction` of each class's training images; at least one is kept."""
    if not fraction:
        return real
    kept = []
    for indices in real.class_indices:
        order = indices[np.argsort(scores.numpy()[indices], kind="stable")]
        kept.append(order[min(int(fraction * len(order)), len(order) - 1) :])
    return real.keeping(kept)

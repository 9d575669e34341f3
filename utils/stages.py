"""What stages need of networks: the transition between two of them, and training on the unions in their order."""

import contextlib
import itertools

import numpy as np
import torch

from networks.layers import has_batch_statistics
from networks.reparam import set_flat

from . import training
from .run import distributed
from .run.checkpoint import finish_each
from .run.errors import UserError
from .run.log import Progress
from .run.streams import stream
from .trajectories import BufferWriter, is_finite, record_trajectory


def evaluation_config(epochs, lr, batch_size, dsa, window=None, samples=1, precision="fp32"):
    """Return MTT's way of training on synthetic images: momentum 0.9, weight decay 5e-4, lr × 0.1 after half.

    As published, it runs the epochs of index 0 to `epochs`: one more than the option says.
    """
    milestones = ((epochs // 2 + 1, 0.1),)
    return training.TrainConfig(
        epochs + 1, float(lr), 0.9, 5e-4, batch_size, dsa, milestones, window, samples, precision=precision
    )


def train_and_test(make_network, count, images, config, test, seed, keys, folder):
    """Train `count` networks on the union and test them: the evaluation inside a stage of PDD+MTT.

    Args:
        make_network: function of k returning network k at its start.
        images: `ImageDataset` of the union.
        config: `TrainConfig`.
        test: `ImageDataset` to measure accuracies on.
        seed, keys: of the random streams; network k adds k.
        folder: keeps each finished network's accuracy if the run is interrupted.

    Returns:
        List of `count` accuracies in percent.
    """

    # On a GPU the networks of a rank train as one.
    hands = distributed.deal(range(count)) if images.labels.is_cuda else [(k,) for k in range(count)]
    key = [seed, list(keys), images.images, config.lr, config.epochs]
    with contextlib.closing(Progress(count, "evaluation, network")) as progress:

        def begin(mine):
            progress.expect(sum(map(len, mine)))

        def train(numbers):
            members = [make_network(k) for k in numbers]
            training.train_together(members, images, config, seed, [(*keys, k) for k in numbers])
            accuracies = [training.accuracy(member, test) for member in members]
            progress.update(len(members), accuracy=accuracies[-1])
            return accuracies

        found = finish_each(folder, f"evaluation-{keys[-1]}", key, hands, train, begin)
    accuracies = dict(zip(itertools.chain(*hands), itertools.chain(*found), strict=True))
    return [accuracies[k] for k in range(count)]


def transition(make_network, experts, union, config, real, real_config, folder, group, seed, stage):
    """Between two stages: every expert network is trained on the union, then on real data into new trajectories.

    Args:
        make_network: function of a flat parameter vector returning a network with these parameters.
        experts: `Experts` of the stage that ends.
        union: `ImageDataset` of its best union.
        config: `TrainConfig` for the union.
        real: `ImageDataset` of the real images.
        real_config: `TrainConfig` for them; its epochs are the trajectory's length minus one.
        folder: of the stage that ends; receives the replay buffers of the next stage.
        group: trajectories of one replay buffer.
        seed, stage: of the random streams.
    """
    # Before the other ranks read what is there: merging removes files.
    distributed.on_rank0(lambda: BufferWriter(folder, len(experts), group).merge())
    writer = BufferWriter(folder, len(experts), group)
    mine = distributed.share(distributed.on_rank0(writer.missing))
    progress = Progress(len(mine), f"stage {stage}, transition, expert")
    for k in mine:
        network = make_network(experts.parameters(k, 0))
        training.train(network, union, config, seed, ("transition", stage, k))
        trajectory = record_trajectory(network, real, real_config, seed, ("trajectory", stage, k))
        if not is_finite(trajectory):
            raise UserError(
                f"stage {stage}, transition, expert {k + 1}: its parameters became NaN or infinite; begin anew "
                "with another --tag, and --syn_lr_form exp or a lower --lr_lr or --mom"
            )
        writer.add(k, trajectory, alone=distributed.size() == 1)
        progress.update()
    progress.close()
    distributed.barrier()
    distributed.on_rank0(writer.merge)


def staged_accuracies(network, unions, config_of, test, seed, keys, carry=True, checks=1, progress=None):
    """Train one network on union 1, then union 2, …, and test it after each.

    Args:
        network: at its start; trained in place.
        unions: list of `ImageDataset`s, in order.
        config_of: function of the stage's index (from 0) returning its `TrainConfig`.
        test: `ImageDataset` to test on.
        seed, keys: of the random streams; each stage adds its index.
        carry: carry the momentum of SGD on from union to union.
        checks: how often to test in each stage, at equal distances; the last time at its end.
        progress: `Progress` that counts epochs; None for none.

    Returns:
        List of the accuracies in percent of each stage: a list of `checks` numbers for each.
    """
    accuracies, optimizer = [], None
    for index, union in enumerate(unions):
        config, found = config_of(index), []
        due = {round(config.epochs * check / checks) - 1 for check in range(1, checks + 1)}

        def test_if_due(epoch, loss, due=due, found=found):
            if epoch in due:
                found.append(training.accuracy(network, test))
            if progress:
                progress.update(loss=loss)

        optimizer = optimizer if carry else None
        optimizer = training.train(network, union, config, seed, (*keys, index), optimizer, after_epoch=test_if_due)
        accuracies.append(found)
    return accuracies


@torch.no_grad()
def soft_labels(network, images, temperature):
    """Return the soft labels (N, K) that a network gives images (N, C, H, W): softmax of logits over `temperature`.

    Batch normalisation takes the statistics of these images: trajectories hold no running ones.
    """
    network.train()
    size = max(1, len(images)) if has_batch_statistics(network) else training.testing_batch(images.shape[-1])
    return torch.cat([(network(part) / temperature).softmax(1) for part in images.split(size)])


@torch.no_grad()
def soft_labels_of_stages(network, vectors, totals, temperature, images):
    """Return soft labels (N, K) of a union whose stages have a teacher each, as the learned ones started from.

    Args:
        network: takes the teachers' parameters.
        vectors: flat parameters (numel,) of every stage's teacher.
        totals: images of each class after each stage.
        temperature: as for `soft_labels`.
        images: (N, C, H, W), sorted by class, in a class by stage.
    """
    labels, classes = None, network.eval()(images[:1]).shape[1]  # one image alone has no batch statistics
    place = torch.arange(len(images), device=images.device) % (len(images) // classes)
    for vector, first, last in zip(vectors, [0, *totals], totals, strict=False):
        own = (place >= first) & (place < last)
        if own.any():
            set_flat(network, vector)
            found = soft_labels(network, images[own], temperature)
            labels = found.new_zeros(len(images), classes) if labels is None else labels
            labels[own] = found
    return labels


def random_unions(real, ranges, seed, keys):
    """Return the unions of a distillation that learned nothing: random real images of equal number.

    Args:
        real: `RealData`.
        ranges: for each union (first, last): which of the images drawn for a class are in it.
        seed, keys: of the random stream.

    Returns:
        List of `ImageDataset`s.
    """
    rng = stream(seed, "random", *keys)
    device = real.train.images.device
    advice = (
        "leave the row of random real images out with --skip_random, or distil with --ipc times --num_intervals at "
        f"most {real.smallest_class}"
    )
    most = max(last for _, last in ranges)
    chosen = np.stack([real.random_indices(c, most, rng, advice) for c in range(real.info.num_classes)])
    parts = [torch.from_numpy(chosen[:, first:last].reshape(-1)) for first, last in ranges]
    return [real.train.subset(index.to(device)) for index in parts]

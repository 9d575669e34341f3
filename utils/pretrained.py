"""Networks pretrained on real images, from which PDD+IDC may start its outer iterations (--pt_from, --pt_num)."""

from . import training
from .run import distributed, files
from .run.errors import UserError
from .run.log import Progress, log0


def load_pretrained(path, network):
    """Load a pretrained network's state into `network`; returns it.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    if not path.exists():
        raise UserError(
            f"{path}: expected a pretrained network, found none; make it by the same command with --pretrain"
        )
    try:
        saved = files.load(path, "a pretrained network")
        network.load_state_dict(saved)
        if not all(bool(value.isfinite().all()) for value in saved.values()):
            raise UserError(f"{path}: expected finite parameters, found NaN or infinity; make it anew with --pretrain")
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(
            f"{path}: expected a network of this architecture, found another; make it anew with --pretrain"
        ) from None
    return network


def pretrain(paths, new_network, real, config, seed):
    """Train one network for each of `paths` on real images, and save it there unless it exists.

    Args:
        paths: list of files.
        new_network: function of k returning network k at its start.
        real: `RealData`.
        config: `TrainConfig`.
        seed: of the random streams.
    """
    for number in distributed.share(range(len(paths))):
        path = paths[number]
        if path.exists():
            log0(f"{path}: there already")
            continue
        network = new_network(number)
        progress = Progress(config.epochs, f"pretraining network {number + 1}/{len(paths)}, epoch")
        training.train(
            network,
            real.train,
            config,
            seed,
            ("pretrain", number),
            after_epoch=lambda _epoch, loss, progress=progress: progress.update(loss=loss),
        )
        progress.close()
        files.save(path, training.state_on_cpu(network))
        log0(f"{path}: test accuracy {training.accuracy(network, real.test):.2f} %")

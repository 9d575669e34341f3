"""Networks pretrained on real images, from which PDD+IDC may start its outer iterations (--pt_from, --pt_num)."""

from . import training
from .run import distributed, files
from .run.errors import UserError
from .run.log import Progress, log0


def load_pretrained(path, network):
    """Load a pretrained network's state into `network`; returns it.

    Raises:
        UserError: the file is damaged or of another network.
    """
    try:
        saved = files.load(path, "a pretrained network")
        network.load_state_dict(saved)
        if not all(bool(value.isfinite().all()) for value in saved.values()):
            raise UserError(
                f"{path}: expected finite parameters, found NaN or infinity; delete it, make it anew with --pretrain"
            )
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(
            f"{path}: expected a network of this architecture, found another; delete it, make it anew with --pretrain"
        ) from None
    return network


def find_pretrained(folder, epochs, suffix):
    """Return the files network_{seed}_epoch{epoch}{suffix}.pt in `folder`, any seed, epochs in the range `epochs`.

    The suffix marks networks that never saw the images held out.

    Raises:
        UserError: there are none.
    """
    found = [path for epoch in epochs for path in sorted(folder.glob(f"network_*_epoch{epoch}{suffix}.pt"))]
    if not found:
        raise UserError(
            f"{folder}: expected pretrained networks (network_{{seed}}_epoch{epochs[0]}{suffix}.pt), found none; make "
            "them by the same command with --pretrain, for one or several --seed"
        )
    return found


def pretrain(folder, network, real, config, seed, epochs, suffix):
    """Train a fresh network on `RealData` and save it after each of `epochs`, as `find_pretrained` finds it.

    `config` is a `TrainConfig` that ends with the last of `epochs`. Files that are all there already are kept.
    """
    paths = {epoch: folder / f"network_{seed}_epoch{epoch}{suffix}.pt" for epoch in epochs}
    if distributed.on_rank0(lambda: all(path.exists() for path in paths.values())):
        log0(f"{folder}: network {seed} is there already")
        return
    progress = Progress(config.epochs, f"pretraining network {seed}, epoch")

    def save(epoch, loss):
        progress.update(loss=loss)
        if epoch + 1 in epochs and distributed.is_rank0():
            files.save(paths[epoch + 1], training.state_on_cpu(network))

    training.train(network, real.train, config, seed, ("pretrain", seed), after_epoch=save)
    progress.close()
    log0(
        f"{folder}: network {seed} after {config.epochs} epochs: test accuracy "
        f"{training.accuracy(network, real.test):.2f} %"
    )

"""Results belong to their data: what they were made from is compared with what they are used with."""

from pathlib import Path

from ..data.info import changes
from ..run import files
from ..run.errors import UserError
from ..run.log import log0

DATA = "data.json"  # the data set of a result, beside it


def check_data(path, fingerprint, info):
    """Compare the fingerprint in a file with that of the data that are used now.

    Args:
        path: of the file, for messages.
        fingerprint: what it says; None in published files and in those of earlier versions.
        info: `DatasetInfo` of the data.

    Raises:
        UserError: the data are others; the message names what changed.
    """
    if fingerprint is None:
        log0(f"note: {path}: nothing says which data it was made from; it is taken to be {info.name} as it is here")
        return
    try:
        changed = changes(fingerprint, info.fingerprint)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: expected the fingerprint of its data, found something else; move it away") from None
    if changed:
        raise UserError(
            f"{path}: made from other data than these ({changed}); use the data it was made from, or begin anew in "
            "another folder or without this one"
        )


def check_result(folder, info):
    """Compare the data of the result in `folder` with those that are used now.

    Raises:
        UserError: they are others.
    """
    path = Path(folder) / DATA
    known = files.read_json(path, "the description of a data set") if path.exists() else {}
    check_data(path if known else folder, known.get("fingerprint"), info)

"""The kind of a path, to check before it is opened: opening a pipe or a device may block."""

import os
import stat

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind(path: str | os.PathLike[str]) -> str | None:
    """Return "a folder", "a pipe", "a socket" or "a device". Return `None` for a file, or if nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it will raise the error
        return None
    return next((name for is_one, name in _KINDS if is_one(mode)), None)

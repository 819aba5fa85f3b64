"""What a path leads to, before it is opened: to open a pipe or a device is to wait for it."""

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
    """What the path leads to that is no file: a folder, a pipe, a socket or a device. `None` for a file, and for nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it tells why
        return None
    return next((name for is_one, name in _KINDS if is_one(mode)), None)

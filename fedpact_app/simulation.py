"""Where the members of Flower's simulation listen: a folder of this user's alone, named after the run."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def simulated_folder(run_id: int) -> Path:
    """The folder of a simulated run's sockets."""
    return Path(tempfile.gettempdir()) / f"fedpact-{os.getuid()}-{run_id:x}"


def simulated_socket(run_id: int, node_id: int) -> Path | None:
    """The socket of one simulated node; None if there is none, or others could have put it there."""
    folder = simulated_folder(run_id)
    try:
        found = folder.lstat()
    except OSError:
        return None
    own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    return folder / f"{node_id:x}.sock" if own else None

"""Disks that refuse a write: which errors say so, and which disk it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def mount(path: Path) -> Path:
    """Where the file system that holds `path` is mounted; `path` need not exist."""
    path = path.resolve()
    while not os.path.ismount(path):
        path = path.parent
    return path

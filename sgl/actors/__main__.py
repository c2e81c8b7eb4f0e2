"""`python -m sgl.actors KIND FD PARENT`: where every actor's process begins.

Before anything that takes time is imported, its life is tied to its parent's: a supervisor that is
killed while its children start leaves none of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent ends, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


if __name__ == "__main__":
    kind, bootstrap_fd, parent_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent_pid)

    from sgl.actors.actor import main

    main(kind, bootstrap_fd)

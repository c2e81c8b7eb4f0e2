"""`python -m sgl.actors KIND FD PARENT`: where every actor's process begins.

Before anything that takes time is imported, its life is tied to its parent's: a supervisor that is
killed while its children start leaves none of them.
"""

from __future__ import annotations

import sys

from sgl.processes import die_with_parent

if __name__ == "__main__":
    kind, bootstrap_fd, parent_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent_pid)

    from sgl.actors.actor import main

    main(kind, bootstrap_fd)

"""The shared prefixes of a step's decodes, as the decode kernel wants them.

Axes: B decodes of the step    N blocks: a prefix and some of the requests that share it
"""

from __future__ import annotations

import numpy as np

from sgl.execution.attention.shared_prefix import find_clusters
from sgl.execution.request_table import RequestTable
from sgl.execution.step_layout import StepLayout


class PrefixBlocks:
    """Looked for only when other requests decode than in the step before.

    version counts the changes
    lens_B  leading tokens of each request that a block attends to
    blocks  int32 [N, 2 + members]: the prefix's length, how many of the following count, the
            requests (of the B)
    """

    def __init__(self, page_size: int, members_per_block: int) -> None:
        self.page_size = page_size
        self.members_per_block = members_per_block
        self.lens_B = np.zeros(0, np.int32)
        self.blocks = np.zeros((0, 2 + members_per_block), np.int32)
        self.version = 0
        self._decodes: tuple[bytes, bytes] = b"", b""

    def update(self, layout: StepLayout, table: RequestTable) -> None:
        """Look at a step."""
        rows_B = layout.rows_B[: layout.num_decodes]
        decodes = rows_B.tobytes(), table.num_owners_R[rows_B].tobytes()
        if decodes == self._decodes:
            return
        self._decodes = decodes
        self.version += 1
        self.lens_B = np.zeros(len(rows_B), np.int32)
        found = []
        for first in self._with_common_start(rows_B, table):
            starts = layout.kv_lens_B[first] - 1
            pages = table.pages_RP[rows_B[first], : int(starts.max()) // self.page_size]
            for cluster in find_clusters(pages, starts, self.page_size):
                if cluster.shared_len:
                    members = first[cluster.members]
                    self.lens_B[members] = cluster.shared_len
                    found += self._blocks(members, cluster.shared_len)
        self.blocks = np.array(found, np.int32).reshape(-1, 2 + self.members_per_block)

    def _with_common_start(self, rows_B: np.ndarray, table: RequestTable) -> list[np.ndarray]:
        """Groups of requests with the same first page: all others share nothing."""
        pages_B = table.pages_RP[rows_B, 0]
        order = np.argsort(pages_B, kind="stable")
        ends = np.flatnonzero(np.diff(pages_B[order])) + 1
        return [group for group in np.split(order, ends) if len(group) > 1]

    def _blocks(self, members: np.ndarray, shared_len: int) -> list[list[int]]:
        size = self.members_per_block
        return [
            [shared_len, len(part), *part, *[0] * (size - len(part))]
            for part in (members[i : i + size].tolist() for i in range(0, len(members), size))
        ]

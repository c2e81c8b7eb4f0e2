"""The shape of one step, known to the host before any of its tokens is.

Axes: T tokens of the step    B requests of the step
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sgl.execution.request_table import RequestTable
from sgl.messages import StepPlan


def padded_len(num_tokens: int) -> int:
    """Rows of inputs start 64 bytes apart: kernels are compiled anew for other alignments."""
    return -(-num_tokens // 16) * 16


@dataclass(frozen=True, slots=True)
class Outputs:
    """Tokens of a step whose output is wanted, the newest of each of W requests; on the device.

    tokens_W   which of the T they are
    rows_W, positions_W   row of the request table and position of each
    """

    tokens_W: Tensor
    rows_W: Tensor
    positions_W: Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The shape of a step, known to the host before any token is.

    rows_B        rows of the request table: those that decode, then those that prefill
    query_lens_B  tokens each computes in this step
    kv_lens_B     tokens each has KV of after this step
    num_decodes   how many of the B are decodes
    """

    rows_B: np.ndarray
    query_lens_B: np.ndarray
    kv_lens_B: np.ndarray
    num_decodes: int

    @classmethod
    def of(cls, plan: StepPlan, decode_rows: np.ndarray, table: RequestTable) -> StepLayout:
        """Lay a plan out, and count its tokens into the table's lengths."""
        chunks = plan.chunks
        rows = np.concatenate([decode_rows, [chunk.row for chunk in chunks]]).astype(np.int64)
        query_lens = np.ones(len(rows), np.int64)
        query_lens[len(decode_rows) :] = [len(chunk.token_ids) // 4 for chunk in chunks]
        table.lens_R[rows] += query_lens
        return cls(rows, query_lens, table.lens_R[rows], len(decode_rows))

    def part(self, begin: int, end: int) -> StepLayout:
        """The step with nothing but these of its requests."""
        num_decodes = min(max(self.num_decodes - begin, 0), end - begin)
        lens = self.query_lens_B[begin:end], self.kv_lens_B[begin:end]
        return StepLayout(self.rows_B[begin:end], *lens, num_decodes)

    def outputs(self, requests_W: np.ndarray, table: RequestTable) -> Outputs:
        """The newest tokens of some requests of the step."""
        num = len(requests_W)
        host_3W = np.zeros((3, padded_len(num)), np.int32)
        host_3W[:, :num] = self.host_outputs(requests_W)
        return Outputs(*table.to_device(host_3W)[:, :num])

    def host_outputs(self, requests_W: np.ndarray) -> np.ndarray:
        """What `Outputs` holds of them."""
        last_W = self.token_ends[requests_W] - 1
        return np.stack([last_W, self.rows_B[requests_W], self.kv_lens_B[requests_W] - 1])

    @property
    def num_tokens(self) -> int:
        return int(self.query_lens_B.sum())

    @property
    def token_ends(self) -> np.ndarray:
        """Where each request's tokens end among the T."""
        return np.cumsum(self.query_lens_B)

    def positions(self) -> np.ndarray:
        """Position of every token in its request."""
        starts = self.kv_lens_B - self.query_lens_B
        first = np.repeat(starts - (self.token_ends - self.query_lens_B), self.query_lens_B)
        return first + np.arange(self.num_tokens)

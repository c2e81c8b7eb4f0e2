"""What the worker remembers of every running request, on the device: pages, last token, sampling.

A plan tells only what changes, so a decode step needs no token from the scheduler: it reads the
token that the step before has left here. Lengths and flags are known to the host in advance and
are kept there (`*_R` numpy arrays), so nothing ever waits for the device to learn a shape. The
pages that a step's tokens go to are noted on the device by the step itself (`take_tokens`).

Axes: R rows    P pages of a row    V vocabulary
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgl.kernels.sampling_table import GREEDY, NUMBERS, SamplingTable
from sgl.messages import LogprobOptions, NewRow, StepPlan
from sgl.sampling_params import SamplingParams


class RequestTable:
    """Rows are taken and given up by the plan; the table itself decides nothing.

    One row more than requests may have, `padding_row`, is for what fills a batch up.
    """

    def __init__(
        self, max_rows: int, max_pages_per_row: int, vocab_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self.padding_row = max_rows
        self.pages_RP = np.zeros((max_rows + 1, max_pages_per_row), np.int32)
        self.num_pages_R = np.zeros(max_rows, np.int64)
        self.num_owners_R = np.zeros(max_rows, np.int64)  # requests that had the row
        self.lens_R = np.zeros(max_rows, np.int64)  # tokens with KV, counting the step at hand
        self.num_output_R = np.zeros(max_rows, np.int64)
        self.is_greedy_R = np.ones(max_rows, bool)
        self.has_penalty_R = np.zeros(max_rows, bool)
        self.has_bias_R = np.zeros(max_rows, bool)
        self.wants_logprobs_R = np.zeros(max_rows, bool)
        self.min_output_R = np.zeros(max_rows, np.int64)
        self.logprobs: list[LogprobOptions | None] = [None] * max_rows
        self.eos_ids: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * max_rows
        self.biases: list[tuple[Tensor, Tensor] | None] = [None] * max_rows

        self._decode_rows = np.zeros(0, np.int32)  # of the last plan that named them
        self.device_pages_RP = self._on_device(self.pages_RP)
        self.last_token_R = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.sampling = SamplingTable.greedy(max_rows + 1, device)
        self._numbers: list[tuple[float, ...]] = [GREEDY] * max_rows  # those in `sampling`
        self.output_counts_RV: Tensor | None = None
        self.is_in_prompt_RV: Tensor | None = None

    def apply(self, plan: StepPlan) -> np.ndarray:
        """Take a plan's row and page changes in; returns its decode rows."""
        for new in plan.admitted:
            self._admit(new)
        for chunk in plan.chunks:
            self._append_pages(chunk.row, np.frombuffer(chunk.pages, np.int32))
        if plan.decode_rows is not None:
            self._decode_rows = np.frombuffer(plan.decode_rows, np.int32)
        if plan.page_ids:
            rows = np.frombuffer(plan.page_rows, np.int32) if plan.page_rows else self._decode_rows
            self._append_one_page_each(rows, np.frombuffer(plan.page_ids, np.int32))
        return self._decode_rows

    def to_device(self, array: np.ndarray) -> Tensor:
        """A host array as a device tensor; on a GPU the copy does not wait."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _admit(self, new: NewRow) -> None:
        row, sampling = new.row, new.sampling
        self.num_pages_R[row] = 0
        self.num_owners_R[row] += 1
        cached = np.frombuffer(new.pages, np.int32)
        self._append_pages(row, cached)
        if len(cached) and self.device.type != "cpu":
            self.device_pages_RP[row, : len(cached)].copy_(self.to_device(cached.copy()))
        self.lens_R[row] = new.num_cached
        self.num_output_R[row] = new.num_output
        self.logprobs[row] = new.logprobs
        self.wants_logprobs_R[row] = new.logprobs is not None
        self.is_greedy_R[row] = sampling.is_greedy
        self.has_penalty_R[row] = sampling.has_penalty
        self.has_bias_R[row] = bool(sampling.logit_bias)
        self.min_output_R[row] = sampling.min_new_tokens
        if sampling.min_new_tokens:
            self.eos_ids[row] = self._ids(new.eos_ids)
        if sampling.logit_bias:
            ids = np.array(list(sampling.logit_bias), np.int64)
            values = np.array(list(sampling.logit_bias.values()), np.float32)
            self.biases[row] = (self.to_device(ids), self.to_device(values))
        self._set_numbers(row, sampling)
        if not sampling.is_greedy:
            self.sampling.seed_R[row].fill_(new.seed)
        if sampling.has_penalty:
            self._count_tokens(row, new)

    def _set_numbers(self, row: int, sampling: SamplingParams) -> None:
        top_k = self.vocab_size if sampling.top_k == -1 else min(sampling.top_k, self.vocab_size)
        chosen = {"top_k": float(top_k)}
        if sampling.is_greedy:
            chosen = {"temperature": 1.0, "top_k": 1.0, "top_p": 1.0, "min_p": 0.0}
        numbers = tuple(float(chosen.get(name, getattr(sampling, name))) for name in NUMBERS)
        if numbers != self._numbers[row]:
            self._numbers[row] = numbers
            self.sampling.numbers_RN[row] = self.to_device(np.array(numbers, np.float32))

    def _count_tokens(self, row: int, new: NewRow) -> None:
        if self.output_counts_RV is None or self.is_in_prompt_RV is None:
            shape = (self.padding_row, self.vocab_size)
            self.output_counts_RV = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.is_in_prompt_RV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        output_ids = self._ids(new.output_ids)
        ones = torch.ones_like(output_ids, dtype=torch.int32)
        self.output_counts_RV[row].zero_().index_add_(0, output_ids, ones)
        self.is_in_prompt_RV[row].zero_().index_fill_(0, self._ids(new.prompt_ids), True)

    def _append_pages(self, row: int, pages: np.ndarray) -> None:
        start = self.num_pages_R[row]
        self.pages_RP[row, start : start + len(pages)] = pages
        self.num_pages_R[row] += len(pages)

    def _append_one_page_each(self, rows: np.ndarray, pages: np.ndarray) -> None:
        columns = self.num_pages_R[rows]
        self.pages_RP[rows, columns] = pages
        self.num_pages_R[rows] += 1

    def _ids(self, data: bytes) -> Tensor:
        return self.to_device(np.frombuffer(data, np.int32).astype(np.int64))

    def _on_device(self, array: np.ndarray) -> Tensor:
        """On the CPU the device's table is the host's memory; elsewhere a copy kept in step."""
        return torch.from_numpy(array).to(self.device)

"""Runs one planned step on the device: table, forward pass, sampler, log-probabilities.

A model that gives vectors makes one of a prompt's last token in place of a token after it.

Axes: T tokens of the step    B requests of the step    D hidden    V vocabulary
      N numbers of a vector
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sgl.execution import logprobs
from sgl.execution.attention import AttentionBackend
from sgl.execution.forward_batch import ForwardBatch, step_inputs
from sgl.execution.request_table import RequestTable
from sgl.execution.sampler import Sampler
from sgl.execution.step_graphs import StepGraphs
from sgl.execution.step_layout import Outputs, StepLayout, padded_len
from sgl.kernels.collectives import TensorParallel
from sgl.kernels.step_tokens import best_tokens
from sgl.kernels.token_masks import apply_token_masks
from sgl.messages import Chunk, Logprobs, RowLogprobs, StepPlan, StepResult, pack
from sgl.models.pooling import Model, PooledModel

WARM_UP_TOKENS = 300  # kernels for few tokens and for many differ


@dataclass(slots=True)
class StepOutput:
    """A launched step. What it made may still be on its way from the device.

    made  token ids int64 [B], or vectors float32 [B, N]
    """

    step: int
    made: Tensor
    logprobs: list[RowLogprobs]
    event: torch.cuda.Event | None = None
    error: str = ""
    failed: tuple[int, ...] = ()

    def wait(self) -> StepResult:
        """Wait for it to arrive."""
        if self.event is not None:
            self.event.synchronize()
        made, failed = self.made.numpy(), pack(self.failed)
        if made.dtype == np.float32:
            vectors = [row_N.tobytes() if np.isfinite(row_N).all() else b"" for row_N in made]
            return StepResult(self.step, b"", [], self.error, failed, vectors)
        token_ids = made.astype(np.int32).tobytes()
        return StepResult(self.step, token_ids, self.logprobs, self.error, failed)


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Masks of a step's tokens, which come while its forward pass runs.

    indices_M  which of the sampled tokens
    fetch      waits for the masks and gives the different ones, words of 32 ids: int32 [D, W], and
               for each of the tokens which of these it is: [M]
    """

    indices_M: np.ndarray
    fetch: Callable[[], tuple[np.ndarray, np.ndarray]]


NO_MASKS = StepMasks(
    np.zeros(0, np.int64), lambda: (np.zeros((0, 0), np.int32), np.zeros(0, np.int32))
)


class TokensAreMadeError(torch.OutOfMemoryError):
    """Memory ran out after the tokens were drawn and counted: the step cannot be run again."""


class Runner:
    """Owns everything of one rank that lives on the device, except the process."""

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        attention: AttentionBackend,
        tp: TensorParallel,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model = model
        self.table = table
        self.attention = attention
        self.tp = tp
        self.graphs = graphs
        self.sampler = Sampler(table)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int = WARM_UP_TOKENS, num_sampled: int = 1) -> None:
        """Compute prompts that are nobody's: kernels are compiled and libraries loaded by it.

        num_sampled  tokens at the end that get logits
        """
        table, cache = self.table, self.attention.cache
        max_len = table.pages_RP.shape[1] * cache.page_size
        ends = np.minimum(np.arange(0, num_tokens, max_len) + max_len, num_tokens)
        lens_B = np.diff(ends, prepend=0)
        rows_B = np.full(len(lens_B), table.padding_row)
        layout = StepLayout(rows_B, lens_B, lens_B, num_decodes=0)
        inputs_4T = np.zeros((4, padded_len(num_tokens)), np.int32)
        inputs_4T[0] = table.padding_row
        inputs_4T[1, :num_tokens] = layout.positions()
        inputs_4T[2] = cache.padding_page * cache.page_size
        hidden_BD = self._hidden(inputs_4T, layout, None)[-num_sampled:]
        if isinstance(self.model, PooledModel):
            self.model.vectors(hidden_BD)
            return
        logits_BV = self._logits(hidden_BD)
        rows_B, positions_B = table.to_device(inputs_4T)[:2, : len(logits_BV)]
        self.sampler.warm_up(logits_BV, rows_B, positions_B)

    @torch.inference_mode()
    def run(self, plan: StepPlan, masks: StepMasks = NO_MASKS) -> StepOutput:
        """Launch a step; on a GPU this returns before it is computed."""
        decode_rows = self.table.apply(plan)
        layout = StepLayout.of(plan, decode_rows, self.table)
        try:
            return self._output(plan.step, *self._compute(plan.chunks, layout, masks))
        except TokensAreMadeError:
            raise  # a second time they would be made of themselves
        except torch.OutOfMemoryError:
            if self.tp.size > 1 or not plan.chunks:
                raise  # the other ranks wait for us in the middle of the step
        torch.cuda.empty_cache()
        return self._run_apart(plan, layout, masks)

    def _run_apart(self, plan: StepPlan, layout: StepLayout, masks: StepMasks) -> StepOutput:
        """After the whole step did not fit into memory: decodes, then each prompt by itself.

        What was stored before the memory ran out is stored again. Prompts that do not fit even so
        fail, nobody else does.
        """
        all_made, reports, failed, error, num_sampled = [], [], [], "", 0
        num = layout.num_decodes
        parts: list[tuple[int, int, list[Chunk]]] = [(0, num, [])] if num else []
        parts += [(num + i, num + i + 1, [chunk]) for i, chunk in enumerate(plan.chunks)]
        for begin, end, chunks in parts:
            num_made = int(chunks[0].is_last) if chunks else end - begin
            first, num_sampled = num_sampled, num_sampled + num_made
            try:
                mine = _part(masks, first, num_sampled)
                made, found = self._compute(chunks, layout.part(begin, end), mine)
            except torch.OutOfMemoryError as out_of_memory:
                if not chunks:
                    raise
                failed.append(begin)
                error = f"out of memory: {out_of_memory}"
                torch.cuda.empty_cache()
                made, found = self._not_made(num_made), []
            all_made.append(made)
            reports += [RowLogprobs(begin + row.index, row.input, row.output) for row in found]
        output = self._output(plan.step, torch.cat(all_made), reports)
        return replace(output, error=error, failed=tuple(failed))

    def _compute(
        self, chunks: list[Chunk], layout: StepLayout, masks: StepMasks
    ) -> tuple[Tensor, list[RowLogprobs]]:
        """Launch a forward pass; the sampled tokens or the vectors, and log-probabilities."""
        inputs_4T = step_inputs(chunks, layout, self.table, self.attention.cache.page_size)
        sampled, of_prompts = _sampled(chunks, layout), {}
        wants_prompt_logprobs = any(chunk.logprob_start >= 0 for chunk in chunks)
        if self.graphs is not None and not wants_prompt_logprobs:
            launched = self.graphs.launch(inputs_4T, layout, sampled)
            if launched is not None:
                token_ids, found = self._sample_recorded(*launched, layout, sampled, masks)
                return token_ids, _reports({}, found)
        if wants_prompt_logprobs:
            hidden_TD = self._hidden(inputs_4T, layout, None)
            of_prompts = self._prompt_logprobs(hidden_TD, layout, chunks)
            hidden_BD = hidden_TD[self.table.to_device(layout.token_ends[sampled] - 1)]
        else:
            are_all = len(sampled) == layout.num_tokens
            outputs = None if are_all else layout.outputs(sampled, self.table)
            hidden_BD = self._hidden(inputs_4T, layout, outputs)
        token_ids, of_tokens = self._sample(hidden_BD, layout, sampled, masks)
        return token_ids, _reports(of_prompts, of_tokens)

    def _hidden(
        self, host_inputs_4T: np.ndarray, layout: StepLayout, outputs: Outputs | None
    ) -> Tensor:
        """The model's output for these tokens, or all."""
        inputs_4T = self.table.to_device(host_inputs_4T)[:, : layout.num_tokens]
        batch = ForwardBatch(inputs_4T, self.table, self.attention, outputs)
        self.attention.plan(layout, self.table, inputs_4T)
        return self.model.hidden(batch)

    def _sample(
        self, hidden_BD: Tensor, layout: StepLayout, sampled: np.ndarray, masks: StepMasks
    ) -> tuple[Tensor, dict[int, Logprobs]]:
        """Tokens of the sampled requests, and log-probabilities by the request's index; or vectors.

        Rank 0 draws the tokens for all, so ranks cannot diverge.
        """
        if not len(sampled):
            return self._not_made(0), {}
        if isinstance(self.model, PooledModel):
            return self.model.vectors(hidden_BD), {}
        logits_BV = self.model.logits(hidden_BD)
        rows_B = layout.rows_B[sampled]
        if self._takes_best(rows_B, masks):
            device_rows_B = self.table.to_device(rows_B.astype(np.int32))
            self.sampler.count(rows_B)
            return best_tokens(logits_BV, device_rows_B, self.table.last_token_R, self.tp), {}
        return self._sample_logits(self._whole(logits_BV), layout, sampled, masks)

    def _sample_recorded(
        self,
        logits_BV: Tensor,
        ids_B: Tensor,
        layout: StepLayout,
        sampled: np.ndarray,
        masks: StepMasks,
    ) -> tuple[Tensor, dict[int, Logprobs]]:
        """As `_sample` after a recorded step, which has taken the best tokens already."""
        rows_B = layout.rows_B[sampled]
        if self._takes_best(rows_B, masks):
            self.sampler.count(rows_B)
            return ids_B, {}
        return self._sample_logits(self._whole(logits_BV), layout, sampled, masks)

    def _takes_best(self, rows_B: np.ndarray, masks: StepMasks) -> bool:
        """Whether the rows need no more than their best tokens, on which all ranks agree."""
        is_plain = self.sampler.is_plain(rows_B) and not len(masks.indices_M)
        return is_plain and not self.table.wants_logprobs_R[rows_B].any()

    def _not_made(self, num: int) -> Tensor:
        """In place of tokens or vectors that there are none of."""
        device = self.table.device
        if isinstance(self.model, PooledModel):
            return torch.full((num, self.model.vector_size), torch.nan, device=device)
        return torch.full((num,), -1, dtype=torch.int64, device=device)

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        assert not isinstance(self.model, PooledModel), "its vectors have no log-probabilities"
        return self._whole(self.model.logits(hidden_BD))

    def _whole(self, logits_BV: Tensor) -> Tensor:
        """Logits of the whole vocabulary, from those of this rank's part of it."""
        return self.tp.all_gather_last(logits_BV)[:, : self.table.vocab_size].contiguous()

    def _sample_logits(
        self, logits_BV: Tensor, layout: StepLayout, sampled: np.ndarray, masks: StepMasks
    ) -> tuple[Tensor, dict[int, Logprobs]]:
        rows_B, positions_B = layout.rows_B[sampled], layout.kv_lens_B[sampled] - 1
        if self.tp.rank != 0:
            ids_B = torch.empty(len(rows_B), dtype=torch.int64, device=logits_BV.device)
            self.sampler.take(self.tp.broadcast(ids_B), rows_B)
            return ids_B, {}
        wanted = np.flatnonzero(self.table.wants_logprobs_R[rows_B])
        raw_logits = logits_BV[self.table.to_device(wanted)] if len(wanted) else None
        if len(masks.indices_M):
            masks_DW, which_M = masks.fetch()
            places_2M = np.stack([masks.indices_M, which_M]).astype(np.int32)
            rows_M, which_M = self.table.to_device(places_2M)
            apply_token_masks(logits_BV, rows_M, self.table.to_device(masks_DW), which_M)
        ids_B = self.tp.broadcast(self.sampler.sample(logits_BV, rows_B, positions_B))
        if raw_logits is None:
            return ids_B, {}
        try:
            return ids_B, {
                int(sampled[index]): self._token_logprobs(
                    logits_V, ids_B[index], int(rows_B[index])
                )
                for logits_V, index in zip(raw_logits, wanted, strict=True)
            }
        except torch.OutOfMemoryError as error:
            raise TokensAreMadeError(str(error)) from error

    def _token_logprobs(self, logits_V: Tensor, token_id: Tensor, row: int) -> Logprobs:
        options = self.table.logprobs[row]
        assert options is not None
        return logprobs.of_tokens(logits_V.unsqueeze(0), token_id.unsqueeze(0), options)

    def _prompt_logprobs(
        self, hidden_TD: Tensor, layout: StepLayout, chunks: list[Chunk]
    ) -> dict[int, Logprobs]:
        """Log-probabilities of prompt tokens, by the index of the request that wants them."""
        reports = {}
        for number, chunk in enumerate(chunks):
            options = self.table.logprobs[chunk.row]
            if chunk.logprob_start < 0 or options is None:
                continue
            index = layout.num_decodes + number
            end = int(layout.token_ends[index])
            begin = end - int(layout.query_lens_B[index]) + chunk.logprob_start - chunk.start
            next_ids = np.frombuffer(chunk.token_ids, np.int32)[chunk.logprob_start - chunk.start :]
            next_ids = np.append(next_ids[1:], chunk.next_token_id).astype(np.int64)
            if chunk.next_token_id < 0:
                next_ids = next_ids[:-1]
            reports[index] = logprobs.of_prompt(
                hidden_TD[begin : begin + len(next_ids)],
                self.table.to_device(next_ids),
                options,
                self._logits,
            )
        return reports

    def _output(self, step: int, made: Tensor, rows: list[RowLogprobs]) -> StepOutput:
        if made.device.type == "cpu":
            return StepOutput(step, made, rows)
        pinned = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        pinned.copy_(made, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return StepOutput(step, pinned, rows, event)


def _part(masks: StepMasks, begin: int, end: int) -> StepMasks:
    """Those of the tokens from `begin` to `end`, counted from there."""
    is_inside_M = (masks.indices_M >= begin) & (masks.indices_M < end)

    def fetch() -> tuple[np.ndarray, np.ndarray]:
        masks_DW, which_M = masks.fetch()
        return masks_DW, which_M[is_inside_M]

    return StepMasks(masks.indices_M[is_inside_M] - begin, fetch)


def _sampled(chunks: list[Chunk], layout: StepLayout) -> np.ndarray:
    """Which of the B requests get a token: every decode, and chunks that end a prompt."""
    ends = np.array([chunk.is_last for chunk in chunks], bool)
    return np.concatenate(
        [np.arange(layout.num_decodes), layout.num_decodes + np.flatnonzero(ends)]
    ).astype(np.int64)


def _reports(inputs: dict[int, Logprobs], outputs: dict[int, Logprobs]) -> list[RowLogprobs]:
    return [
        RowLogprobs(index, inputs.get(index), outputs.get(index))
        for index in sorted(inputs.keys() | outputs.keys())
    ]

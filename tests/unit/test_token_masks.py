"""Masks of grammars on logits: the reference against bits one by one, the kernel against it."""

from __future__ import annotations

import os

import pytest
import torch

from sgl.kernels import triton_token_masks
from sgl.kernels.token_masks import apply_token_masks_reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def make_masks(
    num_masks: int, vocab_size: int, share: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits, of which a share is set, and the same as words."""
    generator = torch.Generator().manual_seed(0)
    num_words = -(-vocab_size // 32)
    bits = torch.rand(num_masks, num_words * 32, generator=generator) < share
    powers = torch.tensor([1 << bit for bit in range(32)])
    words = (bits.view(num_masks, num_words, 32) * powers).sum(-1)
    return bits[:, :vocab_size], words.where(words < 2**31, words - 2**32).int()


@pytest.mark.parametrize("vocab_size", [5, 32, 100, 4099, 40_001])
@pytest.mark.parametrize("rows", [[0], [3, 1], []])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_what_is_not_allowed_gets_no_probability(rows, vocab_size, share):
    bits, words = make_masks(len(rows), vocab_size, share)
    logits = torch.randn(4, vocab_size)
    wanted, got = logits.clone(), logits.clone().to(DEVICE)
    for row, allowed in zip(rows, bits, strict=True):
        wanted[row, ~allowed] = float("-inf")
    rows_M = torch.tensor(rows, dtype=torch.int32)
    which_M = torch.arange(len(rows), dtype=torch.int32)
    reference = logits.clone()
    apply_token_masks_reference(reference, rows_M, words, which_M)
    assert torch.equal(reference, wanted)
    on_device = [it.to(DEVICE) for it in (rows_M, words, which_M)]
    triton_token_masks.apply_token_masks(got, *on_device)
    assert torch.equal(got.cpu(), wanted)


def test_rows_may_have_the_same_mask():
    bits, words = make_masks(2, 100)
    logits = torch.randn(4, 100)
    rows_M, which_M = torch.arange(4, dtype=torch.int32), torch.tensor([0, 1, 0, 0]).int()
    wanted, got = logits.masked_fill(~bits[which_M], float("-inf")), logits.clone().to(DEVICE)
    apply_token_masks_reference(logits, rows_M, words, which_M)
    assert torch.equal(logits, wanted)
    on_device = [it.to(DEVICE) for it in (rows_M, words, which_M)]
    triton_token_masks.apply_token_masks(got, *on_device)
    assert torch.equal(got.cpu(), wanted)

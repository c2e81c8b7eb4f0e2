"""How weights are cut over ranks: together the ranks hold everything, each its own part."""

from __future__ import annotations

import math
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CPU, write_config

from sgl.kernels.collectives import TensorParallel
from sgl.kernels.rotary import rotate
from sgl.models.config import ModelConfig, RopeConfig
from sgl.models.layers import weight_format
from sgl.models.layers.embedding import LMHead, VocabParallelEmbedding, vocab_piece
from sgl.models.layers.linear import (
    ColumnParallelLinear,
    MergedColumnLinear,
    QKVLinear,
    RowParallelLinear,
    qkv_pieces,
)
from sgl.models.layers.norm import RMSNorm
from sgl.models.layers.rotary import Rotary, rotary_frequencies
from sgl.models.layers.weight_format import PackedFormat, PlainFormat
from sgl.models.layers.weights import Placement

FORMATS = [PlainFormat(), PackedFormat()]


class SilentRank(TensorParallel):
    """A rank without others: what it would have summed or gathered stays its own part."""

    def all_reduce(self, x):
        return x


def placed(rank: int = 0, size: int = 1, weight_format=FORMATS[0]) -> Placement:
    tp = SilentRank(rank, size) if size > 1 else TensorParallel()
    return Placement(tp, CPU, torch.float32, weight_format)


def config_of(folder: Path, **changes: object) -> ModelConfig:
    return ModelConfig.load(write_config(folder, **changes))


@given(vocab_size=st.integers(1, 2000), size=st.integers(1, 8))
def test_the_ranks_shares_of_the_vocabulary_are_equal_and_cover_it_once(vocab_size, size):
    shares = [vocab_piece(vocab_size, TensorParallel(rank, size)) for rank in range(size)]
    assert len({num_rows for _, num_rows in shares}) == 1
    held = [row for piece, _ in shares for row in range(piece.first, piece.first + piece.num)]
    assert held == list(range(vocab_size))
    assert all(piece.num <= num_rows and num_rows % 64 == 0 for piece, num_rows in shares)


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "kv_heads_of_ranks"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (2, 2, [[0], [1]]),
        (2, 6, [[0], [0], [0], [1], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_few_key_value_heads_are_shared_by_neighbouring_ranks(
    tmp_path, num_kv_heads, size, kv_heads_of_ranks
):
    config = config_of(tmp_path, num_key_value_heads=num_kv_heads)
    for rank, kv_heads in enumerate(kv_heads_of_ranks):
        pieces = qkv_pieces(config, TensorParallel(rank, size))
        for part in ("k", "v"):
            piece = pieces[part]
            assert piece.first == kv_heads[0] * config.head_dim
            assert piece.num == len(kv_heads) * config.head_dim
        assert pieces["q"].first == rank * config.num_heads // size * config.head_dim


def test_each_rank_reads_the_query_heads_of_its_key_heads(tmp_path):
    config = config_of(tmp_path, num_key_value_heads=2)
    group_len = config.num_heads // config.num_kv_heads
    for rank in range(6):
        pieces = qkv_pieces(config, TensorParallel(rank, 6))
        query_head = pieces["q"].first // config.head_dim
        assert pieces["k"].first // config.head_dim == query_head // group_len


@pytest.mark.parametrize("weight_format", FORMATS)
def test_column_parallel_parts_side_by_side_are_the_whole_product(weight_format):
    gate_FD, up_FD, bias_F, x_TD = (torch.randn(s) for s in ((12, 8), (12, 8), (12,), (3, 8)))
    for rank in range(3):
        place = placed(rank, 3, weight_format)
        linear = MergedColumnLinear(8, {"gate": 12, "up": 12}, place, has_bias=True)
        for part, weight in (("gate", gate_FD), ("up", up_FD)):
            linear.get_parameter("weight").load(part, weight)
            linear.bias.load(part, bias_F)
        linear.finish_loading()
        mine = slice(4 * rank, 4 * rank + 4)
        wanted = torch.cat([(x_TD @ w.T + bias_F)[:, mine] for w in (gate_FD, up_FD)], dim=-1)
        torch.testing.assert_close(linear(x_TD), wanted)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_row_parallel_parts_sum_to_the_whole_product_with_the_bias_once(weight_format):
    weight_OI, bias_O, x_TI = torch.randn(5, 12), torch.randn(5), torch.randn(3, 12)
    total = torch.zeros(3, 5)
    for rank in range(3):
        linear = RowParallelLinear(12, 5, placed(rank, 3, weight_format), has_bias=True)
        linear.get_parameter("weight").load(None, weight_OI)
        linear.bias.load(None, bias_O)
        linear.finish_loading()
        total += linear(x_TI[:, 4 * rank : 4 * rank + 4])
    torch.testing.assert_close(total, x_TI @ weight_OI.T + bias_O)


def test_a_single_column_parallel_layer_is_a_linear_layer():
    linear = ColumnParallelLinear(8, 6, placed())
    weight_OI, x_TI = torch.randn(6, 8), torch.randn(2, 8)
    linear.get_parameter("weight").load(None, weight_OI)
    linear.finish_loading()
    torch.testing.assert_close(linear(x_TI), x_TI @ weight_OI.T)


def test_the_fused_layer_gives_queries_then_keys_then_values(tmp_path):
    config = config_of(tmp_path, attention_bias=True)
    linear = QKVLinear(config, placed())
    for value, part in enumerate("qkv"):
        linear.get_parameter("weight").load(
            part, torch.zeros(linear.weights["weight"].full_shape(part))
        )
        linear.bias.load(part, torch.full(linear.bias.full_shape(part), float(value)))
    out = linear(torch.randn(1, 48)).view(-1, config.head_dim)
    assert out[:, 0].tolist() == [0.0] * 6 + [1.0] * 2 + [2.0] * 2


def test_the_ranks_embeddings_sum_to_the_whole_embedding():
    table_VD, token_ids_T = torch.randn(100, 4), torch.tensor([0, 63, 64, 99])
    total = torch.zeros(4, 4)
    for rank in range(3):
        embedding = VocabParallelEmbedding(100, 4, placed(rank, 3))
        embedding.weight.load(None, table_VD)
        total += embedding(token_ids_T)
    assert torch.equal(total, table_VD[token_ids_T])


def test_logits_are_float32_and_minus_infinity_beyond_the_vocabulary():
    head = LMHead(100, 4, Placement(TensorParallel(), CPU, torch.bfloat16, PlainFormat()))
    head.get_parameter("weight").load(None, torch.ones(100, 4))
    logits_BV = head(torch.ones(2, 4, dtype=torch.bfloat16))
    assert logits_BV.dtype == torch.float32
    assert logits_BV.tolist() == [[4.0] * 100 + [-inf] * 28] * 2


def test_a_norm_keeps_its_weight_in_float32():
    norm = RMSNorm(4, 1e-6, Placement(TensorParallel(), CPU, torch.bfloat16, PlainFormat()))
    norm.weight.load(None, torch.full((4,), 3.0, dtype=torch.bfloat16))
    assert norm(torch.ones(1, 4, dtype=torch.bfloat16)).tolist() == [[3.0] * 4]


def test_rotary_keeps_the_length_of_a_head_and_leaves_position_zero():
    x_TNE = torch.randn(3, 2, 16)
    before = x_TNE.clone()
    angles = Rotary(16, RopeConfig(theta=100.0), CPU)(torch.tensor([0, 1, 1000]))
    rotate(x_TNE, *angles)
    assert torch.equal(x_TNE[0], before[0])
    torch.testing.assert_close(x_TNE.norm(dim=-1), before.norm(dim=-1))


def test_llama3_scaling_keeps_fast_angles_and_divides_slow_ones():
    plain = rotary_frequencies(64, RopeConfig(theta=5e5))
    scaled = rotary_frequencies(
        64, RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_context_len=8192)
    )
    num_turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[num_turns > 4], plain[num_turns > 4])
    torch.testing.assert_close(scaled[num_turns < 1], plain[num_turns < 1] / 8)
    between = (num_turns > 1) & (num_turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_a_list_of_divisors_scales_each_angle():
    rope = RopeConfig(theta=100.0, scaling="divided", divisors=(1.0, 2.0))
    plain = rotary_frequencies(4, RopeConfig(theta=100.0))
    assert torch.equal(rotary_frequencies(4, rope), plain / torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_adds_to_the_stream_itself_only_where_it_is_the_whole_sum(
    size, has_bias, monkeypatch
):
    monkeypatch.setattr(weight_format, "can_add_linear", lambda *_: True)
    layer = RowParallelLinear(8, 6, placed(0, size), has_bias)
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.finish_loading()
    stream_TO, x_TI = torch.randn(3, 6), torch.randn(3, 8 // size)
    before_TO = stream_TO.clone()
    left_TO = layer.add_to(stream_TO, x_TI)
    if size == 1 and not has_bias:
        assert left_TO is None
        torch.testing.assert_close(stream_TO, before_TO + layer(x_TI))
    else:
        assert torch.equal(stream_TO, before_TO)
        assert torch.equal(left_TO, layer(x_TI))


def test_what_is_in_the_stream_already_is_not_added_again():
    norm = RMSNorm(8, 1e-5, placed())
    norm.weight.data.normal_()
    stream_TD = torch.randn(3, 8)
    before_TD = stream_TD.clone()
    assert torch.equal(norm.add(stream_TD, None), norm(before_TD))
    assert torch.equal(stream_TD, before_TD)

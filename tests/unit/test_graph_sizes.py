"""Batch sizes that decode steps are recorded for."""

from __future__ import annotations

import pytest

from sgl.execution.step_graphs import LARGE_BATCH, MAX_WASTE, graph_sizes


@pytest.mark.parametrize("max_size", [1, 2, 7, 255, 256, 257, 300, 1000, 1024, 2048])
def test_filling_up_wastes_little(max_size):
    sizes = graph_sizes(max_size)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_size
    for batch in range(1, max_size + 1):
        size = next(size for size in sizes if size >= batch)
        assert (size - batch) / size <= MAX_WASTE


def test_large_batches_are_whole_tiles():
    large = [size for size in graph_sizes(1024) if size >= LARGE_BATCH]
    assert set(range(256, 1025, 128)) <= set(large)
    assert all(size % 32 == 0 for size in large)

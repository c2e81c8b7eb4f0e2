"""Which kernel multiplies: measured once for each shape, kept in a file, given up for no gain."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from sgl.kernels.cublaslt import ProductShape
from sgl.kernels.tuned_linear import Choices, Kernels, OwnChoice

SHAPE = ProductShape(448, 96, 64, torch.bfloat16, torch.bfloat16, is_added=False)
NAME = "448x96x64 bfloat16 bfloat16"
WEIGHT = torch.zeros(96, 64, dtype=torch.bfloat16)


@dataclass(frozen=True)
class FakeProduct:
    number: int


class FakeLibrary:
    def usual(self, shape):
        return FakeProduct(0)

    def products(self, shape):
        return [FakeProduct(number) for number in (1, 2, 3)]


class Stopwatch:
    """Says the times it was given: the usual product first, then of each other."""

    def __init__(self, *times):
        self.times = list(times)
        self.shapes = []

    def __call__(self, shape, weight, products):
        assert products == [FakeProduct(number) for number in range(4)]
        self.shapes.append(shape)
        return self.times


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sgl" / "choices.json"


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ((10.0, 12.0, 5.0, 6.0), 2),
        ((10.0, 10.0, 11.0, 9.9), None),  # less than noise
        ((10.0, 11.0, 12.0, 13.0), None),
        ((10.0, 9.0, 9.5, 9.7), 1),
    ],
)
def test_the_fastest_is_chosen_if_it_gains_more_than_noise(path, times, chosen):
    choices = Choices(FakeLibrary(), path, Stopwatch(*times))
    assert choices[SHAPE] is None
    choices.add(SHAPE, WEIGHT)
    assert choices[SHAPE] == (FakeProduct(chosen) if chosen else None)
    choices.save()
    assert json.loads(path.read_text()) == {NAME: chosen or 0}


def test_a_shape_is_measured_once(path):
    stopwatch = Stopwatch(10.0, 9.0, 5.0, 9.0)
    choices = Choices(FakeLibrary(), path, stopwatch)
    choices.add(SHAPE, WEIGHT)
    choices.add(SHAPE, WEIGHT)
    choices.add(replace(SHAPE, is_added=True), WEIGHT)
    assert stopwatch.shapes == [SHAPE, replace(SHAPE, is_added=True)]
    assert choices.summary() == (2, 2, 2)


def test_what_was_measured_before_is_not_measured_again(path):
    first = Choices(FakeLibrary(), path, Stopwatch(10.0, 9.0, 5.0, 9.0))
    first.add(SHAPE, WEIGHT)
    first.save()
    stopwatch = Stopwatch(10.0, 1.0, 5.0, 9.0)
    second = Choices(FakeLibrary(), path, stopwatch)
    second.add(SHAPE, WEIGHT)
    assert second[SHAPE] == FakeProduct(2)
    assert stopwatch.shapes == []


def test_two_that_write_do_not_lose_each_others_choices(path):
    watches = Stopwatch(10.0, 9.0, 5.0, 9.0), Stopwatch(10.0, 9.0, 9.0, 5.0)
    both = [Choices(FakeLibrary(), path, watch) for watch in watches]
    for rows, choices in zip((8, 16), both, strict=True):
        choices.add(replace(SHAPE, rows=rows), WEIGHT)
        choices.save()
    kept = json.loads(path.read_text())
    assert kept == {NAME.replace("448", "8"): 2, NAME.replace("448", "16"): 3}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"%s": "2"}', '{"%s": 9}', '{"%s": -1}'])
def test_a_file_that_says_nothing_of_use_is_measured_over(path, content):
    path.parent.mkdir()
    path.write_text(content.replace("%s", NAME))
    stopwatch = Stopwatch(10.0, 9.0, 5.0, 9.0)
    choices = Choices(FakeLibrary(), path, stopwatch)
    choices.add(SHAPE, WEIGHT)
    assert choices[SHAPE] == FakeProduct(2)
    assert stopwatch.shapes == [SHAPE]


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(tmp_path, caplog):
    (tmp_path / "sgl").write_text("a file where the folder should be")
    choices = Choices(FakeLibrary(), tmp_path / "sgl" / "x.json", Stopwatch(10.0, 9.0, 5.0, 9.0))
    choices.add(SHAPE, WEIGHT)
    with caplog.at_level("INFO"):
        choices.save()
    assert choices[SHAPE] == FakeProduct(2)
    assert "was not kept" in caplog.text


@pytest.mark.parametrize("is_added", [False, True])
def test_cublas_own_choice_computes_the_product(is_added):
    shape = replace(SHAPE, rows=3, is_added=is_added)
    x = torch.randn(3, 64)
    weight = torch.randn(96, 64)
    out = torch.ones(3, 96)
    OwnChoice(shape).run(x, weight, out)
    torch.testing.assert_close(out, x @ weight.t() + is_added)


def test_one_row_has_tiles_to_choose_from_and_more_have_cublaslt():
    kernels = Kernels(FakeLibrary())
    one_row = replace(SHAPE, rows=1)
    tiles = kernels.products(one_row)
    assert kernels.usual(one_row) in tiles
    assert len(set(tiles)) == len(tiles) > 3
    assert kernels.products(SHAPE) == FakeLibrary().products(SHAPE)
    assert isinstance(kernels.usual(SHAPE), OwnChoice)

"""Weights of a model that runs: replaced in place, or left as they were; and shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    CPU,
    checkpoint_tensors,
    loaded,
    sequence_logits,
    write_checkpoint,
    write_config,
)
from unit.test_loader import write_gguf

from sgl.execution import model_weights
from sgl.execution.model_weights import ModelWeights, Source
from sgl.kernels.collectives import TensorParallel
from sgl.messages import GetWeight, UpdateWeights
from sgl.models.config import ModelConfig
from sgl.models.layers.linear import Linear
from sgl.models.layers.weights import Weight
from sgl.models.weight_table import weight_table

TOKEN_IDS = [5, 99, 0, 5, 42, 17]
DTYPES = ["float32", "float16"]  # packed on the CPU, and not


def logits(model) -> torch.Tensor:
    return sequence_logits(model, TOKEN_IDS)


class Bench:
    """A model that is loaded from FOLDER/old, and another checkpoint of it in FOLDER/new."""

    def __init__(self, folder: Path, dtype="float32", **changes):
        self.old, self.new = folder / "old", folder / "new"
        self.tensors = write_checkpoint(self.old, **changes)
        self.config = ModelConfig.load(write_config(self.new, **changes))
        self.new_tensors = checkpoint_tensors(self.config, seed=1)
        save_file(self.new_tensors, self.new / "model.safetensors")
        self.model = loaded(self.old, dtype=dtype)
        self.num_beats = 0
        self.weights = ModelWeights(
            self.model,
            ModelConfig.load(self.old),
            TensorParallel(),
            Source(str(self.old), "auto"),
            overrides={},
            like=torch.empty(0, dtype=getattr(torch, dtype), device=CPU),
            beat=self.beat,
        )

    def beat(self):
        self.num_beats += 1

    def update(self, path=None, load_format="auto"):
        return self.weights.obey(UpdateWeights(7, str(path or self.new), load_format))

    def refused(self, path=None, load_format="auto"):
        """Why an update is refused, which must leave the model as it was."""
        before = logits(self.model)
        reply = self.update(path, load_format)
        assert (reply.call_id, reply.ok) == (7, False)
        assert torch.equal(logits(self.model), before)
        return reply.text

    def show(self, name, max_rows=1000):
        reply = self.weights.obey(GetWeight(8, name, max_rows))
        assert reply.call_id == 8
        return json.loads(reply.text) if reply.ok else reply.text


def places(model) -> dict[str, int]:
    """Where everything that runs lies in memory."""
    found = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            plain = {key: it for key, it in module.weights.items() if key != "packed"}
            found |= {f"{name}/{key}": it.data_ptr() for key, it in plain.items()}
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_an_updated_model_is_the_new_one(tmp_path, dtype, changes):
    bench = Bench(tmp_path, dtype, **changes)
    old = logits(bench.model)
    reply = bench.update()
    assert (reply.ok, str(bench.new) in reply.text) == (True, True)
    wanted = logits(loaded(bench.new, dtype=dtype))
    assert torch.equal(logits(bench.model), wanted)
    assert not torch.equal(wanted, old)
    assert bench.num_beats == len(bench.new_tensors)
    assert bench.update(bench.old).ok
    assert torch.equal(logits(bench.model), old)


def test_weights_that_are_not_packed_keep_their_place_in_memory(tmp_path):
    bench = Bench(tmp_path, "float16")
    before = places(bench.model)
    assert bench.update().ok
    assert places(bench.model) == before


def test_what_was_packed_is_held_once_before_and_after(tmp_path):
    bench = Bench(tmp_path)
    for _ in range(2):
        linears = [module for module in bench.model.modules() if isinstance(module, Linear)]
        assert all("packed" in linear.weights for linear in linears)
        sizes = [linear.loaded["weight"].untyped_storage().nbytes() for linear in linears]
        assert set(sizes) == {0}
        assert bench.update().ok


def test_a_checkpoint_may_come_in_another_type_or_format(tmp_path):
    bench = Bench(tmp_path, eos_token_id=2)  # as the GGUF file has it
    halves = {name: tensor.half() for name, tensor in bench.new_tensors.items()}
    save_file(halves, bench.new / "model.safetensors")
    write_config(bench.new, torch_dtype="float16", eos_token_id=2)
    assert bench.update().ok
    assert torch.equal(logits(bench.model), logits(loaded(bench.new)))
    path = write_gguf(tmp_path / "m.gguf", bench.config, bench.tensors)
    assert bench.update(path).ok
    assert torch.equal(logits(bench.model), logits(loaded(path)))
    assert bench.update(load_format="dummy").ok
    assert torch.equal(logits(bench.model), logits(loaded(bench.new, load_format="dummy")))


def test_another_model_is_refused_with_the_entry_that_differs(tmp_path):
    bench = Bench(tmp_path)
    write_config(bench.new, num_hidden_layers=3)
    assert "its num_layers is 3, not 2; start a server" in bench.refused()
    write_config(bench.new, eos_token_id=2)
    assert "its eos_ids is (2,), not ()" in bench.refused()
    write_config(bench.new, architectures=["Qwen2ForCausalLM"])
    assert "its architecture is Qwen2ForCausalLM" in bench.refused()
    write_config(bench.new, quantization_config={"quant_method": "awq"})
    assert "quantised with 'awq'" in bench.refused()
    (bench.new / "config.json").write_text("{")
    assert "config.json cannot be read" in bench.refused()


def test_weights_that_do_not_fit_are_refused_before_any_is_replaced(tmp_path):
    bench = Bench(tmp_path)
    file, tensors = bench.new / "model.safetensors", bench.new_tensors
    last = "model.norm.weight"
    save_file({name: it for name, it in tensors.items() if name != last}, file)
    assert f"it lacks {last}" in bench.refused()
    save_file(tensors | {"x.weight": torch.zeros(1)}, file)
    assert "the model has no x.weight" in bench.refused()
    save_file(tensors | {last: torch.zeros(1)}, file)
    assert "has the shape (1,)" in bench.refused()
    save_file(tensors | {last: torch.zeros(48, dtype=torch.int8)}, file)
    assert f"{last} is of type I8" in bench.refused()
    save_file(tensors, file)
    os.truncate(file, file.stat().st_size - 10)
    assert "no whole safetensors file" in bench.refused()
    file.rename(file.with_suffix(".bin"))
    assert "convert it to safetensors" in bench.refused()
    assert bench.num_beats == 0


def test_a_gguf_file_that_ends_early_is_refused_before_any_weight_is_replaced(tmp_path):
    bench = Bench(tmp_path, eos_token_id=2)
    path = write_gguf(tmp_path / "m.gguf", bench.config, bench.new_tensors)
    os.truncate(path, path.stat().st_size - 64)
    assert "its data ends after the file" in bench.refused(path)
    assert bench.num_beats == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_failure_in_the_middle_brings_the_old_weights_back(tmp_path, dtype, monkeypatch):
    bench = Bench(tmp_path, dtype)
    before, num_loaded, load = places(bench.model), [], Weight.load

    def failing(weight, part, tensor):
        num_loaded.append(1)
        if len(num_loaded) == 9:
            raise RuntimeError("the disk is gone")
        load(weight, part, tensor)

    monkeypatch.setattr(Weight, "load", failing)
    text = bench.refused()
    assert text == "the disk is gone; the weights from before are loaded again"
    if dtype == "float16":
        assert places(bench.model) == before
    assert bench.update().ok
    assert torch.equal(logits(bench.model), logits(loaded(bench.new, dtype=dtype)))


def test_without_the_old_weights_a_failure_in_the_middle_is_the_end(tmp_path, monkeypatch):
    bench = Bench(tmp_path)

    def failing(weight, part, tensor):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(Weight, "load", failing)
    with pytest.raises(AssertionError, match="weights from before cannot be loaded again"):
        bench.update()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    check = model_weights.check_fit

    def checked_too_early(table, config, checkpoint):
        check(table, config, checkpoint)
        changed = bench.new_tensors | {"model.norm.weight": torch.zeros(5)}
        save_file(changed, bench.new / "model.safetensors")

    monkeypatch.setattr(model_weights, "check_fit", checked_too_early)
    assert "has changed while it was read: model.norm.weight" in bench.refused()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_shown_as_its_checkpoint_has_it(tmp_path, dtype):
    bench = Bench(tmp_path, dtype, attention_bias=True)
    for _ in range(2):
        assert list(weight_table(bench.model)).sort() == list(bench.tensors).sort()
        for name, tensor in bench.tensors.items():
            is_norm = "norm" in name
            kept = tensor if is_norm else tensor.to(getattr(torch, dtype)).float()
            assert torch.equal(torch.tensor(bench.show(name)), kept), name
        assert bench.update().ok
        bench.tensors = bench.new_tensors


def test_only_the_first_rows_are_shown(tmp_path):
    bench = Bench(tmp_path)
    rows = bench.show("model.layers.1.self_attn.k_proj.weight", 3)
    assert torch.equal(
        torch.tensor(rows), bench.tensors["model.layers.1.self_attn.k_proj.weight"][:3]
    )
    assert len(bench.show("norm.weight", 5)) == 5  # the prefix may be left out


def test_a_tied_head_is_the_embedding(tmp_path):
    bench = Bench(tmp_path, tie_word_embeddings=True)
    assert bench.show("lm_head.weight") == bench.show("model.embed_tokens.weight")


def test_an_unknown_name_is_answered_with_names_near_it(tmp_path):
    text = Bench(tmp_path).show("model.layers.1.self_attn.qkv_proj.weight")
    assert "no weight 'model.layers.1.self_attn.qkv_proj.weight'" in text
    assert "model.layers.1.self_attn.q_proj.weight" in text


def test_a_reply_that_would_be_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(model_weights, "MAX_NUMBERS", 100)
    bench = Bench(tmp_path)
    assert "hold 144 numbers" in bench.show("model.embed_tokens.weight", 3)
    assert len(bench.show("model.embed_tokens.weight", 2)) == 2

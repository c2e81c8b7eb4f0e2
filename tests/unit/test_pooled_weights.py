"""Weights of a running model that gives vectors: replaced and shown, its head included."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CPU, DenseBatch, checkpoint_tensors, loaded, write_config

from sgl.execution.model_weights import ModelWeights, Source
from sgl.kernels.collectives import TensorParallel
from sgl.messages import GetWeight, UpdateWeights
from sgl.models.config import ModelConfig

SIZE = 48
HEADS = {
    "LlamaModel": {},
    "LlamaForSequenceClassification": {"score.weight": (2, SIZE)},
    "Qwen2ForRewardModel": {
        "score.0.weight": (SIZE, SIZE),
        "score.0.bias": (SIZE,),
        "score.2.weight": (1, SIZE),
        "score.2.bias": (1,),
    },
}


def write_pooled(folder, architecture, seed=0):
    """Its tensors."""
    config = ModelConfig.load(write_config(folder, architectures=[architecture]))
    tensors = checkpoint_tensors(config, seed)
    del tensors["lm_head.weight"]
    chance = torch.Generator().manual_seed(seed)
    for name, shape in HEADS[architecture].items():
        tensors[name] = torch.randn(shape, generator=chance)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@torch.inference_mode()
def vectors(model):
    return model.vectors(model.hidden(DenseBatch.of(model, [5, 99, 0, 42])))


def weights_of(model, folder, **options):
    return ModelWeights(
        model,
        ModelConfig.load(folder, **options),
        TensorParallel(),
        Source(str(folder), "auto"),
        overrides={},
        like=torch.empty(0, device=CPU),
        beat=lambda: None,
    )


@pytest.mark.parametrize("architecture", HEADS)
def test_layers_and_head_are_replaced_and_shown(tmp_path, architecture):
    old, new = tmp_path / "old", tmp_path / "new"
    write_pooled(old, architecture)
    tensors = write_pooled(new, architecture, seed=1)
    model = loaded(old)
    before = vectors(model)
    weights = weights_of(model, old)
    assert weights.obey(UpdateWeights(1, str(new), "auto")).ok
    assert torch.equal(vectors(model), vectors(loaded(new)))
    assert not torch.equal(vectors(model), before)
    for name in ("model.layers.1.self_attn.k_proj.weight", "norm.weight", *HEADS[architecture]):
        shown = json.loads(weights.obey(GetWeight(2, name, 100)).text)
        wanted = tensors.get(name, tensors["model.norm.weight"])
        assert torch.equal(torch.tensor(shown), wanted), name


def test_a_model_of_tokens_that_serves_vectors_stays_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, folder in enumerate((old, new)):
        config = ModelConfig.load(write_config(folder, tie_word_embeddings=True))
        save_file(checkpoint_tensors(config, seed), folder / "model.safetensors")
    model = loaded(old, is_embedding=True)
    weights = weights_of(model, old, is_embedding=True)
    assert weights.obey(UpdateWeights(1, str(new), "auto")).ok
    assert torch.equal(vectors(model), vectors(loaded(new, is_embedding=True)))
    reply = weights.obey(GetWeight(2, "lm_head.weight", 1))
    assert (reply.ok, "no weight 'lm_head.weight'" in reply.text) == (False, True)


@pytest.mark.parametrize(
    ("running", "wanted"),
    [
        ("LlamaModel", "LlamaForSequenceClassification"),
        ("LlamaForSequenceClassification", "LlamaModel"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, running, wanted):
    old, new = tmp_path / "old", tmp_path / "new"
    write_pooled(old, running)
    write_pooled(new, wanted)
    model = loaded(old)
    before = vectors(model)
    reply = weights_of(model, old).obey(UpdateWeights(1, str(new), "auto"))
    assert not reply.ok
    assert "is another model than the one that runs: its head is" in reply.text
    assert torch.equal(vectors(model), before)


def test_a_model_of_tokens_does_not_become_one_of_vectors(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    tensors = checkpoint_tensors(ModelConfig.load(write_config(old)))
    save_file(tensors, old / "model.safetensors")
    write_pooled(new, "LlamaForSequenceClassification")
    reply = weights_of(loaded(old), old).obey(UpdateWeights(1, str(new), "auto"))
    assert not reply.ok
    assert "its head is scores, not tokens" in reply.text

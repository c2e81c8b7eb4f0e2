"""Vectors of small models are those of transformers, however their prompts are computed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import write_config
from unit.test_model_parity import SIZES, random_reference
from vector_bench import CPU, DONE, VectorBench

from sgl.errors import ConfigError
from sgl.execution.attention.triton_attention import TritonAttention
from sgl.kernels.collectives import TensorParallel
from sgl.messages import Embed, pack
from sgl.models.config import ModelConfig
from sgl.models.loader import load_model

TOLERANCE = 1e-4
CHANCE = np.random.default_rng(3)
START = CHANCE.integers(0, SIZES["vocab_size"], 40).tolist()
PROMPTS = [
    START[:1],
    START[:17],
    CHANCE.integers(0, SIZES["vocab_size"], 70).tolist(),
    START,
    [*START[:30], 5, 4, 3],
    START[:17],
]
MODES = {
    "whole": {},
    "chunks of 16, pages of 4": {"max_step_tokens": 16, "page_size": 4},
    "no cache": {"max_step_tokens": 32, "is_cached": False},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Several would wait for each other at every operator of so small a model."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def save_body(body, folder, architecture, extra=None, **changes):
    """A checkpoint as the model's authors would have it, with `extra` tensors."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in body.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    config = body.config.to_dict() | {"architectures": [architecture]} | changes
    (folder / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def outputs(body) -> torch.Tensor:
    """Of each prompt's last token."""
    return torch.stack([body(torch.tensor([ids])).last_hidden_state[0, -1] for ids in PROMPTS])


def embedding(config_class, changes, folder, architecture):
    torch.manual_seed(0)
    body = random_reference(config_class, changes).model
    save_body(body, folder, architecture)
    return torch.nn.functional.normalize(outputs(body), dim=-1)


def classifier(config_class, folder, num_labels):
    torch.manual_seed(0)
    config = config_class(**SIZES, num_labels=num_labels)
    config._attn_implementation = "eager"
    config.pad_token_id = None  # prompts hold every id
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([ids])).logits for ids in PROMPTS])


def reward(folder):
    """The head of Qwen2ForRewardModel, which transformers does not have."""
    torch.manual_seed(0)
    body = random_reference(transformers.Qwen2Config, {}).model
    size = SIZES["hidden_size"]
    head = torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 1)
    )
    extra = {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    save_body(body, folder, "Qwen2ForRewardModel", extra)
    with torch.inference_mode():
        return head(outputs(body))


CASES = {
    "llama": lambda folder: embedding(
        transformers.LlamaConfig, {}, folder, "LlamaForCausalLM"
    ),
    "mistral, windowed": lambda folder: embedding(
        transformers.MistralConfig, {"sliding_window": 8}, folder, "MistralModel"
    ),
    "qwen2": lambda folder: embedding(
        transformers.Qwen2Config, {"tie_word_embeddings": True}, folder, "Qwen2ForCausalLM"
    ),
    "llama, scores": lambda folder: classifier(transformers.LlamaConfig, folder, 1),
    "mistral, scores": lambda folder: classifier(transformers.MistralConfig, folder, 5),
    "qwen2, scores": lambda folder: classifier(transformers.Qwen2Config, folder, 2),
    "qwen2, reward": reward,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_transformers(tmp_path, case, mode):
    wanted = CASES[case](tmp_path / "model").numpy()
    assert wanted.std(axis=0).min() > 1e-3, "the prompts should differ"
    bench = VectorBench(tmp_path / "model", is_embedding=True, **MODES[mode])
    assert bench.config.vector_size == wanted.shape[1]
    together = bench.vectors(PROMPTS)
    assert np.abs(together - wanted).max() <= TOLERANCE
    again = bench.vectors(PROMPTS)
    assert np.abs(again - wanted).max() <= TOLERANCE
    alone = np.concatenate([bench.vectors([prompt]) for prompt in PROMPTS])
    assert np.abs(alone - wanted).max() <= TOLERANCE
    if bench.batcher.store.is_cached:
        num_last = bench.num_cached[bench.num_asked - 4]  # of the 70 tokens, asked alone
        assert num_last == (68 if bench.batcher.store.page_size == 4 else 69)
    assert bench.batcher.totals.num_output_tokens == 0
    assert bench.batcher.store.num_available == bench.batcher.store.num_pages


def test_vectors_with_the_triton_kernels_are_the_same(tmp_path):
    """A few tokens: without a GPU the kernels are interpreted."""
    wanted = CASES["qwen2"](tmp_path / "model")
    bench = VectorBench(
        tmp_path / "model", is_embedding=True, max_step_tokens=10, make_attention=TritonAttention
    )
    assert np.abs(bench.vectors(PROMPTS[:2]) - wanted[:2].numpy()).max() <= TOLERANCE


def test_an_lm_head_in_the_checkpoint_is_not_loaded(tmp_path):
    torch.manual_seed(0)
    model = random_reference(transformers.LlamaConfig, {})
    model.save_pretrained(tmp_path)
    bench = VectorBench(tmp_path, is_embedding=True)
    assert not any("lm_head" in name for name, _ in bench.model.named_parameters())
    wanted = torch.nn.functional.normalize(outputs(model.model), dim=-1).numpy()
    assert np.abs(bench.vectors(PROMPTS) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "size", "dtype"),
    [
        ("LlamaForSequenceClassification", 2, "bfloat16"),
        ("Qwen2ForRewardModel", 1, "bfloat16"),
        ("Qwen2ForRewardModel", 1, "float32"),
        ("MistralModel", 48, "bfloat16"),
    ],
)
def test_dummy_weights_fill_every_head(tmp_path, architecture, size, dtype):
    folder = write_config(tmp_path, architectures=[architecture])
    model, _ = load_model(folder, load_format="dummy", dtype=dtype, device=CPU, tp=TensorParallel())
    hidden_BD = torch.randn(3, 48).to(getattr(torch, dtype))
    vectors_BN = model.vectors(hidden_BD)
    assert (vectors_BN.shape, vectors_BN.dtype) == ((3, size), torch.float32)
    assert vectors_BN.isfinite().all()
    torch.testing.assert_close(model.vectors(hidden_BD[1:2]), vectors_BN[1:2])


@torch.inference_mode()
def test_scores_in_bfloat16_are_not_rounded(tmp_path):
    classifier(transformers.LlamaConfig, tmp_path, 1)
    model, _ = load_model(tmp_path, dtype="bfloat16", device=CPU, tp=TensorParallel())
    weight_D = load_file(tmp_path / "model.safetensors")["score.weight"][0]
    hidden_BD = torch.randn(5, 48).bfloat16()
    wanted_B = hidden_BD.double() @ weight_D.double()
    assert (model.vectors(hidden_BD)[:, 0] - wanted_B).abs().max() < 1e-5


def one_step(bench, prompts):
    """Its result, and what each prompt gained by it."""
    for number, prompt in enumerate(prompts):
        bench.batcher.add(Embed(number, pack(prompt)))
    result = bench.runner.run(bench.batcher.plan()).wait()
    deltas = {delta.request_id: delta for delta in bench.batcher.commit(result)}
    return result, deltas


def test_a_vector_that_is_no_number_fails_alone(tmp_path, monkeypatch):
    CASES["llama"](tmp_path / "model")
    bench = VectorBench(tmp_path / "model", is_embedding=True)
    make = bench.model.head.forward

    def spoil(hidden_BD):
        vectors_BN = make(hidden_BD)
        vectors_BN[1, 3] = torch.inf
        return vectors_BN

    monkeypatch.setattr(bench.model.head, "forward", spoil)
    result, deltas = one_step(bench, PROMPTS[2:4])
    assert [len(vector) for vector in result.vectors] == [4 * SIZES["hidden_size"], 0]
    assert deltas[0].finish == DONE
    assert (deltas[1].finish.status, deltas[1].vector) == (500, b"")
    assert deltas[1].finish.message == "the model's output is not a number"


def test_prompts_that_do_not_fit_into_memory_fail_alone(tmp_path, monkeypatch):
    wanted = CASES["llama"](tmp_path / "model").numpy()
    bench = VectorBench(tmp_path / "model", is_embedding=True)
    hidden = bench.model.body.hidden

    def run_out(batch):
        if len(batch.token_ids_T) > 60:
            raise torch.OutOfMemoryError("60 tokens fit")
        return hidden(batch)

    monkeypatch.setattr(bench.model.body, "hidden", run_out)
    _, deltas = one_step(bench, PROMPTS[1:4])
    assert deltas[1].finish.status == 500
    assert "60 tokens fit" in deltas[1].finish.message
    for number in (0, 2):
        vector = np.frombuffer(deltas[number].vector, np.float32)
        assert np.abs(vector - wanted[number + 1]).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": False}, "is_causal is false"),
        ({"use_bidirectional_attention": True}, "not served: use an embedding model with causal"),
        ({"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, "code of its own"),
        ({"architectures": ["LlamaForSequenceClassification"], "is_causal": False}, "is_causal"),
        ({"gguf_pooling_type": 1}, "by pooling 'mean'"),
        ({"gguf_pooling_type": 9}, "by pooling '9'"),
    ],
)
def test_models_that_make_vectors_in_another_way_are_refused(tmp_path, changes, reason):
    write_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.load(tmp_path, is_embedding=True)
    as_ours = {"is_causal": True, "use_bidirectional_attention": False, "gguf_pooling_type": 3}
    assert ModelConfig.load(tmp_path, as_ours, is_embedding=True).is_pooled


STEPS = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.mark.parametrize(
    ("pooling", "reason"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "'mean_tokens'"),
        ({"pooling_mode_cls_token": True}, "'cls_token'"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, " and "),
        ({"pooling_mode": "mean"}, "'mean'"),
        ({"pooling_mode": 5}, "should be a string"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, None),
        ({"pooling_mode": "lasttoken"}, None),
    ],
)
def test_the_steps_of_sentence_transformers_are_looked_at(tmp_path, pooling, reason):
    write_config(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(STEPS))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert ModelConfig.load(tmp_path).head == "tokens", "who generates does not care"
    if reason is None:
        assert ModelConfig.load(tmp_path, is_embedding=True).head == "embedding"
    else:
        with pytest.raises(ConfigError, match=reason):
            ModelConfig.load(tmp_path, is_embedding=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([STEPS[0] | {"type": "sentence_transformers.models.Dense"}]), "kind 'Dense'"),
        ("{}}", "no list of modules"),
        ('[{"type": "x"}]', "no list of modules"),
        ("[5]", "no list of modules"),
    ],
)
def test_steps_that_are_not_ours_are_refused(tmp_path, text, reason):
    write_config(tmp_path)
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.load(tmp_path, is_embedding=True)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [48]),
        ({"is_matryoshka": True}, list(range(1, 49))),
        ({"matryoshka_dimensions": [32, 16, 48, 999]}, [16, 32, 48]),
        ({"architectures": ["LlamaForSequenceClassification"]}, [2]),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}, [3]),
        ({"architectures": ["MistralForSequenceClassification"], "id2label": {"0": "x"}}, [1]),
        ({"architectures": ["Qwen2ForRewardModel"]}, [1]),
    ],
)
def test_how_long_a_vector_can_be(tmp_path, changes, sizes):
    config = ModelConfig.load(write_config(tmp_path, **changes), is_embedding=True)
    assert list(config.vector_sizes) == sizes
    assert config.is_pooled

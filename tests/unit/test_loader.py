"""Weights from safetensors, GGUF and nowhere: what is loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
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
from torch import Tensor

from sgl.errors import ConfigError
from sgl.kernels.collectives import TensorParallel
from sgl.models.config import ModelConfig
from sgl.models.gguf_checkpoint import config_fields
from sgl.models.gguf_file import GgufFile
from sgl.models.layers.linear import Linear
from sgl.models.loader import load_model, resolve_dtype

TOKEN_IDS = [5, 99, 0, 5, 42, 17]


def save_without(folder: Path, tensors: dict[str, Tensor], *names: str) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    save_file(kept, folder / "model.safetensors")


def save_in_two(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Spread a checkpoint over two files; returns its index."""
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file_name, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file_name)
    (folder / "model.safetensors").unlink()
    return {name: file_name for file_name, held in halves.items() for name in held}


def write_index(folder: Path, weight_map: object) -> None:
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def test_a_model_in_several_files_is_the_same_model(tmp_path):
    tensors = write_checkpoint(tmp_path)
    wanted = sequence_logits(loaded(tmp_path), TOKEN_IDS)
    weight_map = save_in_two(tmp_path, tensors)
    assert torch.equal(sequence_logits(loaded(tmp_path), TOKEN_IDS), wanted)
    write_index(tmp_path, weight_map)
    save_file(tensors, tmp_path / "consolidated.safetensors")  # not in the index: not read
    assert torch.equal(sequence_logits(loaded(tmp_path), TOKEN_IDS), wanted)


def test_the_same_weight_in_two_files_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "more.safetensors")
    with pytest.raises(ConfigError, match=r"has model\.norm\.weight twice"):
        loaded(tmp_path)


def test_an_index_may_name_only_files_beside_it(tmp_path):
    write_config(tmp_path)
    write_index(tmp_path, {"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(ConfigError, match="is no name of a file beside it"):
        loaded(tmp_path)
    write_index(tmp_path, {"model.norm.weight": "absent.safetensors"})
    with pytest.raises(ConfigError, match=r"not there: absent\.safetensors"):
        loaded(tmp_path)
    write_index(tmp_path, ["model.norm.weight"])
    with pytest.raises(ConfigError, match="is no index of weights"):
        loaded(tmp_path)


def test_missing_weights_are_named_as_the_checkpoint_would(tmp_path):
    tensors = write_checkpoint(tmp_path)
    absent = ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight")
    save_without(tmp_path, tensors, *absent)
    with pytest.raises(ConfigError, match="it lacks " + ", ".join(absent)):
        loaded(tmp_path)


def test_unexpected_weights_are_named_and_counted(tmp_path):
    tensors = write_checkpoint(tmp_path)
    strange = {f"model.layers.{n}.strange.weight": torch.zeros(2) for n in range(9)}
    save_file(tensors | strange, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no model\.layers\.0\.strange\.weight.* and 3 more"):
        loaded(tmp_path)


def test_a_weight_of_another_shape_is_refused_with_both_shapes(tmp_path):
    tensors = write_checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros(95, 48)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the shape \(95, 48\) where .* asks for \(96, 48\)"):
        loaded(tmp_path)


def test_copies_and_tables_that_hold_no_weight_are_ignored(tmp_path):
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True)
    wanted = sequence_logits(loaded(tmp_path), TOKEN_IDS)
    tensors["lm_head.weight"] = torch.zeros(101, 48)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(sequence_logits(loaded(tmp_path), TOKEN_IDS), wanted)


def test_a_checkpoint_that_would_be_unpickled_is_refused_with_a_hint(tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*convert it to safetensors"):
        loaded(tmp_path)


def test_a_folder_without_weights_says_what_it_could_hold(tmp_path):
    write_config(tmp_path)
    with pytest.raises(ConfigError, match=r"no \*\.safetensors or \*\.gguf file"):
        loaded(tmp_path)
    with pytest.raises(ConfigError, match=r"no \*\.gguf file"):
        loaded(tmp_path, load_format="gguf")


def test_a_damaged_file_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is no whole safetensors file"):
        loaded(tmp_path)


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path):
    write_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ConfigError, match="quantised with 'awq'"):
        loaded(tmp_path)


def test_progress_is_told_for_every_tensor(tmp_path):
    tensors = write_checkpoint(tmp_path)
    told = []
    loaded(tmp_path, progress=lambda num, total: told.append((num, total)))
    assert told == [(num, len(tensors)) for num in range(1, len(tensors) + 1)]


def test_the_weights_get_the_type_that_was_asked_for(tmp_path):
    write_checkpoint(tmp_path)
    model = loaded(tmp_path, dtype="float16")
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    assert types["embed_tokens.weight"] == torch.float16
    assert types["norm.weight"] == torch.float32


@pytest.mark.parametrize(
    ("device", "checkpoint", "wanted"),
    [
        ("cuda", "float32", torch.float16),
        ("cuda", "float16", torch.float16),
        ("cuda", "bfloat16", torch.bfloat16),
    ],
)
def test_auto_is_a_16_bit_type_on_a_gpu(tmp_path, device, checkpoint, wanted):
    config = ModelConfig.load(write_config(tmp_path, torch_dtype=checkpoint))
    assert resolve_dtype("auto", config, torch.device(device)) == wanted


def test_explicit_types_have_several_names_and_others_are_refused(tmp_path):
    config = ModelConfig.load(write_config(tmp_path))
    assert resolve_dtype("half", config, CPU) == torch.float16
    assert resolve_dtype("float", config, CPU) == torch.float32
    assert resolve_dtype("auto", config, CPU) in (torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="not 'int8'"):
        resolve_dtype("int8", config, CPU)


def test_a_size_that_cannot_be_shared_is_refused(tmp_path):
    write_config(tmp_path)
    with pytest.raises(ConfigError, match="--tp-size may be 1, 2, 6"):
        loaded(tmp_path, tp=TensorParallel(0, 4), load_format="dummy")


# ── random weights ──────────────────────────────────────────────────────────────────────────────


def test_dummy_weights_need_only_a_config_and_give_finite_varied_logits(tmp_path):
    logits_TV = sequence_logits(loaded(write_config(tmp_path), load_format="dummy"), TOKEN_IDS)
    assert torch.isfinite(logits_TV).all()
    assert logits_TV.std() > 1e-3


def test_dummy_ranks_hold_parts_of_the_same_model(tmp_path):
    whole, _ = load_model(
        write_config(tmp_path),
        load_format="dummy",
        dtype="float16",
        device=CPU,
        tp=TensorParallel(),
    )
    full = _linears(whole)
    for rank in range(2):
        part, _ = load_model(
            tmp_path, load_format="dummy", dtype="float16", device=CPU, tp=TensorParallel(rank, 2)
        )
        for name, linear in _linears(part).items():
            weight = linear.weights["weight"]
            for piece_name, piece in weight.pieces.items():
                start = full[name].weights["weight"].pieces[piece_name].at + piece.first
                wanted = full[name].weights["weight"].narrow(weight.axis, start, piece.num)
                assert torch.equal(weight.narrow(weight.axis, piece.at, piece.num), wanted), name


def _linears(model: torch.nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")


def paired_rows(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """The order of rows in which llama.cpp keeps a Llama's queries and keys."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    divisors: list[float] | None = None,
) -> Path:
    """What llama.cpp's converter would make of a checkpoint."""
    is_llama = config.architecture == "LlamaForCausalLM"
    writer = gguf.GGUFWriter(path, "llama" if is_llama else "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        array = tensor.numpy()
        if is_llama and ("q_proj" in name or "k_proj" in name):
            array = paired_rows(array, config.head_dim)
        is_small = array.ndim == 1 or array.shape[-1] % 32
        raw_type = gguf.GGMLQuantizationType.F32 if is_small else kind
        writer.add_tensor(gguf_name(name), gguf.quantize(array, raw_type), raw_dtype=raw_type)
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"attention_bias": True},
        {"architectures": ["Qwen2ForCausalLM"]},
    ],
    ids=["llama", "tied", "biased", "qwen2"],
)
def test_a_gguf_file_is_the_same_model_as_the_checkpoint_it_was_made_from(tmp_path, changes):
    tensors = write_checkpoint(tmp_path / "original", **changes)
    config = ModelConfig.load(tmp_path / "original")
    path = write_gguf(tmp_path / "model.gguf", config, tensors)
    wanted = sequence_logits(loaded(tmp_path / "original"), TOKEN_IDS)
    torch.testing.assert_close(sequence_logits(loaded(path), TOKEN_IDS), wanted)


def test_a_quantised_gguf_file_is_the_rounded_model(tmp_path):
    changes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    tensors = write_checkpoint(tmp_path / "original", **changes)
    config = ModelConfig.load(tmp_path / "original")
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "model.gguf", config, tensors, kind)
    rounded = {
        name: tensor
        if tensor.ndim == 1
        else torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
        for name, tensor in tensors.items()
    }
    save_file(rounded, tmp_path / "original" / "model.safetensors")
    wanted = sequence_logits(loaded(tmp_path / "original"), TOKEN_IDS)
    torch.testing.assert_close(sequence_logits(loaded(path), TOKEN_IDS), wanted)


def test_a_gguf_file_can_scale_each_rotary_angle(tmp_path):
    config = ModelConfig.load(write_config(tmp_path))
    divisors = [1.0, 1.5, 4.0, 8.0]
    path = write_gguf(tmp_path / "m.gguf", config, checkpoint_tensors(config), divisors=divisors)
    found = ModelConfig.load(path)
    assert (found.rope.scaling, found.rope.divisors) == ("divided", tuple(divisors))
    assert torch.isfinite(sequence_logits(loaded(path), TOKEN_IDS)).all()


def test_rows_of_a_gguf_tensor_can_be_read_by_themselves(tmp_path):
    config = ModelConfig.load(write_config(tmp_path))
    tensors = checkpoint_tensors(config)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", config, tensors))
    wanted = tensors["model.embed_tokens.weight"][10:20].numpy()
    assert np.array_equal(file.rows("token_embd.weight", 10, 20), wanted)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "ü"]


def test_a_gguf_file_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path):
    config = ModelConfig.load(write_config(tmp_path / "config"))
    path = write_gguf(tmp_path / "m.gguf", config, checkpoint_tensors(config))
    data = path.read_bytes()
    for length in (0, 3, 20, 100, 700, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"m\.gguf"):
            loaded(path)


def test_a_gguf_file_of_another_family_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="holds a 'mamba' model; GGUF files can be llama, qwen2"):
        config_fields(GgufFile(tmp_path / "m.gguf"))


def test_a_folder_with_several_gguf_files_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"give one of a\.gguf, b\.gguf"):
        ModelConfig.load(tmp_path)

"""Sessions and weights through the whole engine, each of two ranks with half of the model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.server import wait_until
from safetensors.torch import load_file, save_file
from tiny_models import checkpoint_tensors
from toy import toy_settings, write_toy

import sgl
from sgl.errors import EngineError, InvalidRequestError
from sgl.model_files import demo_model_path
from sgl.models.config import ModelConfig
from sgl.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ["Once upon a time", "The capital of France is", "Seven"]
NUM_TOKENS = 80


def write_weights(folder: Path, seed: int) -> Path:
    config = ModelConfig.load(write_toy(folder))
    save_file(checkpoint_tensors(config, seed), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    for seed, name in enumerate(("old", "new", "torn")):
        write_weights(folder / name, seed)
    torn = folder / "torn" / "model.safetensors"
    tensors = load_file(torn)
    save_file({name: it for name, it in tensors.items() if name != "model.norm.weight"}, torn)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Iterator[sgl.Engine]:
    settings = toy_settings(folder / "old") | {
        "load_format": "auto",
        "num_cpu_threads": 1,
        "tp_size": 2,
    }
    with sgl.Engine(**settings) as engine:
        yield engine


def toy_engine(folder: Path, **more: Any) -> sgl.Engine:
    settings = toy_settings(folder / "old") | {"load_format": "auto", "num_cpu_threads": 1}
    return sgl.Engine(**settings | more)


def sampling(num_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}


def answers(engine: sgl.Engine) -> list[list[int]]:
    """Greedy answers to all prompts."""
    found = engine.generate(PROMPTS, sampling(NUM_TOKENS))
    return [output["output_ids"] for output in found]


class Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, engine: sgl.Engine, prompt: str) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.ids: list[int] = []
        self._stream = engine.generate(prompt, sampling(NUM_TOKENS), stream=True)
        self.start()

    def run(self) -> None:
        for part in self._stream:
            self.ids = part["output_ids"]
            self.has_begun.set()


def test_the_second_turn_of_a_session_finds_all_that_the_first_computed(two_ranks):
    session_id = two_ranks.open_session(capacity_of_str_len=1000)
    first = two_ranks.generate(
        PROMPTS[0], sampling(16), session_params={"id": session_id}, rid="first"
    )
    session = {"id": session_id, "rid": "first"}
    parts = list(
        two_ranks.generate(
            " and then", sampling(16), session_params=session, stream=True, return_logprob=True
        )
    )
    meta = parts[-1]["meta_info"]
    num_first = first["meta_info"]["prompt_tokens"] + 16
    assert meta["cached_tokens"] >= num_first - 1  # nobody needed the KV of the last token
    assert meta["prompt_tokens"] > num_first
    assert len(meta["output_token_logprobs"]) == 16
    encode = Tokenizer.load(demo_model_path()).encode
    ids = [*encode(PROMPTS[0]), *first["output_ids"], *encode(" and then")]
    assert two_ranks.flush_cache()
    whole = two_ranks.generate(input_ids=ids, sampling_params=sampling(16))
    assert whole["output_ids"] == parts[-1]["output_ids"]
    assert whole["meta_info"]["prompt_tokens"] == meta["prompt_tokens"]
    two_ranks.close_session(session_id)
    finish = two_ranks.generate("x", session_params=session)["meta_info"]["finish_reason"]
    assert finish["type"] == "abort"
    assert two_ranks.flush_cache(), "a session holds none of the cache"


def test_weights_are_gathered_from_all_ranks(two_ranks, folder):
    tensors = load_file(folder / "old" / "model.safetensors")
    layer = "model.layers.1"
    names = ["embed_tokens", "norm", "layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj"]
    names += ["layers.0.self_attn.o_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]
    for name in (f"model.{name}.weight" for name in names):
        rows = torch.tensor(two_ranks.get_weights_by_name(name, 70))
        assert torch.equal(rows, tensors[name][:70]), name
    with pytest.raises(InvalidRequestError, match=rf"it has .*{layer}\.mlp"):
        two_ranks.get_weights_by_name(f"{layer}.mlp.gate_up_proj.weight")


def test_a_torn_checkpoint_changes_nothing_and_says_why(two_ranks, folder):
    before = answers(two_ranks)
    with pytest.raises(InvalidRequestError, match=r"it lacks model\.norm\.weight"):
        two_ranks.update_weights_from_disk(folder / "torn")
    with pytest.raises(InvalidRequestError, match="there is no folder"):
        two_ranks.update_weights_from_disk(folder / "absent")
    assert answers(two_ranks) == before
    assert two_ranks.get_server_info()["model_path"] == str(folder / "old")


def test_streams_end_with_the_old_weights_and_whoever_comes_meanwhile_gets_the_new(
    two_ranks, folder
):
    old = answers(two_ranks)
    readers = [Reader(two_ranks, prompt) for prompt in PROMPTS]
    for reader in readers:
        assert reader.has_begun.wait(30)
    told: list[str] = []
    update = threading.Thread(
        target=lambda: told.append(two_ranks.update_weights_from_disk(folder / "new"))
    )
    update.start()
    while not two_ranks._front._questions._replies and not told:  # until it is on its way
        pass
    assert any(len(reader.ids) < NUM_TOKENS for reader in readers), "nothing ran any more"
    waiting = [Reader(two_ranks, prompt) for prompt in PROMPTS]
    for thread in (*readers, *waiting, update):
        thread.join(60)
    assert [reader.ids for reader in readers] == old
    new = answers(two_ranks)
    assert [reader.ids for reader in waiting] == new
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert "loaded in" in told[0]
    assert two_ranks.get_server_info()["model_path"] == str(folder / "new")


def test_logprobs_of_a_prompt_begin_where_they_are_asked_for(folder: Path) -> None:
    """Also beyond its first chunks, while later ones are planned before earlier ones are done."""
    ids = [100 + 7 * number for number in range(100)]
    with toy_engine(folder, chunked_prefill_size=16) as engine:

        def reported(start: int) -> list[list[Any]]:
            assert engine.flush_cache()
            asked = {"return_logprob": True, "logprob_start_len": start}
            answer = engine.generate(input_ids=ids, sampling_params=sampling(2), **asked)
            rows: list[list[Any]] = answer["meta_info"]["input_token_logprobs"]
            return rows

        whole = reported(0)
        assert [row[1] for row in whole] == ids
        for start in (10, 33, 50, 80, 99):
            rows = reported(start)
            assert [row[1] for row in rows] == ids[start:]
            assert [row[0] for row in rows] == pytest.approx(
                [row[0] for row in whole[start:]], abs=1e-4
            )


def test_an_engine_in_a_process_that_was_forked_says_so(folder: Path) -> None:
    with toy_engine(folder) as engine:
        read_end, write_end = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                engine.generate("Seven", sampling(1))
            except EngineError as error:
                os.write(write_end, str(error).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end, encoding="utf-8") as said:
            assert said.read() == "the engine was shut down"
        os.waitpid(pid, 0)
        assert engine.generate("Seven", sampling(1))["meta_info"]["completion_tokens"] == 1


def test_an_interrupt_ends_what_was_waited_for(folder: Path) -> None:
    with toy_engine(folder) as engine:
        interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["Seven"] * 20, sampling(1500))
        assert wait_until(engine.flush_cache, timeout_s=1), "it is still at work"

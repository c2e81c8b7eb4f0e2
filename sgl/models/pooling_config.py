"""What a checkpoint says about the vectors it gives, and whether they are made as we make them.

Ours is the last token's output, after causal attention. A model that was trained for another way
would give wrong numbers without anybody noticing: it is refused at the start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sgl.errors import ConfigError
from sgl.models.config_fields import Fields
from sgl.models.registry import Head

MODULES_FILE = "modules.json"  # of sentence-transformers: the steps from a text to its vector
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
GGUF_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
GGUF_ALLOWED = (0, 3)

DEFAULT_NUM_LABELS = 2  # of transformers, which leaves it out of the config then


def check_pooling(path: Path, fields: Fields, head: Head) -> None:
    """Raises ConfigError if the model's vectors are made in a way that is not ours."""
    _check_causal(fields)
    if head == "embedding":
        _check_own_code(fields)
        _check_gguf(fields)
        _check_modules(path)


def vector_sizes(fields: Fields, head: Head) -> Sequence[int]:
    """Lengths that a vector can be given, the whole length last.

    Only of a model that says so can the beginning of a vector be used alone.
    """
    if head == "reward":
        return (1,)  # whatever labels its config names
    if head == "scores":
        num_named = len(fields.table("id2label").names)
        return (fields.count("num_labels", num_named or DEFAULT_NUM_LABELS),)
    whole = fields.count("hidden_size")
    sizes = sorted(size for size in fields.integers("matryoshka_dimensions") if 0 < size < whole)
    if sizes:
        return (*sizes, whole)
    return range(1, whole + 1) if fields.flag("is_matryoshka", False) else (whole,)


def _check_causal(fields: Fields) -> None:
    is_causal = fields.flag("is_causal", True)
    if is_causal and not fields.flag("use_bidirectional_attention", False):
        return
    raise ConfigError(
        f"{fields.source}: its tokens attend to the tokens after them as well (is_causal is false, "
        "as in gte-Qwen2), which is not served: use an embedding model with causal attention, "
        "such as e5-mistral"
    )


def _check_own_code(fields: Fields) -> None:
    """Older revisions of gte-Qwen2 bring a network that is not causal, and no entry says so."""
    if "AutoModel" not in fields.table("auto_map") or "is_causal" in fields:
        return
    raise ConfigError(
        f"{fields.source}: the checkpoint brings code of its own (auto_map), which is never run, "
        "and does not say whether its attention is causal; if you know that it is, add "
        """--json-model-override-args '{"is_causal": true}'"""
    )


def _check_gguf(fields: Fields) -> None:
    kind = fields.optional_count("gguf_pooling_type") or 0
    if kind not in GGUF_ALLOWED:
        raise _other_pooling(fields.source, GGUF_POOLING.get(kind, str(kind)))


def _check_modules(path: Path) -> None:
    """The steps that sentence-transformers would take, where the checkpoint has such a list."""
    file = path / MODULES_FILE
    if not file.is_file():
        return
    for kind, folder in _modules(file):
        if kind not in KNOWN_MODULES:
            raise ConfigError(
                f"{file}: a step of the kind {kind!r} makes the vectors, which is not served; "
                f"there is {', '.join(KNOWN_MODULES)}"
            )
        if kind == "Pooling":
            _check_pooling_step(path / folder / "config.json")


def _modules(file: Path) -> list[tuple[str, str]]:
    """Kind and folder of each step."""
    try:
        steps = json.loads(file.read_text(encoding="utf-8"))
        return [(str(step["type"]).rpartition(".")[2], Path(step["path"]).name) for step in steps]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is no list of modules: {error!r}; get it again") from None


def _check_pooling_step(file: Path) -> None:
    fields = Fields.from_json(file)
    found = fields.optional_text("pooling_mode")
    modes = [name for name in fields.names if name.startswith("pooling_mode_")]
    chosen = [found] if found else [mode for mode in modes if fields.flag(mode, False)]
    names = [mode.removeprefix("pooling_mode_") for mode in chosen]
    if names and names != ["lasttoken"]:
        raise _other_pooling(str(file), " and ".join(names))


def _other_pooling(source: str, name: str) -> ConfigError:
    return ConfigError(
        f"{source}: the model's vectors are made by pooling {name!r}, which is not served: use an "
        "embedding model that takes the last token's output, such as e5-mistral"
    )

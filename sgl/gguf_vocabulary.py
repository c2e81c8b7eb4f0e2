"""The tokenizer that a GGUF file describes: its vocabulary, and how it cuts text before merging.

A file names the way its text is cut ("llama-bpe") and leaves it to the reader to know what that is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sgl.errors import ConfigError
from sgl.gguf_metadata import end_ids, read_gguf_metadata

_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_SINGLE_DIGITS = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]


def _split_by(digits: str) -> list[Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


class _PreTokenizer(NamedTuple):
    """How text is cut before byte-pair encoding, by the name GGUF files have for it."""

    steps: list[Any]
    has_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_LLAMA_3 = _PreTokenizer(_split_by(r"\p{N}{1,3}"), ignores_merges=True, adds_bos=True)
_QWEN_2 = _PreTokenizer(_split_by(r"\p{N}"), has_nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_GPT2),
    "smollm": _PreTokenizer(_SINGLE_DIGITS),
    "starcoder": _PreTokenizer(_SINGLE_DIGITS),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types: written for the model; written by people


class GgufVocabulary:
    """What one file says about its tokens. Raises ConfigError where it says nothing."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: dict[str, Any] = dict(read_gguf_metadata(file))
        if "tokenizer.ggml.tokens" not in self._entries:
            raise ConfigError(f"{file} has no tokenizer: give --tokenizer-path the original folder")
        self.tokens: list[str] = self._entry("tokens")
        self.end_ids = end_ids(self._entries)
        self.chat_template: str | None = self._entries.get("tokenizer.chat_template")

    @property
    def is_byte_level(self) -> bool:
        """Whether `byte_level_tokenizer` can be asked; the others are sentencepiece."""
        return bool(self._entry("model") == "gpt2")

    def special_token(self, name: str) -> str:
        """The token called "bos" or "eos"; empty where there is none."""
        token_id = self._entry(f"{name}_token_id")
        return "" if token_id is None else self.tokens[token_id]

    def byte_level_tokenizer(self) -> Tokenizer:
        pre = self._pre_tokenizer()
        vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in self._entry("merges")]
        fast = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignores_merges))
        fast.pre_tokenizer = pre_tokenizers.Sequence(pre.steps)
        fast.decoder = decoders.ByteLevel()
        if pre.has_nfc:
            fast.normalizer = normalizers.NFC()
        self._add_tokens(fast)
        if self._entry("add_bos_token", pre.adds_bos):
            bos = self.special_token("bos")
            fast.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, self._entry("bos_token_id"))]
            )
        return fast

    def _pre_tokenizer(self) -> _PreTokenizer:
        name = self._entry("pre", "gpt-2")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise ConfigError(
                f"{self._file.name} cuts its text by {name!r}, we know {known}: "
                "give --tokenizer-path the folder of the original model"
            )
        return PRE_TOKENIZERS[name]

    def _add_tokens(self, fast: Tokenizer) -> None:
        """Those that are found in a text before it is cut."""
        types = self._entry("token_type", ())
        for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
            added = [it for it, type_ in zip(self.tokens, types, strict=False) if type_ == kind]
            fast.add_tokens([AddedToken(it, special=is_special, normalized=False) for it in added])

    def _entry(self, name: str, default: object = None) -> Any:
        return self._entries.get(f"tokenizer.ggml.{name}", default)

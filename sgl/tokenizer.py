"""Text to token ids and back, loaded without torch from a model folder or a GGUF file.

    text ── encode ──▶ ids ── decode ────────▶ text of a whole sequence, as Hugging Face gives it
                        └──── byte_table ────▶ the bytes of each token, for `TextStream`

A token of a text model stands for bytes, not for characters: an emoji can be four tokens. The table
says which bytes. Joined, they are the text; only a sentencepiece model's very first space differs,
which `decode` drops and the table keeps, because a continuation needs it ("I" + " am").
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from sgl.errors import ConfigError, InvalidRequestError
from sgl.gguf_vocabulary import GgufVocabulary

ALWAYS_ENDS = ("<|eom_id|>",)  # Llama 3 ends a message with it, and no config file says so


class Tokenizer:
    """A vocabulary, its special tokens and the model's chat template.

    closes_with_eos   the model's config says that a whole text ends with the end-of-sequence token
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        bos_token: str = "",
        eos_token: str = "",
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        closes_with_eos: bool = False,
    ) -> None:
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_id: int | None = fast.token_to_id(bos_token)
        self.closes_with_eos = closes_with_eos
        self.chat_template = chat_template
        ends = [fast.token_to_id(token) for token in (eos_token, *ALWAYS_ENDS)]
        self.eos_ids = frozenset([*eos_ids, *(end for end in ends if end is not None)])
        self.special_ids = frozenset(
            token_id for token_id, token in self._added.items() if token.special
        )

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """The tokenizer of a Hugging Face folder or a `.gguf` file."""
        place = Path(path)
        if place.suffix == ".gguf" and place.is_file():
            return _from_gguf(place)
        if (place / "tokenizer.json").is_file():
            return _from_folder(place)
        if place.is_dir():
            return _from_transformers(place)
        raise ConfigError(
            f"no tokenizer at {path}: give --tokenizer-path a folder with tokenizer.json, "
            "or a .gguf file"
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> array[int]:
        """Token ids of `text`; special tokens written out in it become their ids."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "the text holds half of a surrogate pair: send whole Unicode characters"
            ) from None
        return array("i", self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_continuation(self, text: str) -> array[int]:
        """Token ids of text that follows on other text: no token begins it, and no space.

        A sentencepiece model puts a space before every text that it is given.
        """
        if not self._adds_space:
            return self.encode(text, add_special_tokens=False)
        before = self.encode("\n", add_special_tokens=False)
        ids = self.encode("\n" + text, add_special_tokens=False)
        if ids[: len(before)] != before:  # the line break became part of another token
            return self.encode(text, add_special_tokens=False)
        return ids[len(before) :]

    @cached_property
    def _adds_space(self) -> bool:
        first = self.encode("a", add_special_tokens=False)[:1]
        return any(self.token_bytes(token_id).startswith(b" ") for token_id in first)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids that are not in the vocabulary have none."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """The whole tokenizer, as a tokenizer.json holds it."""
        text: str = self._fast.to_str()
        return text

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._bytes, default=-1) + 1

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode` puts the beginning-of-sequence token in front."""
        return self.bos_id is not None and self.bos_id in self.encode("")[:1]

    @cached_property
    def closing_id(self) -> int | None:
        """The token that ends a whole text, such as one to be embedded; None if there is none."""
        eos_id: int | None = self._fast.token_to_id(self.eos_token)
        is_added = self.encode("a")[-1:].tolist() == [eos_id]
        return eos_id if is_added or self.closes_with_eos else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token adds to the text; none for an id that is not in the vocabulary."""
        return self._bytes.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """The token alone, for people to look at: part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """id -> bytes; without the special tokens if they are to leave no text."""
        return self._bytes_without_special if skip_special_tokens else self._bytes

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        table = _vocabulary_bytes(self._fast.get_vocab(with_added_tokens=True), self._fast.decoder)
        table.update((token_id, token.content.encode()) for token_id, token in self._added.items())
        return table

    @cached_property
    def _bytes_without_special(self) -> dict[int, bytes]:
        return {key: data for key, data in self._bytes.items() if key not in self.special_ids}

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._fast.get_added_tokens_decoder()


def _vocabulary_bytes(vocabulary: Mapping[str, int], decoder: object) -> dict[int, bytes]:
    """What each entry of the vocabulary adds to a text, as the model's decoder would have it."""
    steps = _decoder_steps(decoder)
    if "ByteLevel" in steps:
        return {key: _alphabet_bytes(token) for token, key in vocabulary.items()}
    if "WordPiece" in steps or not steps:
        return {key: _word_bytes(token) for token, key in vocabulary.items()}
    table = {key: token.replace("▁", " ").encode() for token, key in vocabulary.items()}
    for byte in range(256):
        key = vocabulary.get(f"<0x{byte:02X}>")
        if key is not None and "ByteFallback" in steps:
            table[key] = bytes([byte])
    return table


def _decoder_steps(decoder: Any) -> set[str]:
    if decoder is None:
        return set()
    spec = json.loads(decoder.__getstate__())
    return {step["type"] for step in spec.get("decoders", [spec])}


def _byte_alphabet() -> dict[int, int]:
    """Byte-level models write byte 0x0A as "Ċ": code point of the letter -> the byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _alphabet_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[ord(letter)] for letter in token])
    except KeyError:
        return token.encode()


def _word_bytes(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else b" " + token.encode()


def _from_folder(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    names = {**_read_json(folder / "special_tokens_map.json"), **config}
    try:
        fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
    _add_declared_tokens(fast, config.get("added_tokens_decoder") or {})
    fast.add_special_tokens(sorted(set(_special_names(names)) - {""}))
    return Tokenizer(
        fast,
        bos_token=_content(names.get("bos_token")),
        eos_token=_content(names.get("eos_token")),
        eos_ids=_configured_ends(folder),
        chat_template=_folder_template(folder, config),
        closes_with_eos=config.get("add_eos_token") is True,
    )


def _add_declared_tokens(fast: FastTokenizer, declared: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows, in the order of their ids."""
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if fast.token_to_id(token["content"]) is None:
            fast.add_tokens([AddedToken(**token)])


def _special_names(names: Mapping[str, Any]) -> Iterator[str]:
    for key, value in names.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            values = value.values() if isinstance(value, dict) else value or []
            yield from (_content(item) for item in values)
        elif key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
            yield _content(value)


def _content(token: object) -> str:
    """A token is written as its text or as an object with its text."""
    return str(token["content"]) if isinstance(token, dict) else str(token or "")


def _configured_ends(folder: Path) -> list[int]:
    config = _read_json(folder / "config.json")
    sources = [_read_json(folder / "generation_config.json"), config, config.get("text_config")]
    ends: list[int] = []
    for source in sources:
        ids = (source or {}).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return ends


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file beside the tokenizer goes before the entry in its config; of several, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = {template["name"]: str(template["template"]) for template in entry}
        return named.get("default") or next(iter(named.values()), None)
    return None if entry is None else str(entry)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    return cast("dict[str, Any]", content)


def _from_transformers(folder: Path, **options: str) -> Tokenizer:
    """Formats that have to be converted first (sentencepiece); costs seconds and imports torch."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
        fast = slow.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"no tokenizer could be read from {folder}: {error}. Add a tokenizer.json, "
            "or name another folder with --tokenizer-path"
        ) from None
    return Tokenizer(
        fast,
        bos_token=slow.bos_token or "",
        eos_token=slow.eos_token or "",
        eos_ids=_configured_ends(folder),
        chat_template=slow.chat_template if isinstance(slow.chat_template, str) else None,
    )


def _from_gguf(file: Path) -> Tokenizer:
    vocabulary = GgufVocabulary(file)
    if not vocabulary.is_byte_level:
        return _from_transformers(file.parent, gguf_file=file.name)
    return Tokenizer(
        vocabulary.byte_level_tokenizer(),
        bos_token=vocabulary.special_token("bos"),
        eos_token=vocabulary.special_token("eos"),
        eos_ids=vocabulary.end_ids,
        chat_template=vocabulary.chat_template,
    )

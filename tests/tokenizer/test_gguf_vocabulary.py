"""GGUF vocabularies: the built-in model's ids are llama.cpp's, and each splitting rule is that of the original tokenizer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, pre_tokenizers

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.tokenizer.patterns import SPLIT_ALIASES, SPLITS
from tests.tokenizer.tiny_vocabularies import (
    SAMPLES,
    train_byte_level,
    train_sentencepiece,
    write_gguf,
    write_gguf_byte_level,
    write_gguf_sentencepiece,
)

# Made with llama.cpp's /tokenize on the same file.
SMOLLM2_IDS = [
    (
        "Hello, world! It's 3.14.\n\n\t2 apples",
        [19556, 28, 905, 17, 657, 506, 216, 35, 30, 33, 36, 30, 14436, 34, 13855],
    ),
    ("def f(x):\n    return x ** 2\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198]),
    (
        "Приве́т, 你好，世界！",
        [
            *(155, 249, 46879, 16464, 6643, 151, 219, 8355, 28, 216, 18645, 250, 48392, 138, 12831, 7906, 240),
            *(178, 239, 230, 8083, 219),
        ],
    ),
    ("  two  spaces \r\n", [216, 827, 216, 5600, 216, 2738]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("\u00a0\u3000\u200b x2025y", [15442, 12109, 218, 321, 229, 1792, 34, 32, 34, 37, 105]),
]


def hugging_face_split(name: str) -> Any:
    """The pre-tokenizer of a model that uses the rule, as its tokenizer.json spells it."""
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    tail = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    splits = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(Regex(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + tail), "isolated"),
        "llama-bpe": pre_tokenizers.Split(
            Regex(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + tail), "isolated"
        ),
    }
    return pre_tokenizers.Sequence([splits[name], byte_level])


@pytest.fixture(scope="module")
def smollm2(builtin_model: Path) -> Tokenizer:
    return Tokenizer(builtin_model)


@pytest.mark.parametrize(("text", "ids"), SMOLLM2_IDS)
def test_builtin_ids_are_those_of_llama_cpp(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_builtin_settings(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.eos_token) == (1, 2, "<|im_end|>")
    assert smollm2.eos_token_ids == [2, 0]
    assert smollm2.special_tokens["<|endoftext|>"] == 0
    assert smollm2.chat_template is not None
    assert "You are a helpful AI assistant named SmolLM" in smollm2.chat_template


def test_builtin_vocabulary_loads_fast(builtin_model: Path) -> None:
    start = time.perf_counter()
    Tokenizer(builtin_model)
    assert time.perf_counter() - start < 2, "0.2 s alone on the machine; it is part of the wait for the first token"


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe"])
def test_splitting_rule_is_the_original_one(name: str, tmp_path: Path) -> None:
    original = train_byte_level(hugging_face_split(name), special=["<|im_end|>"])
    tokenizer = Tokenizer(write_gguf_byte_level(tmp_path / "t.gguf", original, name, ggml__add_bos_token=False))
    for text in [*SAMPLES, "".join(SAMPLES), "x<|im_end|>y 1234 'RE"]:
        if name == "qwen2":
            text = text.replace("е́", "é")
        assert tokenizer.encode(text) == original.encode(text).ids


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_every_splitting_rule_covers_every_text(name: str) -> None:
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    for text in [*SAMPLES, "".join(SAMPLES)]:
        pieces = [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
        assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 12 x", ["it", "'s", " 12", " x"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "12345'LL(a", ["123", "45", "'LL", "(a"]),
        ("qwen2", "12 ab!\n", ["1", "2", " ab", "!\n"]),
        ("falcon", "a,1234", ["a", ",", "123", "4"]),
        ("default", "a!!12345", ["a", "!!", "123", "45"]),
        ("deepseek-llm", "Ωώ 你好12", ["Ωώ", " ", "你好", "1", "2"]),
        ("deepseek-coder", "a_b 1.\n", ["a", "_", "b", " ", "1", ".", "\n"]),
        ("deepseek-v3", "12345你好_ab", ["123", "45", "你好", "_ab"]),
        ("gpt-4o", "HelloWorld1234's", ["Hello", "World", "123", "4", "'s"]),
        ("tekken", "HelloWorld12", ["Hello", "World", "1", "2"]),
    ],
)
def test_splitting_rules_by_example(name: str, text: str, pieces: list[str]) -> None:
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    assert [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)] == pieces


def test_aliases_lead_to_rules() -> None:
    assert set(SPLIT_ALIASES.values()) <= set(SPLITS)
    assert not set(SPLIT_ALIASES) & set(SPLITS)


def test_whole_piece_before_merges(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    values: dict[str, Any] = {"ggml__model": "gpt2", "ggml__merges": ["b c", "a b"]}
    for pre, ids in (("gpt-2", [0, 4]), ("llama-bpe", [5])):
        path = write_gguf(tmp_path / f"{pre}.gguf", tokens, [1] * 6, ggml__pre=pre, **values)
        assert Tokenizer(path).encode("abc", add_bos=False) == ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabulary_is_the_models(prefix: bool, tmp_path: Path) -> None:
    model = train_sentencepiece(add_dummy_prefix=prefix)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    path = write_gguf_sentencepiece(tmp_path / "t.gguf", model, ggml__add_space_prefix=prefix)
    tokenizer = Tokenizer(path)
    for text in SAMPLES:
        assert tokenizer.encode(text) == [1, *original.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == original.decode(original.encode(text)) == text
    assert tokenizer.encode("a</s>b") == [1, *original.encode("a"), 2, *original.encode("b")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<s>", "</s>", [2])


def test_phi3_marks_swallow_white_space(tmp_path: Path) -> None:
    model = train_sentencepiece(control_symbols=["<|user|>", "<|end|>"])
    path = write_gguf_sentencepiece(tmp_path / "t.gguf", model, architecture="phi3", ggml__add_bos_token=False)
    tokenizer = Tokenizer(path)
    user = tokenizer.special_tokens["<|user|>"]
    assert tokenizer.encode("<|user|>\n the") == [user, *tokenizer.encode("the")]


def test_end_tokens_that_the_file_does_not_name(tmp_path: Path) -> None:
    trained = train_byte_level(special=["<|endoftext|>", "<|im_end|>", "<|eom_id|>", "<|end|>"])
    ids = {token: trained.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|eom_id|>", "<|end|>")}
    path = write_gguf_byte_level(tmp_path / "a.gguf", trained, "gpt-2", ggml__eos_token_id=ids["<|im_end|>"])
    assert Tokenizer(path).eos_token_ids == [ids[t] for t in ("<|im_end|>", "<|endoftext|>", "<|eom_id|>", "<|end|>")]
    trained.add_special_tokens(["<|return|>"])
    path = write_gguf_byte_level(
        tmp_path / "b.gguf", trained, "gpt-4o", ggml__eos_token_id=trained.token_to_id("<|return|>")
    )
    assert ids["<|end|>"] not in Tokenizer(path).eos_token_ids, "gpt-oss ends a message with it, not the answer"


def test_named_chat_templates(tmp_path: Path) -> None:
    trained = train_byte_level()
    templates = {"chat_template": "plain", "chat_template__tool_use": "tools"}
    tokenizer = Tokenizer(write_gguf_byte_level(tmp_path / "t.gguf", trained, "gpt-2", **templates))
    assert tokenizer.chat_templates == {"default": "plain", "tool_use": "tools"}


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ggml__model": "gpt2", "ggml__pre": "martian"}, "rule 'martian'"),
        ({"ggml__model": "bert"}, "kind 'bert'"),
        ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__merges": ["a z"]}, "do not fit"),
        ({"ggml__model": "llama", "ggml__scores": [0.0]}, "1 scores"),
    ]
    for values, message in cases:
        write_gguf(path, ["a", "b"], [1, 1], **values)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer(path)


def test_a_file_without_vocabulary_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", [], [], ggml__model="gpt2")
    with pytest.raises(CheckpointError, match="holds no vocabulary"):
        Tokenizer(path)


def test_tokenizers_library_decodes_the_same(smollm2: Tokenizer, builtin_model: Path) -> None:
    pieces = [smollm2.id_to_token(i) for i in range(1000, 1400)]
    decoded = tokenizers.decoders.ByteLevel().decode([piece for piece in pieces if piece is not None])
    assert smollm2.decode(range(1000, 1400)) == decoded

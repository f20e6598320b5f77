"""SentencePiece models with what checkpoints add: control tokens, InternLM2's renamed and ChatGLM's appended ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.tiny_vocabularies import SAMPLES, train_sentencepiece, write_json


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "<eoa>"])


def load(folder: Path, model: bytes, **files: object) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return Tokenizer(folder)


def test_ids_are_the_librarys(tmp_path: Path, model: bytes) -> None:
    tokenizer, original = load(tmp_path, model), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in SAMPLES:
        assert tokenizer.encode(text) == [1, *original.encode(text)]
        assert tokenizer.encode(text, add_bos=False) == original.encode(text)
        assert tokenizer.decode(original.encode(text)) == original.decode(original.encode(text))
    assert tokenizer.vocab_size == original.get_piece_size()


def test_control_tokens_are_cut_out_and_each_stretch_gets_its_space(tmp_path: Path, model: bytes) -> None:
    tokenizer, original = load(tmp_path, model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.encode("the</s>dog<s>") == [1, *original.encode("the"), 2, *original.encode("dog"), 1]
    assert tokenizer.decode([1, *original.encode("the"), 2, *original.encode("dog")]) == "the dog"


def test_legacy_false_puts_the_space_at_the_start_only(tmp_path: Path, model: bytes) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    tokenizer = load(tmp_path, model, tokenizer_config=config)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    bare = original.encode("<eoa>dog")[2:]
    assert tokenizer.encode("the</s>dog") == [1, *original.encode("the"), 2, *bare]
    assert tokenizer.encode("</s>dog", add_bos=False) == [2, *bare]
    for text in SAMPLES:
        assert tokenizer.encode(text) == [1, *original.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_renamed_pieces_keep_their_ids_and_both_spellings(tmp_path: Path, model: bytes) -> None:
    """InternLM2: <|im_end|> is the piece formerly called [UNUSED_TOKEN_145]."""
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    end = original.piece_to_id("[UNUSED_TOKEN_145]")
    entry = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "special": True}
    tokenizer = load(tmp_path, model, tokenizer_config={"added_tokens_decoder": {str(end): entry}})
    assert tokenizer.encode("a<|im_end|>", add_bos=False)[-1] == end
    assert tokenizer.encode("a[UNUSED_TOKEN_145]", add_bos=False)[-1] == end
    assert tokenizer.id_to_token(end) == "<|im_end|>"
    assert tokenizer.token_to_id("<|im_end|>") == end
    assert tokenizer.decode([end, *original.encode("a")]) == "a"


def test_user_defined_pieces_are_text(tmp_path: Path, model: bytes) -> None:
    """InternLM's <eoa> is a plain piece of its model: found in text, and part of it."""
    tokenizer = load(tmp_path, model)
    end = tokenizer.token_to_id("<eoa>")
    assert end is not None
    assert tokenizer.encode("the<eoa>", add_bos=False)[-1] == end
    assert tokenizer.decode([end]) == "<eoa>"


def test_added_tokens_after_the_pieces_strip_as_they_say(tmp_path: Path, model: bytes) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    decoder = {
        str(size): {"content": "<|user|>", "rstrip": True, "special": True},
        str(size + 1): {"content": "<|user|>x", "lstrip": True, "special": False},
    }
    tokenizer = load(tmp_path, model, tokenizer_config={"added_tokens_decoder": decoder})
    plain = tokenizer.encode("the", add_bos=False)
    assert tokenizer.encode("<|user|> \nthe", add_bos=False) == [size, *plain]
    assert tokenizer.encode("the \n<|user|>x", add_bos=False) == [*plain, size + 1], "the longer spelling wins"
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.decode([size, size + 1]) == "<|user|>x"


def test_chatglm2_numbers_its_marks_after_the_pieces(tmp_path: Path, model: bytes) -> None:
    tokenizer = load(tmp_path, model, config={"model_type": "chatglm"})
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    plain = sentencepiece.SentencePieceProcessor(model_proto=model).encode("sophie")
    assert tokenizer.encode("sophie") == [size + 1, size + 3, *plain], "[gMASK], sop, and no sop inside the word"
    assert tokenizer.special_tokens["[gMASK]"] == size + 1
    assert tokenizer.decode(tokenizer.encode("sophie")) == "sophie"
    assert tokenizer.token_to_id("<|assistant|>") is None


def test_chatglm3_is_told_by_its_own_code_or_tokens(tmp_path: Path, model: bytes) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    (tmp_path / "tokenization_chatglm.py").write_text('roles = ["<|assistant|>", "<|observation|>"]', encoding="utf-8")
    tokenizer = load(tmp_path, model, config={"model_type": "chatglm"})
    assert tokenizer.encode("<|user|>", add_bos=False) == [size + 6]
    (tmp_path / "tokenization_chatglm.py").unlink()
    decoder = {str(size + 6): {"content": "<|user|>", "special": False}}
    tokenizer = load(tmp_path, model, tokenizer_config={"added_tokens_decoder": decoder})
    assert tokenizer.special_tokens["<|observation|>"] == size + 8


def test_a_damaged_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="SentencePiece"):
        load(tmp_path, b"\x00\x01\x02\xff" * 100)

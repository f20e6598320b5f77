"""tiktoken files: each family's special ids and splitting rule, and files of no known family."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.tokenizer.tiktoken_file import FAMILIES
from tests.tokenizer.tiny_vocabularies import train_byte_level, write_json, write_ranks


def load(folder: Path, name: str, config: dict[str, Any], **files: Any) -> tuple[Tokenizer, int]:
    """The tokenizer, and the number of ranks in its file."""
    trained = train_byte_level()
    write_ranks(folder / name, trained)
    for file, value in {"config": config, **files}.items():
        write_json(folder / f"{file}.json", value)
    return Tokenizer(folder), trained.get_vocab_size()


def test_qwen(tmp_path: Path) -> None:
    tokenizer, ranks = load(tmp_path, "qwen.tiktoken", {"model_type": "qwen"})
    assert tokenizer.special_tokens["<|endoftext|>"] == ranks
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[0] == ranks + 1
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[-1] == ranks + 2
    assert tokenizer.special_tokens["<|extra_204|>"] == ranks + 207
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (ranks, None)
    assert tokenizer.vocab_size == ranks + 208
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é"), "Qwen composes accents"
    assert tokenizer.decode(tokenizer.encode("<img>")) == "<img>", "plain text where there are no pictures"


def test_qwen_vl_has_tokens_for_pictures(tmp_path: Path) -> None:
    tokenizer, ranks = load(tmp_path, "qwen.tiktoken", {"model_type": "qwen", "visual": {}})
    assert tokenizer.encode("<img></img><imgpad>") == [ranks + 214, ranks + 215, ranks + 216]


def test_real_sizes_give_the_published_ids() -> None:
    def special_id(family: str, token: str, **config: Any) -> int:
        return FAMILIES[family].rank_count + list(FAMILIES[family].list_special(config)).index(token)

    assert [special_id("qwen", t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [151643, 151644, 151645]
    assert special_id("qwen", "<img>", visual={}) == 151857
    assert special_id("llama3", "<|begin_of_text|>") == 128000
    assert special_id("llama3", "<|eot_id|>") == 128009
    assert len(FAMILIES["llama3"].list_special({})) == 256
    assert [special_id("glm4", t) for t in ("[gMASK]", "<sop>", "<|user|>")] == [151331, 151333, 151336]
    assert special_id("cl100k", "<|endoftext|>") == 100257
    assert special_id("cl100k", "<|im_end|>") == 100279


def test_llama3_begins_with_its_token(tmp_path: Path) -> None:
    tokenizer, ranks = load(tmp_path, "tokenizer.model", {"model_type": "llama"})
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id == ranks
    assert tokenizer.encode("hi", add_bos=False) == tokenizer.encode("hi")[1:]
    assert tokenizer.special_tokens["<|eot_id|>"] == ranks + 9


def test_glm4_begins_with_two_tokens_and_takes_ids_from_the_config(tmp_path: Path) -> None:
    trained = train_byte_level()
    ranks = trained.get_vocab_size()
    decoder = {
        str(ranks + 2): {"content": "[gMASK]", "special": True},
        str(ranks + 9): {"content": "<|new|>", "special": True},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|endoftext|>"}
    tokenizer, _ = load(tmp_path, "tokenizer.model", {"model_type": "chatglm"}, tokenizer_config=config)
    assert tokenizer.encode("a")[:2] == [ranks + 2, ranks + 4]
    assert tokenizer.special_tokens["<|new|>"] == ranks + 9
    assert "<|observation|>" not in tokenizer.special_tokens, "the config gave its id to another token"


def test_text_that_exhausts_the_expression_still_encodes(tmp_path: Path) -> None:
    tokenizer, _ = load(tmp_path, "qwen.tiktoken", {})
    text = " " * 1_000_000 + "end"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_families_and_damage_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown family"):
        load(tmp_path, "other.tiktoken", {"model_type": "martian"})
    (tmp_path / "other.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0\nnonsense\n")
    with pytest.raises(CheckpointError, match="nonsense"):
        Tokenizer(tmp_path)

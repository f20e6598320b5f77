"""The one Tokenizer class over every kind of file: settings, begin and end tokens, special tokens, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

import lmdeploy
from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.tokenizer.tiny_vocabularies import (
    SAMPLES,
    train_byte_level,
    train_sentencepiece,
    write_gguf_byte_level,
    write_gguf_sentencepiece,
    write_json,
    write_ranks,
)

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    return train_byte_level(special=SPECIAL)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory, byte_level: tokenizers.Tokenizer) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("kinds")
    model = train_sentencepiece()
    for name in ("json", "sentencepiece", "no_prefix", "tiktoken"):
        (root / name).mkdir()
    byte_level.save(str(root / "json" / "tokenizer.json"))
    (root / "sentencepiece" / "tokenizer.model").write_bytes(model)
    (root / "no_prefix" / "tokenizer.model").write_bytes(train_sentencepiece(add_dummy_prefix=False))
    write_ranks(root / "tiktoken" / "qwen.tiktoken", byte_level)
    write_gguf_byte_level(root / "bpe.gguf", byte_level, "gpt-2")
    write_gguf_sentencepiece(root / "sp.gguf", model)
    return {path.name: Tokenizer.from_path(path) for path in root.iterdir()}


KINDS = ("json", "sentencepiece", "no_prefix", "tiktoken", "bpe.gguf", "sp.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(every_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every_kind[kind]
    for text in SAMPLES:
        if kind == "tiktoken":  # Qwen composes accents
            text = text.replace("е́", "é")
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_increments_join_to_the_whole_text(every_kind: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = every_kind[kind]
    token_ids = st.integers(-1, tokenizer.vocab_size + 2)
    ids = data.draw(st.one_of(st.lists(token_ids, max_size=40), st.text(max_size=40).map(tokenizer.encode)))
    skips = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skips)
    pieces = [stream.add(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_ever_shows_half_a_character(every_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every_kind[kind]
    text = " ".join(SAMPLES[3:])
    ids = tokenizer.encode(text, add_bos=False)
    stream = IncrementalDetokenizer(tokenizer)
    pieces = [stream.add([token_id]) for token_id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_with_half_a_surrogate_encodes(every_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every_kind[kind]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_special_tokens_are_found_in_text_and_left_out_of_it(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert tokenizer.token_to_bytes(start) == b"<|im_start|>"
    assert tokenizer.is_special(end)
    assert not tokenizer.is_special(ids[1])


def test_add_bos_obeys_the_files(tmp_path: Path) -> None:
    trained = train_byte_level(special=SPECIAL)
    bos, eos = trained.token_to_id("<s>"), trained.token_to_id("</s>")
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    plain = trained.encode("hello", add_special_tokens=False).ids

    write_json(tmp_path / "tokenizer_config.json", config)
    assert Tokenizer(tmp_path).encode("hello") == [bos, *plain, eos]
    write_json(tmp_path / "tokenizer_config.json", {**config, "add_bos_token": False, "add_eos_token": False})
    assert Tokenizer(tmp_path).encode("hello") == plain
    write_json(tmp_path / "tokenizer_config.json", {**config, "add_bos_token": True, "add_eos_token": False})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("hello") == [bos, *plain]
    assert tokenizer("hello").input_ids == [bos, *plain]
    assert tokenizer.encode("hello", add_bos=False) == plain
    assert tokenizer.encode("hello", add_special_tokens=False) == plain
    assert tokenizer.encode("<s>hello") == [bos, *plain], "a prompt that begins with the token gets no second one"


def test_ids_of_begin_and_end_from_any_file(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    bos, eos, end = (byte_level.token_to_id(token) for token in ("<s>", "</s>", "<|im_end|>"))
    write_json(tmp_path / "config.json", {"bos_token_id": bos, "eos_token_id": eos, "model_type": "llama"})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.bos_token, tokenizer.eos_token_ids) == (bos, "<s>", [eos])
    assert tokenizer.model_type == "llama"
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [eos, end]})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.eos_token_ids) == ("<|im_end|>", end, [end, eos])


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    trained = train_byte_level()
    trained.save(str(tmp_path / "tokenizer.json"))
    size = trained.get_vocab_size()
    entry = {"content": "<|new|>", "special": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size): entry}})
    write_json(tmp_path / "added_tokens.json", {"<|new|>": size, "<tool>": size + 1})
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a<|new|>b<tool>c")
    assert size in ids
    assert size + 1 in ids
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.decode(ids) == "ab<tool>c"


def test_llama_json_decodes_spaces_and_bytes(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "world", "é"]
    model = models.BPE(dict(zip(pieces, range(len(pieces)), strict=True)), [], unk_token="<unk>", byte_fallback=True)
    llama = tokenizers.Tokenizer(model)
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    llama.decoder = decoders.Sequence(steps)
    llama.add_special_tokens(["<s>", "</s>"])
    llama.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [
        1,
        *(tokenizer.token_to_id(token) for token in ("▁hello", "▁", "world", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>")),
    ]
    assert tokenizer.decode(ids) == llama.decode(ids) == "hello world🙂"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> hello world🙂"
    assert tokenizer.decode([tokenizer.token_to_id("<0xF0>"), tokenizer.token_to_id("world")]) == "\ufffdworld"


def test_chat_templates_from_every_place(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).chat_template is None
    write_json(tmp_path / "chat_template.json", {"chat_template": "processor"})
    assert Tokenizer(tmp_path).chat_template == "processor"
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "tools"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer(tmp_path).chat_templates == {"default": "config", "tool_use": "tools"}
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    assert Tokenizer(tmp_path).chat_templates == {"default": "file", "tool_use": "tools", "rag": "rag"}


def test_public_name_and_no_heavy_import() -> None:
    assert lmdeploy.Tokenizer is Tokenizer
    heavy = "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    code = f"import sys, lmdeploy.tokenizer, lmdeploy.chat_template; {heavy}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        Tokenizer(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"none of tokenizer\.json"):
        Tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Tokenizer(tmp_path)
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(file))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", ["a list"])
    with pytest.raises(CheckpointError, match="JSON object"):
        Tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"x": 1}})
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        Tokenizer(tmp_path)


def test_other_threads_run_while_a_long_text_is_encoded(every_kind: dict[str, Tokenizer]) -> None:
    """A server's event loop is such a thread."""
    tokenizer, text = every_kind["json"], "the river runs past " * 60_000
    ids: list[int] = []
    go = threading.Event()

    def encode() -> None:
        go.wait()
        ids.extend(tokenizer.encode(text, add_special_tokens=False))

    thread = threading.Thread(target=encode)
    thread.start()
    ticks = [time.monotonic()]
    go.set()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.monotonic())
    longest = max(later - earlier for earlier, later in itertools.pairwise(ticks))
    assert longest < 0.6 * (ticks[-1] - ticks[0])
    assert tokenizer.decode(ids) == text

"""Small vocabularies of every kind, trained on a few sentences, as files of the formats that models use."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmdeploy.tokenizer.huggingface import byte_level_to_bytes

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times; it's what they'd do.",
    "def add(a, b):\n    return a + b  # 3.14\n\n\nclass Tree:\n\tpass",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "你好，世界！今天天气很好，我们去河边散步吧。日本語のテキスト、カタカナ。",
    "안녕하세요 세계, naïve façade, Größe, ὼώ, नमस्ते दुनिया, العربية",
] * 4

SAMPLES = [
    "",
    " ",
    "a",
    "Hello, world! It's 3.14.\n\n\t2 apples",
    "  two  spaces \r\n",
    "def f(x):\n    return x ** 2\n\n\n",
    "Приве́т, как дела?",
    "你好，世界！这是一个测试。",
    "日本語のテキスト、한국어 텍스트, العربية, नमस्ते, ภาษาไทย",
    "😀👨‍👩‍👧‍👦🇨🇳🏳️‍🌈 🙂🙂",
    "½ ² Ⅷ ٣٤ 12345678901234",
    "\u00a0\u2003\u3000x\u200by\ufeff",
    "<div class='a'>&nbsp;</div> http://a.b/c?d=e&f=%20",
    "ǅ ﬁ ﷺ ʼn 𝐀𝒷𝔠 ქართული",
]


def train_byte_level(pre_tokenizer: Any = None, special: Sequence[str] = (), size: int = 600) -> tokenizers.Tokenizer:
    """Byte-level BPE, GPT-2's unless told otherwise, whose tokens are numbered bytes, merges, special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    return tokenizer


def train_sentencepiece(**options: Any) -> bytes:
    """A SentencePiece BPE model like Llama's: byte fallback, identity normalisation, white space kept."""
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, **{**settings, **options}
    )
    return out.getvalue()


def merges_of(tokenizer: tokenizers.Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def write_gguf(path: Path, tokens: Sequence[str], kinds: Sequence[int], **values: Any) -> Path:
    """A GGUF file of metadata alone. values: keys under `tokenizer.`, dots as double underscores; arrays as lists."""
    writer = gguf.GGUFWriter(str(path), values.pop("architecture", "llama"))
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    for name, value in values.items():
        key = "tokenizer." + name.replace("__", ".")
        add = writer.add_array if isinstance(value, list) else _ADD[type(value)].__get__(writer)
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


_ADD = {
    str: gguf.GGUFWriter.add_string,
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
}


def write_gguf_byte_level(path: Path, tokenizer: tokenizers.Tokenizer, pre: str, **values: Any) -> Path:
    """The GGUF form of a byte-level BPE tokenizer; its added tokens become control tokens."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    added = set(tokenizer.get_added_tokens_decoder())
    kinds = [3 if i in added else 1 for i in range(len(tokens))]
    common = {"ggml__model": "gpt2", "ggml__pre": pre, "ggml__merges": merges_of(tokenizer)}
    return write_gguf(path, tokens, kinds, **{**common, **values})


def write_gguf_sentencepiece(path: Path, model: bytes, **values: Any) -> Path:
    """The GGUF form of a SentencePiece model."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = list(range(sp.get_piece_size()))
    kinds = [_kind(sp, i) for i in ids]
    scores = [float(sp.get_score(i)) for i in ids]
    common = {"ggml__model": "llama", "ggml__scores": scores, "ggml__bos_token_id": 1, "ggml__eos_token_id": 2}
    return write_gguf(path, [sp.id_to_piece(i) for i in ids], kinds, **{**common, **values})


def _kind(sp: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if sp.is_unknown(token_id):
        return 2
    if sp.is_control(token_id):
        return 3
    return 6 if sp.is_byte(token_id) else 1


def write_ranks(path: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    """A tiktoken file of a byte-level BPE tokenizer: the bytes, then the merged tokens in order."""
    ids = tokenizer.get_vocab(with_added_tokens=False)
    tokens = [byte_level_to_bytes(token) for token in sorted(ids, key=ids.__getitem__)]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

"""Vocabularies in a SentencePiece `tokenizer.model` or a tiktoken file, and what such files leave out. It encodes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmdeploy.tokenizer import tiktoken_file
from lmdeploy.tokenizer.added_tokens import AddedToken
from lmdeploy.tokenizer.settings import TokenizerSettings
from lmdeploy.tokenizer.vocabulary import Vocabulary

# ChatGLM2 and 3 number these after the pieces of their SentencePiece model; their files do not list them.
_CHATGLM_MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def load_older_file(file: Path, settings: TokenizerSettings) -> Vocabulary:
    """The vocabulary of a file that is no tokenizer.json; fills in the named tokens that only the file knows."""
    if file.suffix == ".tiktoken" or tiktoken_file.is_tiktoken_file(file):
        vocabulary = tiktoken_file.TiktokenVocabulary(file, settings.config, settings.added_tokens)
        for name, text in (("bos_token", vocabulary.family.bos), ("eos_token", vocabulary.family.eos)):
            if text and name not in settings.named_tokens:
                settings.named_tokens[name] = text
        return vocabulary
    return _load_sentencepiece(file, settings)


def _load_sentencepiece(file: Path, settings: TokenizerSettings) -> Vocabulary:
    from lmdeploy.tokenizer.sentencepiece_model import SentencePieceVocabulary

    model = file.read_bytes()
    vocabulary = SentencePieceVocabulary(model, settings.added_tokens, settings.space_before)
    if settings.config.get("model_type") == "chatglm" or settings.tokenizer_class == "ChatGLMTokenizer":
        marks = _chatglm_tokens(file.parent, vocabulary.piece_count, settings.added_tokens)
        vocabulary = SentencePieceVocabulary(model, [*settings.added_tokens, *marks], settings.space_before)
        vocabulary.prefix_ids = (vocabulary.piece_count + 1, vocabulary.piece_count + 3)  # [gMASK], sop
    for name, text in vocabulary.named_tokens.items():
        settings.named_tokens.setdefault(name, text)
    return vocabulary


def _chatglm_tokens(folder: Path, pieces: int, added: Sequence[AddedToken]) -> list[AddedToken]:
    """ChatGLM2's and 3's special tokens, after so many pieces.

    The two models' configs and vocabularies are the same. ChatGLM3, the one with roles, is told by its added tokens, or by
    its own tokenizer code, which is read as text and never run.
    """
    code = folder / "tokenization_chatglm.py"
    has_roles = any(token.text in _CHATGLM_ROLES for token in added)
    if not has_roles and code.is_file():
        has_roles = _CHATGLM_ROLES[-1] in code.read_text(encoding="utf-8", errors="replace")
    names = _CHATGLM_MARKS + (_CHATGLM_ROLES if has_roles else ())
    return [AddedToken(pieces + i, text) for i, text in enumerate(names)]

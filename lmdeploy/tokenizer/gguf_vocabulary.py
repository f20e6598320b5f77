"""The vocabulary in a GGUF file's metadata, rebuilt for the library that runs its kind. It knows no tensors.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE, whose splitting rule `tokenizer.ggml.pre` names, and "llama" for
SentencePiece BPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import patterns
from lmdeploy.tokenizer.added_tokens import AddedToken
from lmdeploy.tokenizer.huggingface import HuggingFaceVocabulary
from lmdeploy.tokenizer.settings import TokenizerSettings
from lmdeploy.tokenizer.vocabulary import Vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Ends of turns and documents: a file names one or two of them by key and leaves out the rest.
_ENDS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<|call|>")
)


def read_gguf_settings(metadata: Mapping[str, Any]) -> TokenizerSettings:
    """The settings that a folder's JSON files would hold."""
    tokens = metadata.get(_PREFIX + "tokens") or []
    settings = TokenizerSettings()
    settings.config = {"model_type": metadata.get("general.architecture", "")}
    for short, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token_id = metadata.get(f"{_PREFIX}{short}_token_id")
        if isinstance(token_id, int) and token_id < len(tokens):
            settings.named_tokens[name] = tokens[token_id]
            settings.token_ids[name + "_id"] = token_id
    settings.eos_token_ids = [metadata[_PREFIX + key] for key in _END_KEYS if _PREFIX + key in metadata]
    ends = _ENDS - {"<|end|>"} if "<|return|>" in tokens else _ENDS  # gpt-oss ends one message of several with <|end|>
    kinds = metadata.get(_PREFIX + "token_type") or []
    settings.eos_token_ids += [i for i, kind in enumerate(kinds) if kind == _CONTROL and tokens[i] in ends]
    begins = metadata.get(_PREFIX + "model") == "llama" or metadata.get(_PREFIX + "pre") in patterns.WHOLE_PIECE_FIRST
    settings.add_bos = bool(metadata.get(_PREFIX + "add_bos_token", begins))
    settings.add_eos = bool(metadata.get(_PREFIX + "add_eos_token", False))
    stem = "tokenizer.chat_template"
    for key, value in metadata.items():
        if key == stem or key.startswith(stem + "."):
            settings.chat_templates[key[len(stem) + 1 :] or "default"] = value
    return settings


def build_gguf_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of `read_metadata(path)`; raises CheckpointError if it has none or of a kind unknown here."""
    kind = metadata.get(_PREFIX + "model")
    tokens = metadata.get(_PREFIX + "tokens")
    if not tokens:
        raise CheckpointError(f"{path} holds no vocabulary ({_PREFIX}tokens); use a GGUF file of a whole model")
    if kind == "gpt2":
        return _build_byte_level(path, metadata, tokens)
    if kind == "llama":
        return _build_sentencepiece(path, metadata, tokens)
    raise CheckpointError(f"{path} has a vocabulary of kind {kind!r}; 'gpt2' and 'llama' are supported")


def _build_byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> Vocabulary:
    pre = metadata.get(_PREFIX + "pre", "default")
    name = patterns.SPLIT_ALIASES.get(pre, pre)
    if name not in patterns.SPLITS:
        known = sorted([*patterns.SPLITS, *patterns.SPLIT_ALIASES])
        raise CheckpointError(f"{path} splits text by the rule {pre!r}, unknown here; known are {', '.join(known)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get(_PREFIX + "merges") or []]
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in patterns.WHOLE_PIECE_FIRST)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: the vocabulary's merges do not fit its tokens: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in patterns.SPLITS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":  # as in Qwen's own tokenizer; GGUF has no key for it
        tokenizer.normalizer = normalizers.NFC()
    return HuggingFaceVocabulary(tokenizer, _added_tokens(metadata, tokens))


def _build_sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> Vocabulary:
    from lmdeploy.tokenizer.sentencepiece_model import SentencePieceVocabulary, make_bpe_model

    scores = metadata.get(_PREFIX + "scores") or [0.0] * len(tokens)
    kinds = list(metadata.get(_PREFIX + "token_type") or [_NORMAL] * len(tokens))
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(
            f"{path}: {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} types; the file is damaged"
        )
    unknown = metadata.get(_PREFIX + "unknown_token_id", 0)
    # SentencePiece wants exactly one unknown piece.
    kinds = [_UNUSED if kind == _UNKNOWN else kind for kind in kinds]
    kinds[unknown] = _UNKNOWN
    model = make_bpe_model(tokens, scores, kinds, bool(metadata.get(_PREFIX + "add_space_prefix", True)))
    return SentencePieceVocabulary(model, _added_tokens(metadata, tokens))


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> list[AddedToken]:
    """Control tokens, and the user-defined ones where the library does not find them by itself."""
    is_sentencepiece = metadata.get(_PREFIX + "model") == "llama"
    is_phi3 = is_sentencepiece and metadata.get("general.architecture") == "phi3"
    kept = (_CONTROL,) if is_sentencepiece else (_CONTROL, _USER_DEFINED)
    added = []
    for token_id, kind in enumerate(metadata.get(_PREFIX + "token_type") or []):
        if kind in kept:
            text = tokens[token_id]
            # Phi-3's marks swallow the white space after them, for which GGUF has no key.
            swallows = is_phi3 and text.startswith("<|") and text != "<|endoftext|>"
            added.append(AddedToken(token_id, text, special=kind == _CONTROL, rstrip=swallows))
    return added

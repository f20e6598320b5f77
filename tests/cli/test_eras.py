"""Old command lines become today's, with a notice for each change, and today's pass unchanged."""

from __future__ import annotations

import shlex

import pytest

from lmdeploy.cli.eras import modernise
from lmdeploy.cli.main import make_parser

REWRITES = {
    "chat X --tp 1": "chat X --tp 1",
    "chat turbomind X": "chat --backend turbomind X",
    "chat torch X": "chat --backend pytorch X",
    "chat turbomind": "chat turbomind",
    "chat X --session_len 10": "chat X --session-len 10",
    "chat X --session_len=10": "chat X --session-len=10",
    "chat X --model_name qwen-7b": "chat X --chat-template qwen-7b",
    "chat X --model-name=qwen-7b": "chat X --chat-template=qwen-7b",
    "chat --model X --tp 1": "chat X --tp 1",
    "chat --model=X": "chat X",
    "chat X --cap chat": "chat X --capability chat",
    "chat X --meta-instruction 'a --b_c d'": "chat X --system 'a --b_c d'",
    "chat X --meta_instruction=a_b": "chat X --system=a_b",
    "chat X --enable-prefix-caching True": "chat X --enable-prefix-caching",
    "chat X --enable-prefix-caching False": "chat X --no-enable-prefix-caching",
    "chat X --enable_prefix_caching=False": "chat X --no-enable-prefix-caching",
    "chat X --trust-remote-code False": "chat X",
    "chat X --trust_remote_code=true --tp 1": "chat X --trust-remote-code --tp 1",
    "chat X --enable-prefix-caching Y": "chat X --enable-prefix-caching Y",
    "chat X --stream_output True": "chat X",
    "chat X -- --model_name": "chat X -- --model_name",
    "bench latency X --batch_size 4 --json True": "bench latency X --batch-size 4 --json",
    "list --json=False": "list",
    "check_env --dump_file a_b.json": "check_env --dump-file a_b.json",
    "no-such-command --a_b True": "no-such-command --a-b True",
    "": "",
}


@pytest.mark.parametrize("old", REWRITES)
def test_rewrites(old: str) -> None:
    arguments, notices = modernise(shlex.split(old), make_parser())
    assert arguments == shlex.split(REWRITES[old])
    assert bool(notices) == (old != REWRITES[old])


def test_notices_name_both_spellings() -> None:
    line = "chat turbomind X --model_name qwen-7b --enable-prefix-caching False --session_id 1 --model Y"
    _, notices = modernise(shlex.split(line), make_parser())
    assert notices == [
        "`chat turbomind` is now written `chat --backend turbomind`",
        "`--model_name` is now written `--chat-template`",
        "`--enable-prefix-caching False` is now written `--no-enable-prefix-caching`",
        "`--session_id` is ignored: one chat is one session",
        "`--model X` is now written `X`",
    ]

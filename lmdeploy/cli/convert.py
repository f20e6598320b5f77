"""`lmdeploy convert`: writes a model as a workspace, the folder of LMDeploy 0.x. The work is in lmdeploy/lite/convert.py."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lmdeploy.cli.flags import warn_remote_code
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError

HELP = "write a workspace, whose settings are in a config.ini"
DESCRIPTION = """Write a model as a workspace, the folder that older versions ran.

No command needs one: chat and serve take the model itself. A workspace keeps its chat template and engine settings in
triton_models/weights/config.ini, where they can be edited.
"""
_FORMATS = ("hf", "llama", "qwen", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4")


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "name", nargs="?", metavar="MODEL_NAME", help="chat template, by name (`lmdeploy list`); hf: the model's own"
    )
    parser.add_argument(
        "path", nargs="?", metavar="MODEL_PATH", help="folder, .gguf file or hub id; left out: the built-in model"
    )
    parser.add_argument("--dst-path", default="workspace", metavar="FOLDER", help="result (default: %(default)s)")
    parser.add_argument("--model-format", choices=_FORMATS, help="format of the weights; found out by default")
    parser.add_argument(
        "--group-size", type=int, default=0, metavar="N", help="weights with one scale; found out by default"
    )
    parser.add_argument("--tokenizer-path", metavar="PATH", help="tokenizer, where MODEL_PATH has none or another")
    parser.add_argument("--chat-template", metavar="NAME", help="outranks MODEL_NAME, which may then be anything")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16"),
        default="auto",
        help="what to compute in, and to store a GGUF file's weights in (default: auto)",
    )
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="accepted; weights are split when they are loaded"
    )
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on a hub")
    parser.add_argument("--download-dir", metavar="FOLDER", help="where models from a hub are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="accepted; no model's own code is run")
    old = parser.add_argument_group("arguments by name, as version 0.1 took them")
    old.add_argument("--model-name", metavar="NAME", help="the same as MODEL_NAME")
    old.add_argument("--model-path", metavar="MODEL", help="the same as MODEL_PATH")
    old.add_argument("--quant-path", metavar="FOLDER", help="refused: give quantized weights as MODEL_PATH")


def run(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    name, path = name_and_path(args)
    if args.quant_path not in (None, "None"):
        raise ConfigError(f"--quant-path {args.quant_path}: give the folder with the quantized weights as MODEL_PATH")
    if args.tp < 1:
        raise ConfigError(f"--tp {args.tp}: give a number of GPUs of at least 1")
    if args.tp > 1:
        tell(f"--tp {args.tp} changes nothing: weights are split when they are loaded; give it to that command")
    from lmdeploy import hub
    from lmdeploy.lite.convert import ConvertSettings, convert
    from lmdeploy.workspace_settings import check_template_name

    check_template_name(args.chat_template or name)  # before anything is fetched
    settings = ConvertSettings(
        model_name=args.chat_template or name,
        dst_path=Path(args.dst_path),
        model_format=args.model_format,
        group_size=args.group_size,
        tokenizer_path=None if args.tokenizer_path is None else Path(os.path.expanduser(args.tokenizer_path)),
        dtype=args.dtype,
    )
    convert(hub.resolve(path, revision=args.revision, download_dir=args.download_dir), settings, tell)
    tell(f"{args.dst_path} is written; its settings are in {args.dst_path}/triton_models/weights/config.ini")
    tell(f"Next: lmdeploy chat {args.dst_path}")
    return 0


def name_and_path(args: argparse.Namespace) -> tuple[str, str | None]:
    """MODEL_NAME and MODEL_PATH, each by its place or by its name. Raises ConfigError."""
    words = [word for word in (args.name, args.path) if word is not None]
    name = args.model_name or (words.pop(0) if words else args.chat_template)
    path = args.model_path or (words.pop(0) if words else None)
    if words:
        raise ConfigError(f"{words[0]!r} is one argument too many: give a MODEL_NAME and a MODEL_PATH, each once")
    if name is None:
        raise ConfigError("MODEL_NAME is missing; it names the chat template: lmdeploy convert internlm2 MODEL_PATH")
    return name, path


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""`lmdeploy lite`: quantizes a model, and compares two. The work is in lmdeploy/lite, imported when a command runs."""

from __future__ import annotations

import argparse
import json
import sys

from lmdeploy.cli.flags import warn_remote_code
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError

HELP = "quantize a model, compare it with the original"
_AWQ = """Quantize a 16-bit model to 4-bit weights in AWQ's format, layer by layer, and say what it cost.

Without a data set at hand the model writes its own calibration text. An interrupted run goes on when it is started again.
"""
_EVALUATE = (
    "Compare the predictions of model B with those of model A on a text: perplexity, KL divergence, top-1 agreement."
)


def add_arguments(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="lite_command", metavar="COMMAND")
    awq = commands.add_parser("auto_awq", help="4-bit weights in AWQ's format", description=_AWQ)
    _add_awq(awq)
    evaluate = commands.add_parser("evaluate", help="compare two models on a text", description=_EVALUATE)
    _add_evaluate(evaluate)
    parser.set_defaults(lite_parser=parser)


def run(args: argparse.Namespace) -> int:
    if args.lite_command is None:
        args.lite_parser.print_help()
        return 0
    return _run_awq(args) if args.lite_command == "auto_awq" else _run_evaluate(args)


def _add_awq(parser: Parser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, .gguf file or hub id; left out: the built-in model"
    )
    parser.add_argument("--work-dir", default="./work_dir", metavar="FOLDER", help="result (default: %(default)s)")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib-dataset",
        default="wikitext2",
        metavar="TEXT",
        help="a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, wikitext2, c4, ptb, pileval, gsm8k, or self: the "
        "model's own text, which is also used when a named set cannot be fetched (default: %(default)s)",
    )
    for name, default, text in (
        ("--calib-samples", 128, "windows"),
        ("--calib-seqlen", 2048, "tokens of a window"),
        ("--batch-size", 1, "least number of windows computed together"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    group = parser.add_argument_group("weights")
    group.add_argument("--w-bits", type=int, default=4, metavar="4", help="bits of a weight (default: 4)")
    group.add_argument(
        "--w-group-size",
        type=int,
        default=128,
        metavar="N",
        help="weights with one scale: 32, 64, 128 (default: 128)",
    )
    group.add_argument("--w-sym", action=argparse.BooleanOptionalAction, default=False, help="no zero points")
    group.add_argument(
        "--search",
        choices=("none", "awq", "best"),
        help="none: LMDeploy's fixed scales; awq: scales and clipping by search; best: also GPTQ rounding (default: best)",
    )
    group.add_argument(
        "--search-scale",
        nargs="?",
        const="true",
        metavar="BOOL",
        help="older spelling: true is --search awq, false --search none",
    )
    group.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16"), default="auto", help="of what stays in 16 bits"
    )
    _add_common(parser)
    parser.add_argument("--no-samples", dest="samples", action="store_false", help="no sample answers in the report")


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("model", metavar="A", help="the original")
    parser.add_argument("other", metavar="B", help="the model to judge")
    parser.add_argument("--dataset", required=True, metavar="TEXT", help="as --calib-dataset of auto_awq")
    parser.add_argument(
        "--samples", type=int, default=4, metavar="N", help="windows from the text's beginning (default: 4)"
    )
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens of a window (default: 2048)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_common(parser)


def _add_common(parser: Parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on a hub")
    parser.add_argument("--download-dir", metavar="FOLDER", help="where models from a hub are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="accepted; no model's own code is run")


def _run_awq(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    search = _search(args)
    from pathlib import Path

    from lmdeploy import hub
    from lmdeploy.lite.auto_awq import Settings, auto_awq

    names = (
        "calib_dataset",
        "calib_samples",
        "calib_seqlen",
        "batch_size",
        "w_bits",
        "w_group_size",
        "w_sym",
        "dtype",
        "samples",
    )
    values = {name: getattr(args, name) for name in names}
    settings = Settings(work_dir=Path(args.work_dir), search=search, device=_device(args), **values)
    auto_awq(hub.resolve(args.model, revision=args.revision, download_dir=args.download_dir), settings, tell)
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    import torch

    from lmdeploy import hub
    from lmdeploy.lite.auto_awq import progress_bar
    from lmdeploy.lite.calibration_data import NotAvailable, first_windows, read_texts
    from lmdeploy.lite.compare import compare_models, num_steps
    from lmdeploy.lite.report import format_quality, quality
    from lmdeploy.lite.stream import LayerStream
    from lmdeploy.tokenizer import Tokenizer

    first, second = (
        hub.resolve(m, revision=args.revision, download_dir=args.download_dir) for m in (args.model, args.other)
    )
    try:
        windows = first_windows(read_texts(args.dataset), Tokenizer(first), args.samples, args.seqlen)
    except NotAvailable as reason:
        raise ConfigError(f"--dataset {args.dataset}: {reason}; give a local file") from reason
    stream = LayerStream(first, torch.device("cpu"))
    with progress_bar("comparing", num_steps(stream.num_layers)) as advance:
        comparison = compare_models(first, second, windows, torch.device(_device(args)), advance)
    figures = quality(comparison, second, stream.num_parameters(), "")
    del figures["calib"]
    print(json.dumps(figures) if args.json else format_quality(figures, comparison.num_scored))
    return 0


def _search(args: argparse.Namespace) -> str:
    """--search, or what --search-scale said in its time: a flag, or a word that is true or false."""
    word = args.search_scale
    if word is not None and word.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"--search-scale {word!r}: write true or false, or better --search none, awq or best")
    if args.search is not None or word is None:
        return args.search or "best"
    return "awq" if word.lower() in ("true", "1") else "none"


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that torch can use; leave it out or say --device cpu")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

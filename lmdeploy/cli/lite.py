"""`lmdeploy lite`: quantizes a model, and compares two. The work is in lmdeploy/lite, imported when a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lmdeploy.cli.flags import warn_remote_code
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError

HELP = "quantize a model, compare it with the original"
_RESUMES = """
Without a data set at hand the model writes its own calibration text. An interrupted run goes on when it is started again.
"""
_AWQ = "Quantize a 16-bit model to 4-bit weights in AWQ's format, layer by layer, and say what it cost.\n" + _RESUMES
_GPTQ = (
    "Quantize a 16-bit model to 4- or 8-bit weights in GPTQ's format, layer by layer, and say what it cost.\n"
    + _RESUMES
)
_SMOOTH = """Quantize a 16-bit model to 8-bit weights as SmoothQuant does, layer by layer, and say what it cost.

int8 weights are multiplied by activations that are rounded to int8 per token; of 8-bit floats only the weights are rounded.
"""
_CALIBRATE = """Write the ranges and means of a model's activations, keys and values, as the files of LMDeploy 0.1 to 0.3.

auto_awq, auto_gptq and smooth_quant calibrate themselves and need no such files; kv_qparams reads them.
"""
_KV = """Write the scales of an int8 KV cache beside a workspace's weights, as LMDeploy 0.1 did.

Such files say that the workspace's `quant_policy = 4` means int8. The cache is quantized as it is written, so that models from
any other folder need only --quant-policy 8.
"""
_EVALUATE = (
    "Compare the predictions of model B with those of model A on a text: perplexity, KL divergence, top-1 agreement."
)


def add_arguments(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="lite_command", metavar="COMMAND")
    for name, add, text, description in (
        ("auto_awq", _add_awq, "4-bit weights in AWQ's format", _AWQ),
        ("auto_gptq", _add_gptq, "4- or 8-bit weights in GPTQ's format", _GPTQ),
        ("smooth_quant", _add_smooth_quant, "8-bit weights and activations", _SMOOTH),
        ("calibrate", _add_calibrate, "statistics of activations, keys and values", _CALIBRATE),
        ("kv_qparams", _add_kv_qparams, "scale files of an int8 KV cache for a workspace", _KV),
        ("evaluate", _add_evaluate, "compare two models on a text", _EVALUATE),
    ):
        add(commands.add_parser(name, help=text, description=description))
    parser.set_defaults(lite_parser=parser)


def run(args: argparse.Namespace) -> int:
    if args.lite_command is None:
        args.lite_parser.print_help()
        return 0
    runs = {"calibrate": _run_calibrate, "kv_qparams": _run_kv_qparams, "evaluate": _run_evaluate}
    return runs.get(args.lite_command, _run_quantize)(args)


# ---- flags ----


def _add_awq(parser: Parser) -> None:
    _add_model(parser)
    _add_calibration(parser)
    group = _add_weights(parser, "4", is_symmetric=False)
    group.add_argument(
        "--search",
        choices=("none", "awq", "best"),
        help="none: LMDeploy's fixed scales; awq: scales and clipping by search; best: also GPTQ rounding (default: best)",
    )
    _add_search_scale(group, "older spelling: true is --search awq, false --search none")
    _add_dtype(group)
    _add_report(parser)


def _add_gptq(parser: Parser) -> None:
    _add_model(parser)
    _add_calibration(parser)
    _add_dtype(_add_weights(parser, "4|8", is_symmetric=True))
    _add_report(parser)


def _add_smooth_quant(parser: Parser) -> None:
    _add_model(parser)
    _add_calibration(parser)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--quant-dtype",
        default="int8",
        choices=("int8", "fp8", "float8_e4m3fn", "float8_e5m2"),
        help="fp8 is float8_e4m3fn (default: %(default)s)",
    )
    _add_search_scale(group, "false: the fixed exponent of one half (default: true)")
    _add_dtype(group)
    _add_report(parser)


def _add_calibrate(parser: Parser) -> None:
    _add_model(parser)
    group = _add_calibration(parser, blind=False)
    _add_search_scale(group, "accepted; statistics do not depend on it")
    group.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16"), default="auto", help="accepted; runs in float32"
    )
    _add_common(parser)


def _add_kv_qparams(parser: Parser) -> None:
    for name, text in (("work-dir", "what `lite calibrate` wrote"), ("turbomind-dir", "weights of a workspace")):
        stem = name.replace("-", "_")
        parser.add_argument(stem, nargs="?", metavar=stem.upper(), help=text)
        parser.add_argument(f"--{name}", dest=f"{stem}_option", metavar="FOLDER", help=f"the same as {stem.upper()}")
    parser.add_argument("--kv-bits", type=int, default=8, metavar="8", help="bits of a number (default: 8)")
    parser.add_argument("--kv-sym", action=argparse.BooleanOptionalAction, default=False, help="no zero points")
    parser.add_argument("--num-tp", type=int, default=1, metavar="N", help="GPUs that share the heads (default: 1)")
    parser.add_argument(
        "--tm-params", nargs="*", metavar="NAME", help="accepted; the files' names follow from the layers"
    )


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


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, .gguf file or hub id; left out: the built-in model"
    )
    parser.add_argument("--work-dir", default="./work_dir", metavar="FOLDER", help="result (default: %(default)s)")


def _add_calibration(parser: Parser, *, blind: bool = True) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib-dataset",
        default="wikitext2",
        metavar="TEXT",
        help="a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, wikitext2, c4, ptb, pileval, gsm8k, "
        "neuralmagic_calibration, open-platypus, openwebtext, or self: the model's own text, which is also used when a named "
        "set cannot be fetched (default: %(default)s)",
    )
    windows = "windows; 0: round the weights without any text" if blind else "windows"
    for name, default, text in (
        ("--calib-samples", 128, windows),
        ("--calib-seqlen", 2048, "tokens of a window"),
        ("--batch-size", 1, "least number of windows computed together"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    return group


def _add_weights(parser: Parser, bits: str, *, is_symmetric: bool) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("weights")
    group.add_argument("--w-bits", type=int, default=4, metavar=bits, help="bits of a weight (default: 4)")
    group.add_argument(
        "--w-group-size",
        type=int,
        default=128,
        metavar="N",
        help="weights with one scale: 32, 64, 128 (default: 128)",
    )
    default = f"no zero points (default: {'yes' if is_symmetric else 'no'})"
    group.add_argument("--w-sym", action=argparse.BooleanOptionalAction, default=is_symmetric, help=default)
    return group


def _add_search_scale(group: argparse._ArgumentGroup, text: str) -> None:
    group.add_argument("--search-scale", nargs="?", const="true", metavar="BOOL", help=text)


def _add_dtype(group: argparse._ArgumentGroup) -> None:
    choices = ("auto", "float16", "bfloat16")
    group.add_argument("--dtype", choices=choices, default="auto", help="of what stays in 16 bits")


def _add_report(parser: Parser) -> None:
    _add_common(parser)
    parser.add_argument("--no-samples", dest="samples", action="store_false", help="no sample answers in the report")


def _add_common(parser: Parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on a hub")
    parser.add_argument("--download-dir", metavar="FOLDER", help="where models from a hub are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="accepted; no model's own code is run")


# ---- runs ----


def _run_quantize(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    search = _search(args)
    from lmdeploy import hub
    from lmdeploy.lite.quantize import quantize_model
    from lmdeploy.lite.settings import Settings

    names = ("w_bits", "w_group_size", "w_sym", "quant_dtype", "dtype", "samples")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings = Settings(**_calibration(args), command=args.lite_command, search=search, **values)
    model = hub.resolve(args.model, revision=args.revision, download_dir=args.download_dir)
    quantize_model(model, settings, tell)
    return 0


def _run_calibrate(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    _truth(args.search_scale)
    from lmdeploy import hub
    from lmdeploy.lite.calibrate import calibrate
    from lmdeploy.lite.settings import CalibrationSettings

    settings = CalibrationSettings(**_calibration(args))
    calibrate(hub.resolve(args.model, revision=args.revision, download_dir=args.download_dir), settings, tell)
    return 0


def _calibration(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    names = ("calib_dataset", "calib_samples", "calib_seqlen", "batch_size")
    return {
        "work_dir": Path(args.work_dir),
        "device": _device(args),
        **{name: getattr(args, name) for name in names},
    }


def _run_kv_qparams(args: argparse.Namespace) -> int:
    from pathlib import Path

    from lmdeploy.lite.kv_qparams import KvSettings, write_kv_scales
    from lmdeploy.workspace import CONFIG

    folders = [args.work_dir_option, args.turbomind_dir_option]
    given = [name for name in (args.work_dir, args.turbomind_dir) if name is not None]
    folders = [given.pop(0) if folder is None and given else folder for folder in folders]
    if None in folders or given:
        raise ConfigError(
            "give two folders: WORK_DIR, which `lite calibrate` wrote, and TURBOMIND_DIR, a workspace's weights"
        )
    work_dir, turbomind_dir = map(Path, folders)
    files = write_kv_scales(KvSettings(work_dir, turbomind_dir, args.kv_bits, args.kv_sym, args.num_tp))
    tell(f"{len(files)} files of KV scales written to {turbomind_dir}")
    if not (turbomind_dir / CONFIG).exists():
        tell(f"nothing reads them there: {turbomind_dir} has no {CONFIG}, as WORKSPACE/triton_models/weights has")
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    import torch

    from lmdeploy import hub
    from lmdeploy.lite.bar import progress_bar
    from lmdeploy.lite.calibration_data import SELF, NotAvailable, first_windows, read_texts
    from lmdeploy.lite.compare import compare_models, num_steps
    from lmdeploy.lite.report import format_quality, quality
    from lmdeploy.lite.stream import LayerStream
    from lmdeploy.tokenizer import Tokenizer

    if args.dataset == SELF:
        raise ConfigError("--dataset self: models are compared on a text of others; give a file or a named set")
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
    is_searched = _truth(getattr(args, "search_scale", None))
    search = getattr(args, "search", None)
    if search is not None or is_searched is None:
        return search or "best"
    searched = "awq" if args.lite_command == "auto_awq" else "best"
    return searched if is_searched else "none"


def _truth(word: str | None) -> bool | None:
    if word is None:
        return None
    if word.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"--search-scale {word!r}: write true or false")
    return word.lower() in ("true", "1")


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that torch can use; leave it out or say --device cpu")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

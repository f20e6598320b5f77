"""`lmdeploy bench`: measures an engine and prints the figures beside what the machine's memory would allow."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lmdeploy.cli import bench_serve
from lmdeploy.cli.flags import add_engine_flags, add_model_argument, engine_settings, warn_remote_code
from lmdeploy.cli.parser import Parser
from lmdeploy.messages import TurbomindEngineConfig

if TYPE_CHECKING:
    from pathlib import Path

    from lmdeploy.engine.client import ThreadClient
    from lmdeploy.engine.config import EngineConfig

HELP = "measure speed"
DESCRIPTION = """Measure an engine with random token ids, greedy, end tokens ignored, prefix caching off.

Figures are medians over the repeats, after one run that warms up. The floor is what reading the weights and the KV cache
once per step would allow at this machine's measured memory bandwidth. Session length, batch and KV cache are made to hold
the measurement and no more, unless flags say otherwise.
"""
MODES = {
    "latency": "one request alone, and a batch while it decodes",
    "throughput": "the same, and the whole run of a batch, prefill included",
}


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    for mode, help_text in MODES.items():
        _add_mode(modes.add_parser(mode, help=help_text, description=DESCRIPTION))
    bench_serve.add_arguments(modes.add_parser("serve", help=bench_serve.HELP))


def _add_mode(parser: Parser) -> None:
    add_model_argument(parser)
    group = parser.add_argument_group("measurement")
    for name, default, help_text in (
        ("--batch-size", 8, "requests of the batch"),
        ("--prompt-tokens", 512, "tokens of each prompt"),
        ("--output-tokens", 128, "tokens of each answer, at least 2"),
        ("--repeats", 3, "measured runs"),
    ):
        minimum = 2 if name == "--output-tokens" else 1
        group.add_argument(
            name, type=_at_least(minimum), default=default, metavar="N", help=f"{help_text} (default: {default})"
        )
    group.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument(
        "--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights, from config.json alone"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    group.add_argument(
        "--profile", action="store_true", help="afterwards profile a prefill and 16 decode steps, on stderr"
    )
    group.add_argument("--quant", metavar="FORMAT", help="4-bit random weights: awq or gptq (with a shape's name)")
    group.add_argument("--kv", metavar="FORMAT", help="KV cache: int8, int4, k8v4, fp8 (as --quant-policy)")
    group.add_argument(
        "--preset", choices=("h100-table",), help="a fixed table of measurements of the shape MODEL, beside its peers"
    )
    group.add_argument("--only", metavar="SETTING", help="of the preset one setting, such as 'AWQ + KV int8'")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.mode == "serve":
        return bench_serve.run(args)
    warn_remote_code(args, tell)
    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported: its pools are made then

    from lmdeploy import hub
    from lmdeploy.bench.shapes import SHAPES, shape_folder, shape_overrides
    from lmdeploy.engine.client import ThreadClient
    from lmdeploy.engine.config import EngineConfig

    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    if args.kv is not None:
        args.quant_policy = args.kv
    if args.preset is not None:
        return _run_preset(args)
    is_shape = args.model in SHAPES and not os.path.exists(args.model)
    if is_shape or args.quant is not None:
        args.load_format = "dummy"
    public, overrides = engine_settings(args)
    settings = {**_just_enough(args), **overrides}
    if args.quant is not None:
        settings["hf_overrides"] = {**(public.hf_overrides or {}), **(shape_overrides(args.quant) or {})}
    config = EngineConfig.from_public(public, **settings)
    if is_shape:
        path = shape_folder(args.model)
    else:
        path = hub.resolve(args.model, revision=public.revision, download_dir=public.download_dir)
    if (path / "config.ini").exists():
        from lmdeploy.workspace_settings import with_engine_settings

        config = with_engine_settings(path, config)
    tell(f"loading {path}")
    client = ThreadClient(path, config)
    try:
        figures = _measure(args, client, path, config)
    finally:
        client.close()
    print(json.dumps(figures) if args.json else format_figures(figures), flush=True)
    if args.profile:
        from lmdeploy.bench.profiling import profile_engine

        tell(profile_engine(path, config, args.prompt_tokens, args.batch_size))
    return 0


def _run_preset(args: argparse.Namespace) -> int:
    import torch

    from lmdeploy.bench.preset import PEERS, format_table, h100_table
    from lmdeploy.errors import ConfigError

    if args.model not in PEERS:
        raise ConfigError(f"--preset {args.preset} measures the shapes {', '.join(PEERS)}, not {args.model!r}")
    if not torch.cuda.is_available():
        raise ConfigError(f"--preset {args.preset} needs a CUDA device; torch sees none")
    table = h100_table(args.model, tell, args.only)
    print(json.dumps(table) if args.json else format_table(table), flush=True)
    return 0


def _just_enough(args: argparse.Namespace) -> dict[str, Any]:
    """Engine settings that hold the batch and no more, so that memory is that of the measurement; flags outrank them."""
    tokens = args.prompt_tokens + args.output_tokens
    block_size = getattr(args, "cache_block_seq_len", TurbomindEngineConfig().cache_block_seq_len)
    settings = {
        "session_len": tokens,
        "max_batch_size": args.batch_size,
        # One block a request beside its own: the scheduler keeps it free for those that run.
        "cache_max_entry_count": args.batch_size * (-(-tokens // block_size) + 1) + 1,
    }
    return {
        "empty_init": args.load_format == "dummy",
        **{name: value for name, value in settings.items() if not hasattr(args, name)},
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(args: argparse.Namespace, client: ThreadClient, path: Path, config: EngineConfig) -> dict[str, Any]:
    """All figures and settings, flat, by the names that --json prints."""
    import torch

    from lmdeploy.bench.latency import measure_latency
    from lmdeploy.bench.process_memory import peak_rss_bytes
    from lmdeploy.bench.roofline import decode_floor, measure_read_bandwidth
    from lmdeploy.bench.throughput import measure_throughput
    from lmdeploy.models.config import load_config

    sizes = (args.prompt_tokens, args.output_tokens, args.repeats)
    latency = measure_latency(client, *sizes, tell)
    throughput = measure_throughput(client, *sizes, tell, batch_size=args.batch_size)
    peak = peak_rss_bytes()  # before the bandwidth's buffer
    info = client.info
    model, bandwidth = load_config(path, config.hf_overrides), measure_read_bandwidth(torch.device(info.device))
    floor = decode_floor(model, info, config.quant_policy, bandwidth, is_gguf=path.is_file())
    context = args.prompt_tokens + args.output_tokens / 2
    single, batch = floor.tokens_per_s(1, context), floor.tokens_per_s(args.batch_size, context)
    figures = {**asdict(latency), **asdict(throughput)}
    if args.mode == "latency":
        for name in ("output_tok_s", "total_tok_s"):
            del figures[name]
    return {
        "mode": args.mode,
        **figures,
        "floor_tok_s": single,
        "batch_floor_tok_s": batch,
        "decode_of_floor": latency.decode_tok_s / single,
        "batch_of_floor": throughput.batch_tok_s / batch,
        "read_bandwidth_bytes_s": floor.bandwidth,
        "weight_bytes": floor.weight_bytes,
        "kv_bytes_per_token": floor.kv_bytes_per_token,
        "load_s": info.load_s,
        "peak_rss_bytes": peak,
        **_settings(args, client, path, torch.get_num_threads()),
    }


def _settings(args: argparse.Namespace, client: ThreadClient, path: Path, threads: int) -> dict[str, Any]:
    info = client.info
    names = ("batch_size", "prompt_tokens", "output_tokens", "repeats", "load_format")
    return {
        "model": str(path),
        "architecture": info.architecture,
        "dtype": info.dtype,
        "device": info.device,
        "threads": threads,
        "session_len": info.session_len,
        "max_batch_size": info.max_batch_size,
        "block_size": info.block_size,
        **{name: getattr(args, name) for name in names},
    }


def format_figures(figures: dict[str, Any]) -> str:
    """The figures as lines of text, each rate beside its floor."""
    f = figures
    rows = [
        (
            "prefill",
            f"{f['prefill_tok_s']:.1f} tok/s",
            f"{f['prompt_tokens']} tokens, first token after {f['ttft_s']:.3f} s",
        ),
        (
            "decode, batch 1",
            f"{f['decode_tok_s']:.1f} tok/s",
            f"{f['decode_of_floor']:.0%} of the floor {f['floor_tok_s']:.1f} tok/s; "
            f"between tokens {f['token_p50_s'] * 1e3:.1f} ms, 99 % {f['token_p99_s'] * 1e3:.1f} ms",
        ),
        (
            f"decode, batch {f['batch_size']}",
            f"{f['batch_tok_s']:.1f} tok/s",
            f"{f['batch_of_floor']:.0%} of the floor {f['batch_floor_tok_s']:.1f} tok/s",
        ),
    ]
    if "output_tok_s" in f:
        both = f"output tokens; {f['total_tok_s']:.1f} with the prompts; first tokens after {f['batch_ttft_s']:.3f} s"
        rows.append((f"whole run, batch {f['batch_size']}", f"{f['output_tok_s']:.1f} tok/s", both))
    rows += [
        ("load", f"{f['load_s']:.2f} s", ""),
        ("peak memory", f"{f['peak_rss_bytes'] / 2**20:.0f} MiB", "of this process"),
        (
            "floor",
            f"{f['read_bandwidth_bytes_s'] / 1e9:.1f} GB/s",
            f"over {f['weight_bytes'] / 2**20:.1f} MiB of weights and {f['kv_bytes_per_token']} bytes of KV a token",
        ),
    ]
    head = f"{f['model']}: {f['architecture']}, {f['dtype']} on {f['device']}, {f['threads']} threads"
    return "\n".join([head, *(f"  {name:<20} {value:>14}   {note}".rstrip() for name, value, note in rows)])


def _at_least(minimum: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse

"""`lmdeploy bench serve URL [URL2]`: load on running servers, and how they bear it. It knows no statistics."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy import env
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.bench.serving import Load, Measurement
    from lmdeploy.bench.serving_load import Target
    from lmdeploy.bench.serving_prompts import Ask

HELP = "load on a running server, or on two by turns"
DESCRIPTION = """Put load on a server with the interface of OpenAI, LMDeploy's or any other; two are measured by turns.

--request-rate: an open loop, requests come at random times (Poisson) whatever the server does. --concurrency: a closed loop,
so many clients that ask again once they are answered. Answers are streamed. TTFT: time to first token; TPOT: time per output
token; ITL: between two pieces of text; E2E: of the whole request. Goodput: requests a second that keep --slo.
"""
_DATASETS = {"random": (512, 128), "sharegpt": (160, 340)}  # tokens of prompt and answer
_DEFAULT_CONCURRENCY = 32


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "urls", nargs="+", metavar="URL", help="such as http://127.0.0.1:23333; a second one to compare"
    )
    _add_load_flags(parser)
    _add_request_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    group.add_argument("--plot", metavar="FILE.png", help="draw the latencies (needs matplotlib)")


def _add_load_flags(parser: Parser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--request-rate", type=_positive_float, metavar="R", help="requests a second, an open loop")
    group.add_argument(
        "--concurrency", type=_positive, metavar="N", help=f"clients, a closed loop (default: {_DEFAULT_CONCURRENCY})"
    )
    group.add_argument(
        "--num-prompts", type=_positive, default=200, metavar="N", help="requests of a round (default: 200)"
    )
    group.add_argument(
        "--rounds", type=_positive, metavar="N", help="of --num-prompts each (default: 1; with two servers 3)"
    )
    group.add_argument(
        "--warmup", type=_at_least_0, default=1, metavar="N", help="requests that do not count (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and times (default: 0)")
    group.add_argument("--slo", metavar="LIMITS", help="such as ttft=500ms,tpot=50ms,e2e=10s: count what keeps it")


def _add_request_flags(parser: Parser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset", default="random", metavar="NAME",
        help="random: prompts of one length; sharegpt: lengths spread as in chats; or a file: ShareGPT's JSON, or lines of "
        "JSON with `prompt` or `messages` (default: random)",
    )  # fmt: skip
    group.add_argument(
        "--prompt-tokens", type=_positive, metavar="N", help="of a prompt, on average (default: 512; sharegpt: 160)"
    )
    group.add_argument(
        "--output-tokens", type=_positive, metavar="N",
        help="of an answer, on average (default: 128; sharegpt: 340; a file: as it says)",
    )  # fmt: skip
    group.add_argument(
        "--endpoint", choices=("chat", "completions"), default="chat", help="/v1/chat/completions or /v1/completions"
    )
    group.add_argument("--model-name", metavar="NAME", help="which of the server's models (default: its first)")
    group.add_argument(
        "--api-key", metavar="KEY", help="the servers' key (default: the environment variable LMDEPLOY_API_KEY)"
    )
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="send ignore_eos, so that answers have their length; OpenAI itself refuses it (default: True)",
    )  # fmt: skip
    group.add_argument("--extra-body", metavar="JSON", help='more fields of every request, such as {"temperature": 0}')
    group.add_argument(
        "--timeout", type=_positive_float, default=600.0, metavar="S", help="seconds of a request (default: 600)"
    )


def run(args: argparse.Namespace) -> int:
    from lmdeploy.bench.serving import measure
    from lmdeploy.bench.serving_figures import parse_slo

    if len(args.urls) > 2:
        raise ConfigError(f"{len(args.urls)} addresses: give one server, or two to compare")
    if args.request_rate is not None and args.concurrency is not None:
        raise ConfigError("give --request-rate (an open loop) or --concurrency (a closed one), not both")
    slo = None if args.slo is None else parse_slo(args.slo)
    load = _load(args, slo)
    make_asks = _make_asks(args)
    make_asks(random.Random(0))  # a file that cannot be read is told before a server is asked
    measurement = asyncio.run(_measure(args, measure, make_asks, load))
    result = _result(args, load, measurement)
    print(json.dumps(result) if args.json else format_result(result), flush=True)
    if args.plot is not None:
        _plot(Path(args.plot), args.urls, measurement)
    return 0 if all(figures["completed"] for figures in measurement.figures) else 1


async def _measure(args: argparse.Namespace, measure: Any, make_asks: Any, load: Load) -> Measurement:
    targets = [await _target(args, url) for url in args.urls]
    result: Measurement = await measure(targets, make_asks, load, tell)
    return result


async def _target(args: argparse.Namespace, url: str) -> Target:
    from lmdeploy.bench.serving_load import Target, served_model

    key = args.api_key or env.api_key()
    model = args.model_name or await served_model(url, key)
    more = {**({"ignore_eos": True} if args.ignore_eos else {}), **_extra_body(args.extra_body)}
    return Target(url, model, args.endpoint, key, more, args.timeout)


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra-body {text!r} is no JSON object")
    return fields


def _load(args: argparse.Namespace, slo: dict[str, float] | None) -> Load:
    from lmdeploy.bench.serving import Load

    rounds = args.rounds or (3 if len(args.urls) == 2 else 1)
    return Load(args.request_rate, args.concurrency or _DEFAULT_CONCURRENCY, rounds, args.warmup, args.seed, slo)


def _make_asks(args: argparse.Namespace) -> Any:
    from lmdeploy.bench.serving_prompts import chat_like_asks, file_asks, random_asks

    prompt_tokens, output_tokens = _DATASETS.get(args.dataset, (0, 0))
    sizes = args.num_prompts, args.prompt_tokens or prompt_tokens, args.output_tokens or output_tokens

    def make(generator: random.Random) -> list[Ask]:
        if args.dataset == "random":
            return random_asks(*sizes, generator)
        if args.dataset == "sharegpt":
            return chat_like_asks(*sizes, generator)
        return file_asks(Path(args.dataset), args.num_prompts, args.output_tokens, generator)

    return make


def _result(args: argparse.Namespace, load: Load, measurement: Measurement) -> dict[str, Any]:
    """All figures and settings, by the names that --json prints."""
    names = ("dataset", "num_prompts", "endpoint", "request_rate")
    return {
        "mode": "serve",
        "servers": [{"url": url, **own} for url, own in zip(args.urls, measurement.figures, strict=True)],
        "ratios": measurement.ratios,
        **{name: getattr(args, name) for name in names},
        "concurrency": None if load.rate is not None else load.concurrency,
        "rounds": load.rounds,
        "seed": load.seed,
    }


def format_result(result: dict[str, Any]) -> str:
    """The figures as lines of text; where two servers are compared, their ratios below."""
    lines = [line for figures in result["servers"] for line in _server_lines(figures)]
    if result["ratios"]:
        first, second = (figures["url"] for figures in result["servers"])
        lines.append(f"{second} / {first}, ratios of medians (least and most of {result['rounds']} rounds)")
        for name, ratio in result["ratios"].items():
            lines.append(f"  {name:<16} {ratio['ratio']:>8.3f}   ({ratio['min']:.3f} to {ratio['max']:.3f})")
    return "\n".join(lines)


def _server_lines(f: dict[str, Any]) -> list[str]:
    from lmdeploy.bench.serving import BUSY_CLIENT
    from lmdeploy.bench.serving_figures import LATENCIES

    lines = [
        f"{f['url']}: {f['completed']} of {f['requests']} requests in {f['duration_s']:.1f} s",
        f"  requests         {f['requests_s']:>8.2f} /s",
        f"  output           {f['output_tok_s']:>8.1f} tok/s   {f['total_tok_s']:.1f} with the prompts",
    ]
    if "goodput_s" in f:
        lines.append(f"  goodput          {f['goodput_s']:>8.2f} /s      {f['slo_share']:.1%} keep the SLO")
    lines.append(f"  {'ms':<10}" + "".join(f"{head:>10}" for head in ("mean", "p50", "p90", "p99")))
    for name in LATENCIES:
        if f"{name}_mean_s" in f:
            values = (f[f"{name}_{kind}_s"] * 1e3 for kind in ("mean", "p50", "p90", "p99"))
            lines.append(f"  {name.upper():<10}" + "".join(f"{value:>10.1f}" for value in values))
    lines += [f"  failed: {count} x {kind}" for kind, count in f["errors"].items()]
    late = f["client_late_p99_s"] * 1e3
    lines.append(f"  the client used {f['client_cpu_share']:.0%} of a core; requests left it {late:.1f} ms late (p99)")
    if f["client_cpu_share"] > BUSY_CLIENT:
        lines.append(
            "  note: the client was busy, and may itself have limited the figures; use less load, or several clients"
        )
    return lines


def _plot(file: Path, urls: list[str], measurement: Measurement) -> None:
    from lmdeploy.bench.serving_plot import plot_latencies

    labels = urls if len(set(urls)) == len(urls) else [f"{number}: {url}" for number, url in enumerate(urls, 1)]
    try:
        is_drawn = plot_latencies(dict(zip(labels, measurement.samples, strict=True)), "lmdeploy bench serve", file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    tell(f"{file}" if is_drawn else "no plot: matplotlib is not installed (pip install 'lmdeploy[bench]')")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _at_least_0(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value

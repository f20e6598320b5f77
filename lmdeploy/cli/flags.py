"""Flags for the engine's settings, made from the fields of the public config classes. It knows no command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PublicConfig, TurbomindEngineConfig
from lmdeploy.pytorch_config import PytorchEngineConfig

BACKENDS: dict[str, type[PublicConfig]] = {"turbomind": TurbomindEngineConfig, "pytorch": PytorchEngineConfig}
# What the two classes name differently: TurboMind's name -> PyTorch's.
_PYTORCH_NAMES = {"cache_block_seq_len": "block_size"}
# Fields that go to the engine whatever the backend's class is, under the engine's name.
_OVERRIDES = {"device_type": "device", "eager_mode": "eager_mode"}


@dataclass(frozen=True)
class EngineFlag:
    """One field of the config classes as a flag. option: where it is not the field's own name."""

    field: str
    help: str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    option: str = ""

    @property
    def name(self) -> str:
        return self.option or "--" + self.field.replace("_", "-")


ENGINE_FLAGS: tuple[EngineFlag, ...] = (
    EngineFlag("dtype", "type of weights and activations", ("auto", "float16", "bfloat16", "float32")),
    EngineFlag(
        "device_type", "where to run; on its own it takes the GPU if there is one", ("cpu", "cuda"), option="--device"
    ),
    EngineFlag("session_len", "tokens of prompt and answer together; the model's own by default", metavar="TOKENS"),
    EngineFlag("max_batch_size", "requests computed together", metavar="N"),
    EngineFlag(
        "cache_max_entry_count",
        "share of the memory left free by the weights that the KV cache may take, or a whole number of blocks; "
        "on a CPU at most 4 GiB unless given",
        metavar="SHARE",
    ),
    EngineFlag("cache_block_seq_len", "tokens of one KV block", metavar="TOKENS"),
    EngineFlag("enable_prefix_caching", "reuse the KV blocks of prompts that begin alike"),
    EngineFlag(
        "quant_policy", "KV cache: none, 8 or int8, 4 or int4, k8v4 (keys 8, values 4), 16 or fp8", metavar="POLICY"
    ),
    EngineFlag("max_prefill_token_num", "tokens computed in one step", metavar="TOKENS"),
    EngineFlag(
        "model_format",
        "format of the weights; found out by default",
        ("hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"),
    ),
    EngineFlag("revision", "branch, tag or commit of a model on a hub", metavar="REVISION"),
    EngineFlag("download_dir", "where models from a hub are kept", metavar="FOLDER"),
    EngineFlag("hf_overrides", "keys of config.json to replace, as a JSON object", metavar="JSON"),
    EngineFlag("language_model_only", "leave out the vision tower"),
    EngineFlag("rope_scaling_factor", "above 0: dynamic NTK scaling beyond the trained length", metavar="FACTOR"),
    EngineFlag("use_logn_attn", "scale queries beyond the trained length by a logarithm"),
    EngineFlag("eager_mode", "run without CUDA graphs"),
    EngineFlag("deterministic", "answers that do not depend, to the bit, on what else is computed at the same time"),
    EngineFlag("tp", "GPUs that share one model", metavar="N"),
    EngineFlag("cp", "GPUs that share one context", metavar="N"),
    EngineFlag("async_", "accepted; the engine always overlaps its steps", metavar="0|1", option="--async"),
    EngineFlag("communicator", "accepted; how GPUs exchange data", ("nccl", "native", "cuda-ipc")),
    EngineFlag("adapters", "LoRA adapters, each a path or name=path", metavar="[NAME=]PATH"),
    EngineFlag("dllm_block_length", "block length of a diffusion language model", metavar="N"),
    EngineFlag("prefix_cache_state_budget", "accepted; for state-space models", metavar="N"),
    EngineFlag("prefix_cache_decode_state_interval", "accepted; for state-space models", metavar="N"),
)


def add_model_argument(parser: Parser) -> None:
    """The positional MODEL, which may be left out."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model folder, a .gguf file or a hub id such as owner/name; left out: the built-in smollm2-135m-instruct",
    )


def add_engine_flags(parser: Parser, defaults: Mapping[str, Any] | None = None) -> None:
    """Add `--backend` and every engine flag. defaults: where the command's default is not the config class's."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        help="whose names and defaults hold; one engine runs both (default: turbomind)",
    )
    known = _known_defaults()
    hints = {**get_type_hints(PytorchEngineConfig), **get_type_hints(TurbomindEngineConfig)}
    for flag in ENGINE_FLAGS:
        default = {**known, **(defaults or {})}[flag.field]
        shown = "" if default is None or flag.field in _OVERRIDES else f" (default: {default})"
        options: dict[str, Any] = {"dest": flag.field, "default": argparse.SUPPRESS, "help": flag.help + shown}
        if hints[flag.field] is bool:
            group.add_argument(flag.name, action=argparse.BooleanOptionalAction, **options)
            continue
        parse, nargs = _PARSERS.get(flag.field), "+" if flag.field == "adapters" else None
        group.add_argument(
            flag.name,
            type=parse or _scalar(hints[flag.field]),
            nargs=nargs,
            choices=flag.choices,
            metavar=None if flag.choices else flag.metavar,
            **options,
        )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="accepted; models run from this package's own code only"
    )


def engine_settings(
    args: argparse.Namespace, defaults: Mapping[str, Any] | None = None
) -> tuple[PublicConfig, dict[str, Any]]:
    """The public config that the flags describe, and what goes beside it to `EngineConfig.from_public`: overrides of the
    engine's fields, and the flags that were given their default value.

    Without --backend, the first backend that has all the given fields. Raises ConfigError where none has.
    """
    known = _known_defaults()
    given = {flag.field: getattr(args, flag.field) for flag in ENGINE_FLAGS if hasattr(args, flag.field)}
    overrides = {_OVERRIDES[name]: given.pop(name) for name in _OVERRIDES if name in given}
    values = {**(defaults or {}), **given}
    if "adapters" in values:
        values["adapters"] = _named_adapters(values["adapters"])
    lacking: list[str] = []
    for backend in [args.backend] if args.backend else BACKENDS:
        config_class = BACKENDS[backend]
        names = {f.name for f in fields(config_class)}
        renamed = {_backend_name(name, names): value for name, value in values.items()}
        lacking = [name for name, value in renamed.items() if name not in names and value != known[name]]
        if not lacking:
            overrides |= _given_defaults({name: value for name, value in given.items() if value == known[name]})
            return config_class(**{name: value for name, value in renamed.items() if name in names}), overrides
    flags = ", ".join(flag.name for flag in ENGINE_FLAGS if flag.field in lacking)
    raise ConfigError(f"{flags} is no setting of the {backend} backend; leave it out, or name the other with --backend")


def _given_defaults(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The override that tells a flag with its default value from one that was left out: in a workspace they differ."""
    if not flags:
        return {}
    from lmdeploy.engine.config import TRANSLATED

    return {"given": frozenset(TRANSLATED[name] for name in flags if name in TRANSLATED)}


def warn_remote_code(args: argparse.Namespace, tell: Callable[[str], None]) -> None:
    """Say once that no remote code runs, if the user asked for it."""
    if args.trust_remote_code:
        tell("--trust-remote-code changes nothing: models run from this package's own code only")


def _known_defaults() -> dict[str, Any]:
    known = {}
    for config_class in (PytorchEngineConfig, TurbomindEngineConfig):
        known.update({f.name: f.default for f in fields(config_class)})
    return known


def _backend_name(name: str, names: set[str]) -> str:
    return name if name in names else _PYTORCH_NAMES.get(name, name)


def _scalar(hint: Any) -> Callable[[str], Any]:
    """The parser of a field's type: the one of its alternatives that is not None."""
    alternatives = [t for t in getattr(hint, "__args__", (hint,)) if t is not type(None)]
    kind: Callable[[str], Any] = alternatives[0]
    return kind


def _named_adapters(paths: list[str]) -> dict[str, str]:
    """`name=path`, or a bare path, which is its own name; a single one is called `default`."""
    if len(paths) == 1 and "=" not in paths[0]:
        return {"default": paths[0]}
    pairs = (path.partition("=") for path in paths)
    return {name: path if is_named else name for name, is_named, path in pairs}


def number_or_share(text: str) -> float:
    """A whole number without a point is a number of blocks, anything else a share."""
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.5 nor a number of blocks") from None


def _policy(text: str) -> int | str:
    return int(text) if text.strip().isdigit() else text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; argparse turns what this raises into its own error."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write for example '{{\"rope_theta\": 500000}}'")
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "cache_max_entry_count": number_or_share,
    "quant_policy": _policy,
    "hf_overrides": json_object,
    "adapters": str,
}

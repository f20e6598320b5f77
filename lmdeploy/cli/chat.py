"""`lmdeploy chat`: talk to a model at the terminal, or answer the prompts of a pipe. It knows no tensor."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy import env
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.cli.flags import add_engine_flags, add_model_argument, engine_settings, warn_remote_code
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.messages import GenerationConfig

if TYPE_CHECKING:
    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.messages import PublicConfig

HELP = "chat with a model"
DESCRIPTION = """Chat with a model.

At a terminal an empty line ends a prompt, `exit` quits, `end` forgets the conversation, `/help` lists the commands.
From a pipe a blank line or the end of input ends a prompt; answers are greedy and alone on stdout.
"""
ENGINE_DEFAULTS: dict[str, Any] = {"max_batch_size": 1, "enable_prefix_caching": True}
_SAMPLING_FLAGS = ("temperature", "top_p", "top_k")
_SPECULATIVE_ALGORITHMS = ("eagle", "eagle3", "deepseek_mtp", "hy3_mtp", "qwen3_5_mtp")


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    add_model_argument(parser)
    chat = parser.add_argument_group("chat")
    add_template_flags(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system text; without it the template may bring its own")
    chat.add_argument("--single-line", action=argparse.BooleanOptionalAction, help="Enter ends a prompt")
    add_sampling_flags(parser, "the model's generation_config.json, else temperature 0.7 and top-p 0.95")
    add_engine_flags(parser, ENGINE_DEFAULTS)
    add_speculative_flags(parser)


def add_sampling_flags(parser: Parser, default: str) -> None:
    """The flags that `generation_config` reads. default: what holds at a terminal where none is given."""
    sampling = parser.add_argument_group("sampling", f"default: {default}; from a pipe greedy")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens; 0 is off")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    sampling.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens of one answer (default: up to session-len)"
    )


def add_template_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that `template_config` reads."""
    group.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="a name (`lmdeploy list`), a JSON file of parts, or a Jinja file; the model's own by default",
    )
    group.add_argument(
        "--capability",
        choices=("completion", "infilling", "chat", "python"),
        help="what the template is to do with a prompt (default: chat)",
    )


def add_speculative_flags(parser: Parser) -> None:
    group = parser.add_argument_group("speculative decoding")
    group.add_argument("--speculative-algorithm", choices=_SPECULATIVE_ALGORITHMS, help="which draft proposes tokens")
    group.add_argument("--speculative-draft-model", metavar="MODEL", help="the draft model")
    group.add_argument(
        "--speculative-num-draft-tokens", type=int, default=1, metavar="N", help="tokens proposed (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    warn_remote_code(args, tell)
    refuse_speculative(args)
    config = generation_config(args, is_terminal)
    template = template_config(args)
    public, overrides = engine_settings(args, ENGINE_DEFAULTS)
    public.model_name = args.model
    engine = _open(args.model, public, overrides, template)
    try:
        _describe(engine, config)
        _converse(engine, config, args, is_terminal)
    finally:
        engine.close()
    return 0


def generation_config(args: argparse.Namespace, is_terminal: bool) -> GenerationConfig:
    """What the flags ask for; greedy from a pipe unless one of them is about sampling. Raises InvalidParameter."""
    given = {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None}
    if not given and not is_terminal:
        given = {"do_sample": False}
    return GenerationConfig(max_new_tokens=args.max_new_tokens, random_seed=args.seed, **given)


def template_config(args: argparse.Namespace) -> ChatTemplateConfig | str | None:
    """What --chat-template and --capability ask for: parts, or the path of a Jinja file; None leaves it to the model."""
    name, config = args.chat_template, None
    if name is not None and name.endswith(".jinja"):
        if args.capability not in (None, "chat"):
            raise ConfigError(f"--capability {args.capability} does not go with a Jinja file; leave one of them out")
        return str(name)
    if name is not None:
        is_file = name.endswith(".json") or Path(name).is_file()
        config = ChatTemplateConfig.from_json(name) if is_file else ChatTemplateConfig(model_name=name)
    if args.capability is not None:
        config = replace(config or ChatTemplateConfig(), capability=args.capability)
    return config


def refuse_speculative(args: argparse.Namespace) -> None:
    """Raise ConfigError for a speculative flag that would change what runs."""
    for flag in ("speculative_algorithm", "speculative_draft_model"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} {getattr(args, flag)} is not supported yet; leave it out")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _open(
    model: str | None, public: PublicConfig, overrides: dict[str, Any], template: ChatTemplateConfig | str | None
) -> AsyncEngine:
    """Load the model; what is in force is printed whether that succeeds or not."""
    from lmdeploy.async_engine import open_engine
    from lmdeploy.engine.config import EngineConfig
    from lmdeploy.generation import CHAT_DEFAULTS

    try:
        engine = open_engine(
            model,
            EngineConfig.from_public(public, **overrides),
            chat_template_config=template,
            defaults=CHAT_DEFAULTS,
            revision=public.revision,
            download_dir=public.download_dir,
        )
    except LMDeployError:
        _tell_configs(template or ChatTemplateConfig(), public)
        raise
    asked = template if isinstance(template, ChatTemplateConfig) else ChatTemplateConfig()
    found = replace(asked, model_name=getattr(engine.chat_template, "name", None))
    _tell_configs(found, replace(public, model_name=str(engine.model_path), session_len=engine.client.info.session_len))
    return engine


def _tell_configs(template: ChatTemplateConfig | str, public: PublicConfig) -> None:
    tell(f"chat_template_config:\n{template}\nengine_cfg:\n{public}")


def _describe(engine: AsyncEngine, config: GenerationConfig) -> None:
    """The memory plan and the sampling that is in force."""
    info = engine.client.info
    tell(f"{info.architecture}, {info.dtype} on {info.device}, loaded in {info.load_s:.1f} s")
    width = max((len(name) for name, _ in info.memory_plan), default=0)
    for name, value in info.memory_plan:
        tell(f"  {name:<{width}}  {value}")
    tell(f"sampling: {describe_sampling(engine.effective_config(config))}")


def describe_sampling(config: GenerationConfig) -> str:
    """The settings in force, such as `temperature 0.7, top_p 0.95, top_k 50`, or `greedy`. config: an effective one."""
    if not config.is_sampling:
        return "greedy"
    shown = [f"temperature {config.temperature:g}", f"top_p {config.top_p:g}"]
    shown += [f"top_k {config.top_k}"] if config.top_k else []
    shown += [f"min_p {config.min_p:g}"] if config.min_p else []
    shown += [f"repetition_penalty {config.repetition_penalty:g}"] if config.repetition_penalty != 1 else []
    shown += [f"seed {config.random_seed}"] if config.random_seed is not None else []
    return ", ".join(shown)


def _converse(engine: AsyncEngine, config: GenerationConfig, args: argparse.Namespace, is_terminal: bool) -> None:
    from lmdeploy.cli.conversation import Conversation
    from lmdeploy.cli.repl import talk

    capability = getattr(engine.chat_template, "capability", None) or args.capability or "chat"
    conversation = Conversation(engine, config, args.system, is_chat=capability == "chat")

    def status() -> str:
        stats = engine.client.stats()
        return f"engine: {stats['num_free_blocks']:.0f} of {stats['num_blocks']:.0f} KV blocks are free"

    sentinel = "!!" if capability == "infilling" else ""
    talk(
        conversation,
        is_terminal=is_terminal,
        is_single_line=bool(args.single_line),
        sentinel=sentinel,
        history=env.cache_dir() / "chat_history",
        status=status,
    )

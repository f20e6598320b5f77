"""Text that the model writes itself, for calibration where no data set is at hand. It runs the engine and judges nothing.

Self-generated text lies where the model's own activations lie. https://arxiv.org/abs/2410.17170
"""

from __future__ import annotations

import queue
from pathlib import Path

from lmdeploy.chat_template import choose_chat_template
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.errors import ConfigError
from lmdeploy.models.config import read_hf_config
from lmdeploy.tokenizer import Tokenizer

MAX_TOKENS = 16_384
_BATCH_SIZE = 32
_TEMPERATURES = (0.7, 0.9, 1.0)
_TOPICS = (
    "the water cycle", "how a compiler works", "the history of printing", "bread baking", "black holes",
    "learning a foreign language", "sorting algorithms", "coral reefs", "budgeting for a family", "chess openings",
    "photosynthesis", "railway engineering", "music theory", "first aid", "the Silk Road", "linear equations",
    "gardening in a small space", "computer networks", "famous paintings", "volcanoes",
)  # fmt: skip
_FORMS = (
    "Explain {} to a beginner in several paragraphs.",
    "Write a short story that has to do with {}.",
    "Write a Python program about {} and explain it line by line.",
    "List ten questions about {} and answer each of them.",
    "写一篇关于 {} 的短文。",
    "Summarize the most important facts about {} in a table, then discuss them.",
)


def generate_tokens(path: Path, tokenizer: Tokenizer, num_tokens: int, length: int, device: str) -> list[int]:
    """Ids of about num_tokens tokens, at most MAX_TOKENS: texts of `length` tokens, prompts included, end to end."""
    count = max(2, min(num_tokens, MAX_TOKENS) // length)
    config = EngineConfig(device=device, session_len=length + 1, max_batch_size=min(count, _BATCH_SIZE))
    client = ThreadClient(path, config)
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    texts: dict[str, list[int]] = {}
    try:
        for number in range(count):
            prompt = _prompt(path, tokenizer, number)[: length // 2]
            sampling = SamplingParams(
                max_new_tokens=length - len(prompt),
                temperature=_TEMPERATURES[number % len(_TEMPERATURES)],
                top_p=0.95,
                seed=number,
            )
            texts[str(number)] = list(prompt)
            client.submit(Request(str(number), prompt, sampling), outputs.put)
        running = count
        while running:
            output = outputs.get()
            if output.error is not None:
                raise ConfigError(f"the model could not write its own calibration text: {output.error}")
            texts[output.request_id] += output.token_ids
            running -= output.is_finished
    finally:
        client.close()
    return [token for text in texts.values() for token in text]


def _prompt(path: Path, tokenizer: Tokenizer, number: int) -> list[int]:
    """A question in the model's own chat format; for a model that has none, the beginning of a text."""
    topic = _TOPICS[number % len(_TOPICS)]
    question = _FORMS[number % len(_FORMS)].format(topic)
    hf = {} if path.is_file() else read_hf_config(path)
    try:
        template = choose_chat_template(path, tokenizer, hf)
        return template.render_ids([{"role": "user", "content": question}], tokenizer)
    except ConfigError:
        return tokenizer.encode(f"{topic[0].upper()}{topic[1:]}")

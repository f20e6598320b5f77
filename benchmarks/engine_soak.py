"""Keep an engine saturated by many clients that abort at random, and see that nothing leaks.

    python benchmarks/engine_soak.py [SHAPE or FOLDER] [--clients 64] [--seconds 180] [--blocks 800] [--out FILE]

Each client sends one request after the other: prompts of 1 to 2,000 tokens, some of them sharing a beginning, greedy or
sampled, answers of up to 400 tokens. A third are aborted at a random moment. The pool is small enough that requests are
preempted. Every request must end exactly once and as it should; at the end all blocks are free. Memory of the device and
of the process is noted every two seconds; what counts is how it moves after the first quarter.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmdeploy.bench.process_memory import rss_bytes
from lmdeploy.bench.shapes import SHAPES, shape_folder
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams

MAX_PROMPT, MAX_ANSWER, SHARED = 2000, 400, 512
NO_ANSWER_S = 60


@dataclass
class Counts:
    """What the clients saw."""

    ended: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, reason: str, tokens: int) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1
        self.tokens += tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen2.5-1.5b")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--blocks", type=int, default=800)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    is_shape = args.model in SHAPES
    client = ThreadClient(
        shape_folder(args.model) if is_shape else Path(args.model),
        EngineConfig(
            empty_init=is_shape, device=args.device, session_len=4096, cache_max_entry_count=args.blocks,
            enable_prefix_caching=True, max_batch_size=args.clients,
        ),
    )  # fmt: skip
    try:
        result = soak(client, args.clients, args.seconds)
    finally:
        client.close()
    result |= {"model": args.model, "clients": args.clients, "seconds": args.seconds, "blocks": args.blocks}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(result["faults"]))


def soak(client: ThreadClient, num_clients: int, seconds: float) -> dict[str, object]:
    """Run the clients for that long; what they saw, and how memory moved."""
    counts, lock, deadline = Counts(), threading.Lock(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=_run_client, args=(client, number, deadline, counts, lock))
        for number in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    samples = []
    while any(thread.is_alive() for thread in threads):
        samples.append((client.stats()["num_running"], _device_bytes(), rss_bytes()))
        time.sleep(2)
    stats = client.stats()
    if stats["num_free_blocks"] != stats["num_blocks"]:
        counts.faults.append(f"{stats['num_free_blocks']} of {stats['num_blocks']} blocks are free")
    settled = samples[len(samples) // 4 :]
    return {
        "ended": counts.ended,
        "tokens_per_s": round(counts.tokens / seconds, 1),
        "faults": counts.faults[:20],
        "preemptions": stats["num_preemptions"],
        "mean_running": round(sum(sample[0] for sample in samples) / len(samples), 1),
        "device_growth_bytes": settled[-1][1] - settled[0][1],
        "device_bytes": settled[-1][1],
        "process_growth": round(settled[-1][2] / settled[0][2] - 1, 5),
        "process_bytes": settled[-1][2],
    }


def _run_client(client: ThreadClient, number: int, deadline: float, counts: Counts, lock: threading.Lock) -> None:
    generator = random.Random(number)
    shared = [random.Random(number % 4).randrange(client.info.vocab_size) for _ in range(SHARED)]
    turn = 0
    while time.monotonic() < deadline:
        turn += 1
        request = _request(f"{number}-{turn}", generator, shared, client.info.vocab_size)
        inbox: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        client.submit(request, inbox.put)
        patience = generator.randrange(MAX_ANSWER) if generator.random() < 0.35 else None
        reason, tokens = _drain(client, request, inbox, patience)
        with lock:
            counts.add(reason, tokens)
            expected = ("length",) if patience is None else ("length", "abort")
            if reason not in expected or (reason == "length" and tokens != request.sampling.max_new_tokens):
                counts.faults.append(f"{request.request_id}: {reason} after {tokens} tokens")


def _request(name: str, generator: random.Random, shared: list[int], vocab_size: int) -> Request:
    length = generator.randint(1, MAX_PROMPT)
    prompt = [generator.randrange(vocab_size) for _ in range(length)]
    if generator.random() < 0.5:
        prompt = (shared + prompt)[:MAX_PROMPT]
    temperature = generator.choice([0.0, 0.8])
    tokens = generator.randint(1, MAX_ANSWER)
    return Request(name, prompt, SamplingParams(max_new_tokens=tokens, temperature=temperature, top_k=40, top_p=0.9))


def _drain(
    client: ThreadClient, request: Request, inbox: queue.SimpleQueue[RequestOutput], patience: int | None
) -> tuple[str, int]:
    """Take all outputs of a request, aborting it after `patience` tokens: why it ended, and its tokens."""
    tokens = 0
    if patience == 0:
        client.abort(request.request_id)
    while True:
        try:
            output = inbox.get(timeout=NO_ANSWER_S)
        except queue.Empty:
            return "nothing came", tokens
        tokens += len(output.token_ids)
        if output.finish_reason is not None:
            return output.finish_reason, tokens
        if patience is not None and tokens >= patience:
            client.abort(request.request_id)


def _device_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    main()

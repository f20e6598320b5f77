"""Answer several prompts at once: python examples/batch.py [MODEL]"""

import sys

from lmdeploy import GenerationConfig, pipeline

model = sys.argv[1] if len(sys.argv) > 1 else None  # None is the built-in model

with pipeline(model) as pipe:
    prompts = ["The capital of France is", "Name three colours.", "上海是"]
    for prompt, response in zip(prompts, pipe(prompts, GenerationConfig(max_new_tokens=32)), strict=True):
        print(f"{prompt!r} -> {response.text!r} ({response.finish_reason}, {response.generate_token_len} tokens)")

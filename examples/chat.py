"""A conversation of two turns, shown word by word: python examples/chat.py [MODEL]"""

import sys

from lmdeploy import GenerationConfig, pipeline

model = sys.argv[1] if len(sys.argv) > 1 else None  # None is the built-in model

with pipeline(model) as pipe:
    session = pipe.session(GenerationConfig(max_new_tokens=48, temperature=0.7, top_p=0.95, random_seed=0))
    for prompt in ("Who wrote Hamlet?", "When did he live?"):
        print(f"user: {prompt}\nassistant: ", end="")
        for response in session(prompt, stream_response=True):
            print(response.text, end="", flush=True)
        print()

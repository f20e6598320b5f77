"""How likely a model finds each text: python examples/perplexity.py [MODEL]"""

import math
import sys

from lmdeploy import pipeline

model = sys.argv[1] if len(sys.argv) > 1 else None  # None is the built-in model
texts = ["The sun rises in the east.", "East the in rises sun the."]

with pipeline(model) as pipe:
    losses = pipe.get_ppl([pipe.tokenizer.encode(text) for text in texts])
    for text, loss in zip(texts, losses, strict=True):
        print(f"{text!r}: perplexity {math.exp(loss):.1f}")

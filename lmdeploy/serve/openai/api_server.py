"""`python -m lmdeploy.serve.openai.api_server MODEL` is `lmdeploy serve api_server MODEL`, as before there was a command."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["serve", "api_server"]
    runpy.run_module("lmdeploy", run_name="__main__", alter_sys=True)

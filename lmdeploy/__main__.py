"""`python -m lmdeploy`, the same as the command `lmdeploy`."""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import sys

from lmdeploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

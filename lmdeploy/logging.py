"""The package's logger: stderr, one line an event. It knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from lmdeploy import env

_FORMAT = "%(asctime)s - lmdeploy - %(levelname)s - %(message)s"


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error now: notebooks, tests and redirect_stderr replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def get_logger() -> logging.Logger:
    """The package's logger, set up on first use with level WARNING or the environment's."""
    logger = logging.getLogger("lmdeploy")
    if not logger.handlers:
        logger.propagate = False
        handlers: list[logging.Handler] = [_StandardError()]
        if path := env.log_file():
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
        logger.setLevel(env.log_level() or "WARNING")
    return logger

"""The exception tree; every error a user can cause is one of these. It knows nothing of HTTP.

    LMDeployError
    ├── ConfigError            a setting, flag or config value that cannot be used
    ├── ModelNotSupported      an architecture or file kind this package has no code for
    ├── CheckpointError        weight or tokenizer files that are missing, broken or do not fit the config
    ├── RequestError           one request is at fault; it fails alone
    │   ├── InvalidParameter   a sampling parameter or prompt form out of bounds
    │   ├── InvalidGrammar     a grammar, schema or regex that is malformed, too large, or asks for what there is not
    │   └── PromptTooLong      the prompt cannot fit session_len or the cache, even alone
    └── EngineDead             the engine has stopped; every waiter gets this

A message says what is wrong, the value, and what to do.
"""

from __future__ import annotations


class LMDeployError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(LMDeployError, ValueError):
    """A setting, flag or config value that cannot be used."""


class ModelNotSupported(LMDeployError):
    """An architecture or file kind for which there is no code here."""


class CheckpointError(LMDeployError):
    """Weight or tokenizer files that are missing, broken, or do not fit the config."""


class RequestError(LMDeployError, ValueError):
    """One request is at fault; it fails alone and the engine goes on."""


class InvalidParameter(RequestError):
    """A sampling parameter or a prompt that is malformed or out of bounds."""


class InvalidGrammar(RequestError):
    """A grammar, JSON schema or regular expression that cannot be enforced; the message names what is at fault."""


class PromptTooLong(RequestError):
    """The prompt cannot fit session_len or the KV cache, even with the engine to itself."""


class EngineDead(LMDeployError, RuntimeError):
    """The engine has stopped; no request can be answered any more."""

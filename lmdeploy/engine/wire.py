"""Frames between a client and an engine in its own process: a length, then a msgspec message. No pickle, no code."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from lmdeploy import errors
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.control import Command
from lmdeploy.engine.guided import GuidedVocabulary
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.validation import EngineInfo

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = (1 << 32) - 1


class Start(msgspec.Struct, tag=True):
    path: str
    config: EngineConfig


class Submit(msgspec.Struct, tag=True):
    request: Request


class LoadVocabulary(msgspec.Struct, tag=True):
    vocabulary: GuidedVocabulary


class Abort(msgspec.Struct, tag=True):
    request_id: str


class Control(msgspec.Struct, tag=True):
    number: int
    command: Command


class Close(msgspec.Struct, tag=True):
    pass


class Failure(msgspec.Struct, tag=True):
    """An exception of the package's own tree, or EngineDead for any other."""

    kind: str
    message: str


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo
    stats: dict[str, float]


@dataclass
class WireTensor:
    dtype: str
    shape: list[int]
    data: bytes


class Outputs(msgspec.Struct, tag=True):
    outputs: list[RequestOutput]


class Stats(msgspec.Struct, tag=True):
    values: dict[str, float]


class Done(msgspec.Struct, tag=True):
    """The end of a Control, by its number."""

    number: int
    failure: Failure | None


ToEngine = Start | LoadVocabulary | Submit | Abort | Control | Close
FromEngine = Ready | Failure | Outputs | Stats | Done


class Connection:
    """Sends and receives frames; `send` may be called from several threads."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(receives, dec_hook=_from_wire)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError when the other side is gone, RequestError for what does not fit a frame."""
        data = self._encoder.encode(message)
        _check_size(len(data))
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> object | None:
        """The next message; None when the other side has closed."""
        header = self._read(_LENGTH.size)
        if header is None:
            return None
        data = self._read(_LENGTH.unpack(header)[0])
        return None if data is None else self._decoder.decode(data)

    def close(self) -> None:
        """Wake a blocked `receive` on both sides, and let go of the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int) -> bytes | None:
        chunks = bytearray()
        while len(chunks) < count:
            try:
                chunk = self._socket.recv(count - len(chunks))
            except OSError:
                return None
            if not chunk:
                return None
            chunks += chunk
        return bytes(chunks)


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MAX_FRAME_BYTES:
        raise errors.RequestError(f"an answer of {num_bytes:,} bytes does not fit a frame; ask for fewer logits")


def to_failure(error: Exception) -> Failure:
    if isinstance(error, errors.LMDeployError):
        return Failure(type(error).__name__, str(error))
    return Failure("EngineDead", f"{type(error).__name__}: {error}")


def from_failure(failure: Failure) -> Exception:
    """The exception that a Failure names; EngineDead for a name that is not in the tree."""
    kind = getattr(errors, failure.kind, errors.EngineDead)
    return kind(failure.message)


def _to_wire(value: object) -> Failure | WireTensor:
    """What stands in a frame for a value of a type that msgspec does not know."""
    if isinstance(value, torch.Tensor):
        return _pack(value)
    if isinstance(value, Exception):
        return to_failure(value)
    raise NotImplementedError(f"{type(value).__name__} has no form on the wire")


def _from_wire(kind: type, value: object) -> object:
    """The value of such a type that was sent as `value`."""
    if kind is torch.Tensor:
        return _unpack(msgspec.convert(value, WireTensor))
    return from_failure(msgspec.convert(value, Failure))


def _pack(tensor: torch.Tensor) -> WireTensor:
    _check_size(tensor.nbytes)
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return WireTensor(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data)


def _unpack(wire: WireTensor) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(wire.data), dtype=torch.uint8) if wire.data else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, wire.dtype)).view(wire.shape)

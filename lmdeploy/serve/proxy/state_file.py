"""The nodes on disk, so that a proxy that starts again knows them. It believes nothing of what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lmdeploy.errors import InvalidParameter
from lmdeploy.logging import get_logger
from lmdeploy.serve.proxy.addresses import node_url
from lmdeploy.serve.proxy.node import Node


class SavedNode(msgspec.Struct):
    models: list[str]
    speed: float | None = None


def save(path: Path, nodes: Iterable[Node]) -> None:
    """Write all nodes, readable by this user only; a file that cannot be written costs a warning, no more."""
    content = {node.url: SavedNode(list(node.models), node.speed) for node in nodes}
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(content), indent=2))
        new.replace(path)
    except OSError as error:
        get_logger().warning("the nodes cannot be kept in %s: %s", path, error.strerror)


def load(path: Path) -> list[tuple[str, SavedNode]]:
    """The saved nodes with a valid address; none if there is no file, or one that is not ours."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, SavedNode])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        get_logger().warning("%s is left aside: %s", path, error)
        return []
    found = []
    for url, saved in content.items():
        try:
            found.append((node_url(url), saved))
        except InvalidParameter as error:
            get_logger().warning("%s: %s", path, error)
    return found

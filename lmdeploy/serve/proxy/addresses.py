"""Which addresses a node may have: http or https, a host, a port, never a cloud's metadata service. It connects to nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from lmdeploy.errors import InvalidParameter

_MAX_URL_CHARS = 300
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
# Services of cloud providers that hand out credentials and lie outside the link-local range.
_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254")
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def node_url(text: str) -> str:
    """`scheme://host:port`, in lower case, with the port only where it is not the scheme's own.

    0.0.0.0 and [::], where a server listens rather than is, become this machine's loopback address.
    Raises InvalidParameter.
    """
    if len(text) > _MAX_URL_CHARS or not text.isascii() or not text.isprintable() or "\\" in text or " " in text:
        raise InvalidParameter(f"{text[:_MAX_URL_CHARS]!r} is no address of a server; give http://HOST:PORT")
    try:
        parts = urlsplit(text)
        port = parts.port
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    except ValueError as error:
        raise InvalidParameter(f"{text!r} is no address of a server: {error}; give http://HOST:PORT") from error
    is_plain = not (parts.path.strip("/") or parts.query or parts.fragment) and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not is_plain or not _HOST.fullmatch(host) or port == 0:
        raise InvalidParameter(
            f"{text!r} is no address of a server; give http://HOST:PORT or https://HOST:PORT, no more"
        )
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    if host.rstrip(".") in _METADATA_NAMES:
        raise InvalidParameter(f"{text!r} is a cloud's metadata service; no server can be there")
    if port is None or port == {"http": 80, "https": 443}[parts.scheme]:
        return f"{parts.scheme}://{host}"
    return f"{parts.scheme}://{host}:{port}"


async def check_host(url: str) -> None:
    """Raise InvalidParameter if the host of a `node_url` has no address, or one at which no server may be."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidParameter(f"the host of {url} is not known here; give one that can be resolved") from error
    for *_, address in found:
        if is_refused(ipaddress.ip_address(str(address[0]).partition("%")[0])):
            raise InvalidParameter(f"{url} leads to {address[0]}, where no server may be")


def is_refused(address: Address) -> bool:
    """Metadata services, link-local, multicast, reserved and unspecified addresses, in whatever form IPv6 carries them."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_refused(inner)
    return (
        address in _METADATA
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and not address.is_loopback)
    )

"""Which addresses may be a node's."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.proxy.addresses import check_host, is_refused, node_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:23333", "http://127.0.0.1:23333"),
        ("HTTP://Host.Example:8000/", "http://host.example:8000"),
        ("https://h", "https://h"),
        ("https://h:443", "https://h"),
        ("http://h:443", "http://h:443"),
        ("http://0.0.0.0:23333", "http://127.0.0.1:23333"),
        ("http://[::]:1", "http://[::1]:1"),
        ("http://[FE::1]:1", "http://[fe::1]:1"),
        ("http://model_a.svc:1", "http://model_a.svc:1"),
    ],
)
def test_one_form_of_each_address(text: str, url: str) -> None:
    assert node_url(text) == url
    assert node_url(url) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "h:80", "//h", "ftp://h", "file:///x", "gopher://h", "http://", "http://:80", "http://h:0", "http://h:99999", "http://h:x",
        "http://h/path", "http://h?x", "http://h#x", "http://u@h", "http://u:p@h", "http://h@", "http://h\\@x", "http://h h", "http://h\n",
        "http://h\r\nX: 1", "http://é", "http://-h", "http://h-", "http://[::1", "http://[x]", "http://%31", "http://h%00",
        "http://metadata.google.internal", "http://METADATA.google.internal.", "http://metadata", "http://" + "x" * 300,
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidParameter):
        node_url(text)


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254", "169.254.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "fe80::1", "fd00:ec2::254",
        "0.0.0.0", "::", "224.0.0.1", "ff02::1", "240.0.0.1", "255.255.255.255", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
    ],
)  # fmt: skip
def test_addresses_where_no_server_is(text: str) -> None:
    assert is_refused(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text", ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "8.8.8.8", "fd12::1", "::ffff:10.0.0.1"]
)
def test_private_and_public_addresses_are_fine(text: str) -> None:
    assert not is_refused(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "url", ["http://2852039166", "http://0xa9fea9fe", "http://169.254.43518", "http://0251.0376.0251.0376"]
)
def test_other_ways_to_write_an_address_lead_to_the_same(url: str) -> None:
    with pytest.raises(InvalidParameter, match=r"169\.254\.169\.254"):
        asyncio.run(check_host(node_url(url)))


def test_names_are_resolved() -> None:
    asyncio.run(check_host("http://localhost:1"))
    with pytest.raises(InvalidParameter, match="not known here"):
        asyncio.run(check_host("http://no-such-host.invalid"))

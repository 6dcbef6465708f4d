"""Files on object stores and web servers, read by range through fsspec, whatever it knows by URL.

What is small of a pack is kept in the user's cache folder, where packed.py maps it as a local one;
of its shards only the bytes that a clip wants are read. Credentials and endpoints are fsspec's own.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mae_fast.errors import ConfigError
from mae_fast.files import locked, writing

_T = TypeVar("_T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECONDS = 60  # that a read may take, where the protocol is asynchronous
_PART = 32 << 20  # bytes of a long file that are asked for at once
# Seconds before another try of what may be a moment's trouble.
_PAUSES = (0.0, 0.5)
received = 0  # bytes, by this process


def is_remote(path) -> bool:
    return isinstance(path, str) and _URL.match(path) is not None


def kept(url: str) -> Path:
    """The folder of this machine where what was fetched of a URL lies. Touches nothing."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "mae_fast" / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextlib.contextmanager
def keeping(url: str) -> Iterator[Path]:
    """`kept`, made and locked: one process fetches, others wait and find it. Raises WriteError."""
    folder = kept(url)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    with lock:
        locked(lock, wait=True)
        yield folder


def read(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file from `begin` up to `end`, or all of it. FileNotFoundError where there is
    none; OSError, in one line, for all else, and for another number of bytes than was asked for."""
    global received
    fs, path = _file_system(url)
    with _only_oserror(url):
        if fs.async_impl:
            from fsspec import asyn

            data = asyn.sync(fs.loop, fs._cat_file, path, start=begin, end=end, timeout=_SECONDS)
        else:
            data = fs.cat_file(path, start=begin, end=end)
    received += len(data)
    if begin is not None and len(data) != end - begin:
        words = f"{len(data)} bytes came for bytes {begin} to {end}"
        if len(data) > end - begin:
            words += ": its server gives no parts of files (Range)"
        raise OSError(errno.EIO, words, url)
    return data


def size(url: str) -> int | None:
    """Bytes of a file, or None where its server does not say. Raises as `read`."""
    fs, path = _file_system(url)
    with _only_oserror(url):
        return fs.size(path)


def download(url: str, file: Path, length: int) -> None:
    """Write a file of `length` bytes, part by part, whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        temporary.write_bytes(b"")
    for at in range(0, length, _PART):
        part = tried(lambda at=at: read(url, at, min(at + _PART, length)))
        with writing(file), open(temporary, "ab") as f:
            f.write(part)
    with writing(file):
        os.replace(temporary, file)


def opened(path: str):
    """A file or a URL, to be read and sought in."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inner = _file_system(path)
    with _only_oserror(path):
        return fs.open(inner, "rb")


def tried(call: Callable[[], _T]) -> _T:
    """call(), and again after what may be a moment's trouble."""
    for pause in _PAUSES:
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return call()


@functools.lru_cache(maxsize=16)
def _of_process(protocol: str, process: int) -> Any:
    import fsspec

    return fsspec.filesystem(protocol)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, which belongs to one process, and the path that it takes."""
    try:
        fs = _of_process(url.partition("://")[0].lower(), os.getpid())
    except ImportError as e:
        raise ConfigError(f"{url}: pip install 'mae-fast[remote]': {e}") from None
    except ValueError as e:
        raise ConfigError(f"{url}: {e}") from None
    return fs, fs._strip_protocol(url)


@contextlib.contextmanager
def _only_oserror(url: str) -> Iterator[None]:
    """Each protocol's library raises errors of its own; fsspec's HTTP calls any a missing file."""
    try:
        yield
    except Exception as e:
        cause = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
        words = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise OSError(errno.EIO, words.removesuffix(":"), url) from None

"""Files that a command leaves: whole or not at all, and one line where they cannot be written."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mae_fast.errors import ConfigError, WriteError

log = logging.getLogger("mae_fast")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raises WriteError, with the file's name, for an OSError inside."""
    try:
        yield
    except OSError as e:
        raise WriteError(f"cannot write {path}: {e.strerror or e}") from e


def check_output(output: str | Path, *inputs: str | Path) -> None:
    """Before the work, so that it is not lost. Raises WriteError where `output` cannot be written,
    and ConfigError where it is a file that is read."""
    target = Path(os.path.realpath(output))
    with writing(output):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():  # a device, a pipe
            return
        above = next(p for p in target.parents if p.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    for path in filter(os.path.exists, inputs):
        if target.exists() and os.path.samefile(target, path):
            raise ConfigError(f"the output {output} is what is read: choose another --output")


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file, and the folders above it, whole or not at all. Raises WriteError."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with writing(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a device, a pipe: nothing to put in place
            target.write_bytes(data)
            return
        temporary = target.with_name(target.name + ".tmp")
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """fsync a file, or a folder so that a rename in it lasts."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def locked(f: TextIO, wait: bool = False) -> bool:
    """Have a file for this process alone while it is open: a crash closes it too. False where
    another has it; where a file system has no locks it says so."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        folder = Path(f.name).parent
        log.warning("%s cannot be locked (%s): none else must write there", folder, e.strerror)
    return True

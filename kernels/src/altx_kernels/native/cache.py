"""The directory that keeps compiled libraries from one process to the next, for one user alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from altx_kernels.op import KernelError

VARIABLE = "ALTX_CACHE"
DIGEST = hashlib.sha256().digest_size


def root() -> Path | None:
    """$ALTX_CACHE, else altx in the user's directory for caches; None for a user without a home."""
    if wanted := os.environ.get(VARIABLE):
        return Path(wanted).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard has others ignored
        return Path(base, "altx")
    try:
        return Path.home() / ".cache" / "altx"
    except RuntimeError:
        return None


def folder() -> Path | None:
    """Where libraries are kept; it need not exist.

    Raises:
        KernelError: if somebody else could have put something there.
    """
    if (above := root()) is None:
        return None
    for path in (above, above / "native"):
        try:
            status = path.stat()
        except OSError:
            continue
        check(path, status)
    return above / "native"


def check(path: Path, status: os.stat_result) -> None:
    """Raises KernelError if a file or directory of the cache is not this user's alone."""
    if not hasattr(os, "geteuid"):  # Windows: a profile is its user's
        return
    user = os.geteuid()
    if status.st_uid != user:
        wrong, mend = f"belongs to another user (number {status.st_uid})", f"chown {user} {path}"
    elif status.st_mode & 0o022:
        wrong, mend = "can be written to by other users", f"chmod go-w {path}"
    else:
        return
    raise KernelError(
        f"{path}, where compiled kernels are kept, {wrong}",
        hint=f"set {VARIABLE} to a directory of your own, or, if you trust what is there, {mend}",
    )


def intact(path: Path) -> bool:
    """Whether a library is there as `store` wrote it.

    Raises:
        KernelError: if somebody else could have written it.
    """
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            check(path, os.fstat(file.fileno()))
            content = file.read()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def workplace(folder: Path | None) -> tempfile.TemporaryDirectory[str]:
    """An empty directory to compile in, which goes when it is left."""
    # Among temporary files, unless no library may be loaded from there.
    noexec = getattr(os, "ST_NOEXEC", 0)
    barred = noexec and os.statvfs(tempfile.gettempdir()).f_flag & noexec
    place = folder if barred and folder is not None and _make(folder) else None
    return tempfile.TemporaryDirectory(prefix="altx-", dir=place, ignore_cleanup_errors=True)


def store(path: Path, library: bytes) -> bool:
    """Keep a library, followed by its digest; False where that cannot be done (read-only, full).

    It appears at once or not at all, however many processes do the same.
    """
    temporary = None
    try:
        if not _make(path.parent):
            return False
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(descriptor, "wb") as file:
            file.write(library + hashlib.sha256(library).digest())
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def _make(folder: Path) -> bool:
    """Whether the cache's folder could be made, or was there, for nobody but this user."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return True

"""Files out of zip and tar archives and folders, one way for all.

Special here: what an archive holds is only offered; whoever asks for a file says where it goes, so
no name in an archive decides that. A file is written beside its place and moved there whole.
``llava data prepare-train mix665k --archives ~/downloads``
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple


class Member(NamedTuple):
    """A file of an archive: its path there, its bytes, and how it is read (or linked) to a file."""

    path: str
    size: int
    copy: Callable[[Path], None]


@contextlib.contextmanager
def members(path: Path) -> Iterator[Iterator[Member]]:
    """The regular files of a zip, a tar or a folder. Raises ValueError for an archive that is
    damaged, encrypted or compressed in a way that is not known."""
    try:
        if path.is_dir():
            yield _folder_members(path)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield _zip_members(archive)
        else:
            with tarfile.open(path) as archive:
                yield _tar_members(archive)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged or no archive: {error}") from error
    except RuntimeError as error:  # zipfile's words for a password or a compression it knows not
        raise ValueError(f"{path} cannot be read: {error}") from error


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16 & 0o170000
        if not info.is_dir() and mode in (0, 0o100000):
            yield Member(info.filename, info.file_size, _copier(archive.open, info))


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        if info.isreg():
            yield Member(info.name, info.size, _copier(archive.extractfile, info))


def _folder_members(folder: Path) -> Iterator[Member]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if file.is_file():
                relative = file.relative_to(folder).as_posix()
                yield Member(relative, file.stat().st_size, _linker(file))


def _copier(open_member: Callable[[Any], IO[bytes] | None], info: Any) -> Callable[[Path], None]:
    def copy(target: Path) -> None:
        source = open_member(info)
        assert source is not None
        with source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        target.chmod(0o644)  # a temporary file is private

    return copy


def _linker(file: Path) -> Callable[[Path], None]:
    def copy(target: Path) -> None:
        target.unlink()
        try:
            os.link(file.resolve(), target)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(file, target)

    return copy


def place(member: Member, target: Path) -> bool:
    """Write a file of an archive whole or not at all; False if it is there already."""
    with contextlib.suppress(OSError):
        if target.stat().st_size == member.size:
            return False
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    os.close(handle)
    try:
        member.copy(Path(name))
        if Path(name).stat().st_size != member.size:
            raise ValueError(f"{member.path}: ends before its {member.size} bytes")
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return True

"""Small things every part shares: logging, seeds, files that are never half written, clear errors.

Special here: torch is imported only where a function needs it, so that ``llava --help`` stays fast,
and ``user_errors`` is the one place that decides how a user's mistake looks: one line on stderr,
exit code 2, no traceback (``LLAVA_DEBUG=1`` shows it). Try it:
``llava flops --preset llava-1.5-7b --layer_list "[24,8]" --image_token_ratio_list "[0.5,0.25]"``.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import hashlib
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

Item = TypeVar("Item")

USER_ERRORS = (ValueError, OSError)
"""What ``user_errors`` calls a user's mistake: bad values (JSON and Unicode errors are ValueErrors)
and files (FileNotFoundError and PIL's UnidentifiedImageError are OSErrors)."""

_VERSIONED = (
    "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "bitsandbytes",
    "numpy", "pillow", "safetensors",
)  # fmt: skip


# ----------------------------------------------------------------------------- logging, progress
class Ranks(NamedTuple):
    """Which of how many processes this is; `local`: its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """From torchrun's RANK and WORLD_SIZE, else Slurm's SLURM_PROCID and SLURM_NTASKS, without
        touching torch. ValueError for a rank that does not fit."""
        env = os.environ
        for rank, world, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            if rank in env and world in env:
                found = cls(*(_whole_number(name) for name in (rank, world, local)))
                if not 0 <= found.rank < found.world:
                    raise ValueError(f"{rank}={env[rank]} does not fit {world}={env[world]}")
                return found
        return cls()


def rank() -> int:
    """Rank of this process in a distributed run (0 when there is none), without touching torch."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(text) if text.isdecimal() else 0  # `Ranks` complains of another one


def _whole_number(name: str) -> int:
    """A variable of the environment, 0 when it is not set. ValueError names it."""
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; accepted: a whole number")
    return int(text)


class _Lines(logging.Formatter):
    """``07:01:50 message``; the level stands in front of what is no mere information, the rank in
    front of what a rank above 0 says, and with ``LLAVA_LOG=debug`` the module."""

    def format(self, record: logging.LogRecord) -> str:
        words = [self.formatTime(record, "%H:%M:%S")]
        if rank():
            words.append(f"[rank {rank()}]")
        if record.levelno != logging.INFO:
            words.append(record.levelname)
        if logging.getLogger("llava").level <= logging.DEBUG:
            words.append(f"{record.name}:")
        return " ".join([*words, super().format(record)])


def get_logger(name: str) -> logging.Logger:
    """A logger that writes lines to stderr (`_Lines`); ranks above 0 warn only.

    ``LLAVA_LOG=debug|info|warning|error`` sets the level (default ``info``).
    """
    root = logging.getLogger("llava")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines())
        root.addHandler(handler)
        root.propagate = False
        level = os.environ.get("LLAVA_LOG", "info").upper()
        if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            root.warning("LLAVA_LOG=%s is not used; accepted: debug, info, warning, error", level)
            level = "INFO"
        root.setLevel(level if rank() == 0 else max(logging.getLevelName(level), logging.WARNING))
    return root if name == "llava" else root.getChild(name.removeprefix("llava."))


def warn_once_for_all(logger: logging.Logger, message: str, *args: object) -> None:
    """A warning that every rank has the same reason for: rank 0 gives it, no other does."""
    if rank() == 0:
        logger.warning(message, *args)


def quiet_libraries() -> None:
    """Leave out what libraries say over and over and no user can do anything about: torch's word on
    old names that DeepSpeed and FSDP2 call (a line for every collective of every step), and
    bitsandbytes' on one kernel for CPUs (when it is imported)."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_hint)


def _is_no_kernel_hint(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


_quiet = contextvars.ContextVar("quiet", default=False)
LOG_SECONDS = 30.0
"""How often a bar is drawn where it goes into a file."""


def progress(
    iterable: Iterable[Item],
    desc: str = "",
    total: int | None = None,
    *,
    unit: str = "it",
    done: int = 0,
) -> Iterable[Item]:
    """``iterable`` with a bar on stderr: rate and time left; drawn every half minute where stderr
    is a file. Silent on ranks above 0 and with ``LLAVA_PROGRESS=0``. done: items of ``total`` that
    an earlier attempt dealt with."""
    from tqdm import tqdm

    every = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    off = rank() != 0 or _quiet.get() or os.environ.get("LLAVA_PROGRESS", "1") == "0"
    return tqdm(
        iterable, desc=desc, total=total, unit=unit, initial=done, file=sys.stderr, disable=off,
        dynamic_ncols=True, mininterval=every, maxinterval=max(every, 10.0),
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block no new progress bar appears and loggers only warn.

    For a caller that shows one bar of its own over many calls.
    """
    root = get_logger("llava")
    level, token = root.level, _quiet.set(True)
    root.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        root.setLevel(level)
        _quiet.reset(token)


# ----------------------------------------------------------------------------- files
@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and move it there when the block ends without error.

    Parent folders are made. An interrupted or failing block leaves ``path`` as it was.

    Raises:
        ValueError: ``mode`` is neither ``"w"`` nor ``"wb"``.
        OSError: it cannot be written, with ``path`` as its file name.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode {mode!r}; accepted: 'w', 'wb'")
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    prefix, name = f".{target.name}.", None
    try:
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".tmp")
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        open_to_readers(name)
        os.replace(name, target)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if isinstance(error, OSError) and _of_the_file(error, prefix):
            raise OSError(error.errno, os.strerror(error.errno or 0), str(target)) from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _of_the_file(error: OSError, prefix: str) -> bool:
    """Whether an error is about a temporary file of ours, and not about one that was read."""
    if isinstance(error.filename, str):
        return os.path.basename(error.filename).startswith(prefix)
    return error.errno in _FULL  # of a write, which knows no name


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder with its parents; nothing where it is there. NotADirectoryError, by name, for a
    file in its place or in that of a parent."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
        ) from None


def check_output(
    path: str | os.PathLike[str] | None, reads: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """See that a file can be written, before the work whose result it is to hold; None is no file.

    Raises:
        ValueError: it is one of `reads`, which would be lost.
        OSError: a folder is there, or it cannot be made, by name.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if any(target.exists() and os.path.samefile(target, read) for read in reads):
        raise ValueError(f"{path} would be written over what is read from it; give another file")
    there = next(place for place in (target, *target.absolute().parents) if place.exists())
    if there.is_file() and there != target:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def open_to_readers(path: str | os.PathLike[str]) -> None:
    """Give a file, or a folder with its files, the rights that the umask grants to new ones: what
    tempfile and safetensors make is for its owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    if os.path.isdir(path):
        for file in Path(path).iterdir():
            open_to_readers(file)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


def json_dump(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically.

    Raises:
        ValueError: ``obj`` holds NaN or infinity, which JSON does not know.
        TypeError: ``obj`` holds something JSON cannot say.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


# ----------------------------------------------------------------------------- runs
def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a value's JSON text, in hex; dictionaries in the order they have."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (numpy and torch if installed)."""
    random.seed(seed)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed % 2**32)
    with contextlib.suppress(ImportError):
        import torch

        torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code: versions, processor, threads, device, commit."""
    from importlib import metadata

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["cpu"] = _cpu_name()
    found["cpu_count"] = os.cpu_count()
    found["commit"] = _commit()
    with contextlib.suppress(ImportError):
        import torch

        found["threads"] = torch.get_num_threads()
        cuda = torch.cuda.is_available()
        found["gpu"] = torch.cuda.get_device_name() if cuda else None
        found["cuda"] = torch.version.cuda if cuda else None
    return found


def _cpu_name() -> str:
    """The processor's name as the system gives it, e.g. ``Intel(R) Xeon(R) CPU``."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, ``+`` behind it when files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


# ----------------------------------------------------------------------------- errors
@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Decorator and context for entry points: bad input ends in one line and exit code 2.

    Catches ``USER_ERRORS`` (ValueError, OSError), prints ``error: <message>`` on stderr and exits
    with 2; Ctrl-C ends in one word and 130. ``LLAVA_DEBUG=1`` lets the exception through with its
    traceback. Anything else is a bug of ours and keeps its traceback.

    >>> @user_errors()
    ... def main(argv=None): ...
    """
    if os.environ.get("LLAVA_DEBUG", "0") not in ("", "0"):
        yield
        return
    try:
        yield
    except BrokenPipeError:  # `llava ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except USER_ERRORS as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {describe_error(error)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


def describe_error(error: BaseException) -> str:
    """One line that says what went wrong, without the class name where the text is enough."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    text = " ".join(str(error).split())
    return text or type(error).__name__

"""Files are never half written, errors are one line, seeds seed everything."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import stat
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from llava import utils


def test_atomic_write_replaces_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with utils.atomic_write(target) as file:
        file.write("first")

    def fail_half_way() -> None:
        with utils.atomic_write(target) as file:
            file.write("second")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_atomic_write_bytes_and_permissions(tmp_path: Path) -> None:
    with utils.atomic_write(tmp_path / "b.bin", "wb") as file:
        file.write(b"\x00\x01")
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\x01"
    plain = tmp_path / "plain"
    plain.touch()
    mode = stat.S_IMODE(os.stat(tmp_path / "b.bin").st_mode)
    assert mode == stat.S_IMODE(os.stat(plain).st_mode)


@pytest.mark.parametrize("mode", ["a", "r", "w+"])
def test_atomic_write_refuses_other_modes(tmp_path: Path, mode: str) -> None:
    with (
        pytest.raises(ValueError, match=r"accepted: 'w', 'wb'"),
        utils.atomic_write(tmp_path / "c", mode),
    ):
        pass


def test_json_dump_round_trip_and_nan(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    utils.json_dump(path, {"λ": [0.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": [0.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        utils.json_dump(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": [0.5, None]}


def test_set_seed_seeds_all_three() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    utils.set_seed(7)
    first = draw()
    utils.set_seed(7)
    assert draw() == first
    utils.set_seed(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_environment_names_what_ran() -> None:
    found = utils.environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("ratio 2 is\n  too large"), "error: ratio 2 is too large\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png\n"),
        (OSError("cannot identify image file"), "error: cannot identify image file\n"),
    ],
)
def test_user_errors_is_one_line_and_exit_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("LLAVA_DEBUG", raising=False)

    @utils.user_errors()
    def main() -> None:
        raise error

    for _ in range(2):  # the decorator can be used again
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        written = capsys.readouterr().err
        assert written.startswith("error: ")
        assert written.endswith(line)
        assert written.count("\n") == 1


def test_user_errors_keeps_bugs_and_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_DEBUG", raising=False)
    with pytest.raises(KeyError), utils.user_errors():
        raise KeyError("ours")
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises(ValueError, match="shown"), utils.user_errors():
        raise ValueError("shown")


def test_ctrl_c_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLAVA_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop, utils.user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_user_errors_passes_the_result_on() -> None:
    @utils.user_errors()
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8


def test_loggers_hang_below_one_root() -> None:
    assert utils.get_logger("llava.eval.speed").name == "llava.eval.speed"
    assert utils.get_logger("llava").name == "llava"
    own = [h for h in logging.getLogger("llava").handlers if type(h) is logging.StreamHandler]
    assert len(own) == 1


def test_a_line_says_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    (handler,) = [h for h in utils.get_logger("llava").handlers if type(h) is logging.StreamHandler]

    def line(level: int) -> str:
        record = logging.LogRecord("llava.train.fit", level, "f.py", 1, "step %d", (3,), None)
        return handler.format(record)[len("07:01:50 ") :]

    assert (line(logging.INFO), line(logging.WARNING)) == ("step 3", "WARNING step 3")
    monkeypatch.setattr(logging.getLogger("llava"), "level", logging.DEBUG)
    assert line(logging.INFO) == "llava.train.fit: step 3"
    monkeypatch.setenv("RANK", "2")
    assert line(logging.WARNING) == "[rank 2] WARNING llava.train.fit: step 3"


def test_what_all_ranks_would_warn_of_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        utils.warn_once_for_all(logging.getLogger("elsewhere"), "rank %s", number)
    assert caplog.messages == ["rank 0"]


def test_what_libraries_repeat_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Also where something resets the registry of shown warnings, as checkpointing does."""
    old = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        utils.quiet_libraries()
        warnings.warn(old, FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["something else is deprecated"]
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "x")
    log.warning("something else")
    assert caplog.messages == ["something else"]


def test_progress_passes_items_on() -> None:
    assert list(utils.progress(range(3), "x", 3)) == [0, 1, 2]


def test_quiet_hides_bars_and_talk_and_gives_them_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_PROGRESS", "1")
    root = utils.get_logger("llava")
    level = root.level
    with utils.quiet():
        assert list(utils.progress([1, 2], "hidden")) == [1, 2]
        assert root.level >= logging.WARNING
    assert capsys.readouterr().err == ""
    assert root.level == level
    assert list(utils.progress([1, 2], "shown")) == [1, 2]
    assert "shown" in capsys.readouterr().err


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path, monkeypatch) -> None:
    """... and named: a folder, a file for a folder, what is read, through a link too."""
    mine = tmp_path / "data.json"
    mine.write_text("mine")
    (tmp_path / "link.json").symlink_to(mine)
    for path, error in (
        (tmp_path, IsADirectoryError),
        (mine / "below" / "x.json", NotADirectoryError),
        (mine, ValueError),
        (tmp_path / "link.json", ValueError),
    ):
        with pytest.raises(error) as found:
            utils.check_output(path, [mine, tmp_path / "absent"])
        assert str(path if error is not NotADirectoryError else mine) in str(found.value)
    for path in (None, tmp_path / "new" / "deep" / "x.json", tmp_path / "other.json"):
        utils.check_output(path, [mine])
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(PermissionError, match="Permission denied") as denied:
        utils.check_output(tmp_path / "new" / "deep" / "x.json")
    assert denied.value.filename == str(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.json", "link.json"]


def test_errors_of_writing_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for path, error, named in (
        ("folder", IsADirectoryError, "folder"),
        ("file/x", NotADirectoryError, "file"),
    ):
        with pytest.raises(error) as found, utils.atomic_write(tmp_path / path):
            pass
        assert found.value.filename == str(tmp_path / named)
    with pytest.raises(OSError, match="No space left") as full, utils.atomic_write(tmp_path / "y"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(tmp_path / "y")
    with pytest.raises(FileNotFoundError) as read, utils.atomic_write(tmp_path / "y"):
        (tmp_path / "absent").read_text()
    assert read.value.filename == str(tmp_path / "absent")  # another file's error stays its own
    assert not (tmp_path / "y").exists()

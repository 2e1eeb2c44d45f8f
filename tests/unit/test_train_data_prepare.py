"""`llava data prepare-train`: small archives of every kind into LLaVA's folders."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from llava.cli import main
from llava.train import data_prepare
from llava.train.data_prepare import Matcher
from llava.train.records import Records
from llava.train.train_sets import TRAIN_SETS, list_lines

PICTURES = {
    "coco/train2017/000000033471.jpg": b"coco",
    "gqa/images/2354786.jpg": b"gqa picture",
    "vg/VG_100K/2354786.jpg": b"the same name elsewhere",
    "vg/VG_100K_2/1.jpg": b"vg two",
    "ocr_vqa/images/1437717772.jpg": b"GIF89a by another name",
    "ocr_vqa/images/bound.jpg": b"a jpeg",
    "textvqa/train_images/0a.jpg": b"text",
}


def record(number: int, image: str | None) -> dict:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "that"}]
    return {"id": str(number), "conversations": turns} | ({"image": image} if image else {})


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("images/2354786.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """The archives of mix665k as they may come: other top folders, a tar, a folder, a GIF, files
    that nobody asked for and names that climb out."""
    folder = tmp_path / "downloads"
    write_zip(
        folder / "train2017.zip",
        {"train2017/000000033471.jpg": b"coco", "train2017/000000000001.jpg": b"not needed",
         "../../evil.jpg": b"evil", "../coco/train2017/../../evil2.jpg": b"evil"},
    )  # fmt: skip
    write_tar(folder / "gqa.tar.gz", {"data/images/2354786.jpg": b"gqa picture"})
    write_zip(folder / "vg_1" / "images.zip", {"VG_100K/2354786.jpg": b"the same name elsewhere"})
    write_zip(folder / "images2.zip", {"VG_100K_2/1.jpg": b"vg two"})
    write_zip(folder / "train_val_images.zip", {"train_images/0a.jpg": b"text"})
    ocr = tmp_path / "loader" / "images"
    ocr.mkdir(parents=True)
    (ocr / "1437717772.gif").write_bytes(b"GIF89a by another name")
    (ocr / "bound.jpg").write_bytes(b"a jpeg")
    (ocr / "bound.jpg").chmod(0o600)
    samples = [record(i, name) for i, name in enumerate([*PICTURES, None])]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(samples))
    return folder


def prepare(tmp_path: Path, *more: str, name: str = "mix665k") -> int:
    command = ["data", "prepare-train", name, "--archives", str(tmp_path / "downloads"),
               "--archive", f"ocr_vqa={tmp_path / 'loader'}",
               "--data-root", str(tmp_path / "data"), *more]  # fmt: skip
    return main(command)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_folders_are_what_the_json_names(tmp_path, downloads, capsys):
    assert prepare(tmp_path, "--json", str(tmp_path / "report.json")) == 0
    found = files_below(tmp_path / "data")
    annotations = found.pop("llava_v1_5_mix665k.json")
    assert found == PICTURES
    assert annotations == (downloads / "llava_v1_5_mix665k.json").read_bytes()
    assert not list(tmp_path.rglob("evil*"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["written"] == len(PICTURES)
    assert report["pictures"]["ocr_vqa/images"] == 2
    assert "coco: 1 samples, 364100 in the published file" in capsys.readouterr().out
    linked = tmp_path / "data" / "ocr_vqa" / "images" / "bound.jpg"
    assert os.stat(linked).st_nlink == 2  # a folder's files are not copied
    assert os.stat(linked).st_mode & 0o777 == 0o600  # they are the user's, as they were
    assert os.stat(tmp_path / "data" / "gqa/images/2354786.jpg").st_mode & 0o777 == 0o644
    shutil.rmtree(downloads)
    assert prepare(tmp_path) == 0  # nothing is asked for that is there


def test_an_archive_that_python_cannot_unpack_is_named(tmp_path, downloads, capsys):
    """Deflate64, as Windows writes large zips, and a password: both in the headers alone."""
    archive = downloads / "train2017.zip"
    whole = archive.read_bytes()
    for at, value, reason in ((8, 9, "compression"), (6, 1, "encrypted")):
        content = bytearray(whole)
        for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            found = content.find(mark)
            while found >= 0:
                content[found + at + shift] = value
                found = content.find(mark, found + 4)
        archive.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            prepare(tmp_path, "--only", "coco")
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{archive} cannot be read" in error
        assert reason in error


@pytest.mark.parametrize("path", [".", "/etc/passwd", "a/../../b", "a\\b"])
def test_a_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(ValueError, match=r"sample 0: image path .* leaves the data folder"):
        data_prepare.survey(Records.of([record(0, path)]))


def test_an_interrupted_call_goes_on(tmp_path, downloads, monkeypatch):
    """Nothing is half there, and what is whole is not written again."""
    place, calls = data_prepare.place, []

    def stop(member, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place(member, target)

    monkeypatch.setattr(data_prepare, "place", stop)
    with pytest.raises(SystemExit) as stopped:
        prepare(tmp_path)
    assert stopped.value.code == 130
    half = files_below(tmp_path / "data")
    assert half.items() <= PICTURES.items()
    assert len(half) == 2
    monkeypatch.setattr(data_prepare, "place", place)
    report = tmp_path / "report.json"
    assert prepare(tmp_path, "--json", str(report)) == 0
    assert json.loads(report.read_text())["written"] == len(PICTURES) - 2


def test_missing_pictures_are_named_and_hold_the_json_back(tmp_path, downloads, capsys):
    (tmp_path / "loader" / "images" / "bound.jpg").unlink()
    assert prepare(tmp_path) == 1
    out = capsys.readouterr().out
    assert "ocr_vqa/images: 1 pictures, 1 MISSING" in out
    assert "missing: ocr_vqa/images/bound.jpg" in out
    assert not (tmp_path / "data" / "llava_v1_5_mix665k.json").exists()
    assert prepare(tmp_path, "--allow-missing") == 1
    assert (tmp_path / "data" / "llava_v1_5_mix665k.json").exists()


@pytest.mark.parametrize("kind", ["cut", "flipped", "no archive", "tar cut"])
def test_a_damaged_archive_is_named(tmp_path, downloads, capsys, kind):
    path = downloads / "train2017.zip"
    if kind == "tar cut":
        path = downloads / "gqa.tar.gz"
        write_tar(path, {"images/2354786.jpg": os.urandom(50000)})
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        at = content.index(b"000000033471.jpg") + 18
        content[at] ^= 0xFF
    path.write_bytes({"no archive": b"<html>"}.get(kind, content if kind == "flipped"
                                                   else content[: len(content) // 2]))  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "Traceback" not in error
    assert not list((tmp_path / "data").rglob("*.tmp"))
    assert not (tmp_path / "data" / "coco" / "train2017" / "000000033471.jpg").exists() or (
        kind == "tar cut"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: shutil.rmtree(d / "vg_1"), "no archive of vg_1 (looked for"),
        (lambda d: (d / "llava_v1_5_mix665k.json").unlink(), "LLaVA-Instruct-150K"),
        (
            lambda d: (d / "llava_v1_5_mix665k.json").write_text(
                json.dumps([record(0, "coco/../../evil.jpg")])
            ),
            "leaves the data folder",
        ),
        (
            lambda d: (d / "llava_v1_5_mix665k.json").write_text(
                json.dumps([record(0, "/etc/evil.jpg")])
            ),
            "leaves the data folder",
        ),
    ],
)
def test_what_cannot_be_prepared_is_said(tmp_path, downloads, capsys, change, message):
    change(downloads)
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_wrong_names_a_full_disk_and_one_part_alone(tmp_path, downloads, capsys, monkeypatch):
    for more in (["--only", "cocoa"], ["--archive", "nothing=here"], ["--archive", "coco"]):
        with pytest.raises(SystemExit):
            prepare(tmp_path, *more)
        assert "accepted" in capsys.readouterr().err
    full = shutil._ntuple_diskusage(10, 9, 1)
    with monkeypatch.context() as patch:
        patch.setattr(data_prepare.shutil, "disk_usage", lambda path: full)
        with pytest.raises(SystemExit):
            prepare(tmp_path, "--only", "coco")
    assert "GB left" in capsys.readouterr().err
    assert prepare(tmp_path, "--only", "coco") == 1
    assert list(files_below(tmp_path / "data")) == ["coco/train2017/000000033471.jpg"]


def test_pictures_below_folders_of_other_sets(tmp_path):
    """LLaVA-Pretrain's numbered folders, and one archive that fills many folders."""
    downloads = tmp_path / "downloads"
    write_zip(
        downloads / "images.zip", {"00453/004539375.jpg": b"a", "00453/x/004539375.jpg": b"b"}
    )
    (downloads / "blip_laion_cc_sbu_558k.json").write_text(
        json.dumps([record(0, "00453/004539375.jpg")])
    )
    command = ["data", "prepare-train", "pretrain558k", "--archives", str(downloads),
               "--data-root", str(tmp_path / "data")]  # fmt: skip
    assert main(command) == 0
    assert files_below(tmp_path / "data" / "LLaVA-Pretrain").keys() == {
        "blip_laion_cc_sbu_558k.json", "images/00453/004539375.jpg"
    }  # fmt: skip
    collection = next(p for p in TRAIN_SETS["mix1m"].parts if p.name == "vqa_collection")
    match = Matcher(collection, {"ai2d/images/1.png": None, "dvqa/images/1.png": None})
    assert match("vqa/dvqa/images/1.png") == "dvqa/images/1.png"
    assert match("images/1.png") is None


def test_the_list_and_the_page_name_every_file(capsys):
    assert main(["data", "prepare-train", "mix1m", "--list"]) == 0
    assert "vqa_collection.zip (30.2 GB)" in capsys.readouterr().out
    page = (Path(__file__).resolve().parents[2] / "docs" / "Data.md").read_text()
    for name, chosen in TRAIN_SETS.items():
        assert len(list_lines(name)) == 1 + 3 * len(chosen.parts)
        for part in (chosen, *chosen.parts):
            assert part.link in page
            assert (part.data if part is chosen else part.archive) in page
            assert part.size in page

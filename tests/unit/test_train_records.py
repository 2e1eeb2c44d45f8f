"""Training files: what is read, what is refused, mixtures, and the mapped copy that ranks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from llava.train import records as module
from llava.train.records import Records, Source, parse_sources
from llava.utils import file_sha256


def sample(ident: str, words: int = 2, image=None, **more) -> dict:
    turns = [
        {"from": "human", "value": "what " * words},
        {"from": "gpt", "value": "Grüße, „rot“ \\ \n"},
    ]
    return {
        "id": ident,
        "conversations": turns,
        **({} if image is None else {"image": image}),
    } | more


RECORDS = [
    sample("a"),
    sample("b", 5, "one.png"),
    sample("c", 1, ["one.png", "two.png"], model="x", score=0.5),
    sample("d", 3, []),
    {"id": 7, "conversations": "none"},
]


def write(path, records) -> str:
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(record) for record in records) + "\n\n"
    else:
        text = json.dumps(records, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("small", [0, module.SMALL_FILE])
def test_every_form_holds_the_same_samples(tmp_path, name, small):
    """A list and lines, in memory and mapped; columns of any shape, keys of any kind."""
    records = [*RECORDS, {"id": 8, "conversations": 5}, {"conversations": [{"value": 5}, "red"]}]
    path = write(tmp_path / name, records)
    found = Records.open(path, cache_dir=tmp_path / "cache", small=small)
    assert list(found) == records
    assert found.words.tolist() == [5, 8, 4, 6, 0, 0, 0]
    assert found.pictured.tolist() == [False, True, True, False, False, False, False]
    assert found.place(3) == (path, 3, 0)
    assert found.data_hash == file_sha256(tmp_path / name)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == (small == 0)
    with pytest.raises(IndexError):
        found[len(records)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{not json", "not JSON"),
        ("a.json", '{"a": 1}', "list of samples"),
        ("a.json", "3", "list of samples"),
        ("a.json", "[]", "no sample"),
        ("a.json", "", "list of samples"),
        ("a.json", '[{"id": 1}, {oops}]', "record 1 is not JSON"),
        ("a.json", '[{"id": 1} {"id": 2}]', "record 0 is not JSON"),
        ("a.json", '[{"id": 1},', "record 1 is not JSON"),
        ("a.json", "[{}] x", "behind the list"),
        ("a.json", "[{}, 3]", "record 1 must be an object"),
        ("a.jsonl", "\n", "no sample"),
        ("a.jsonl", '{"id": 1}\n{oops\n', "record 1 is not JSON"),
        ("a.json", b"[\xff]", "not JSON"),
        ("a.json", '[{"id": 1}]'.encode("utf-16"), "not JSON"),
        ("a.json", '{"id": 1}\n{"id": 2}\n', r"need the ending \.jsonl"),
        ("a.json", "[" * 100_000, "record 0 is not JSON"),
        ("a.jsonl", '{"id": ' + "[" * 100_000, "record 0 is not JSON"),
    ],
)
@pytest.mark.parametrize("small", [0, module.SMALL_FILE])
def test_bad_files_are_refused(tmp_path, name, text, message, small):
    """By name, and without leaving a half-written copy."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        Records.open(tmp_path / name, cache_dir=tmp_path / "cache", small=small)
    assert not [file for file in (tmp_path / "cache").glob("*") if file.suffix != ".lock"]


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", RECORDS)

    def full(target, rows):
        with module.atomic_write(target, "wb") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_arrow", full)
        with pytest.raises(OSError, match="No space left"):
            Records.open(path, cache_dir=tmp_path / "cache", small=0)
    assert list(Records.open(path, cache_dir=tmp_path / "cache", small=0)) == RECORDS


def test_what_data_path_may_say(tmp_path):
    a, b = write(tmp_path / "a.json", RECORDS), write(tmp_path / "b,c@2.jsonl", RECORDS[:1])
    assert parse_sources(b) == [Source(tmp_path / "b,c@2.jsonl")]
    assert [(s.path.name, s.weight) for s in parse_sources(f"{a}@0.5, {a}@2,{a}")] == [
        ("a.json", 0.5), ("a.json", 2.0), ("a.json", 1.0)
    ]  # fmt: skip
    mixture = {"datasets": [{"path": "a.json", "weight": 0.5, "image_folder": "x"}]}
    (tmp_path / "mix.json").write_text(json.dumps(mixture))
    (tmp_path / "mix.yaml").write_text("datasets:\n- {path: a.json, weight: .5, image_folder: x}\n")
    expected = [Source(tmp_path / "a.json", 0.5, str(tmp_path / "x"))]
    assert parse_sources(tmp_path / "mix.json") == parse_sources(tmp_path / "mix.yaml") == expected
    assert Records.open(tmp_path / "mix.json").image_folder(0) == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.json@0", "weight 0.0"),
        ("a.json@1e999", "weight inf"),
        (",", "no data file"),
        ("bad.yaml", "not YAML"),
        ("key.json", "unknown key.*ratio.*path, weight"),
        ("none.json", "with a 'path'"),
        ("word.json", "weight 'half'"),
        ("a.json@0.01", "leaves no sample"),
        ("true.json", "weight True"),
        ("wide.yaml", "wide.yaml is not YAML"),
    ],
)
def test_mixtures_that_say_nothing_are_refused(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", RECORDS)
    (tmp_path / "bad.yaml").write_text("datasets: [}")
    (tmp_path / "wide.yaml").write_text("datasets: []", encoding="utf-16")
    for name, entry in {
        "key": {"path": "a.json", "ratio": 1}, "none": {}, "word": {"path": "a.json",
                                                                  "weight": "half"},
        "true": {"path": "a.json", "weight": True},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"datasets": [entry]}))
    with pytest.raises(ValueError, match=message):
        Records.open(spec)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Records.open("a.json,nowhere.json@2")


def test_weights_repeat_and_draw(tmp_path):
    """Whole parts repeat, the rest is drawn without repetition, by the seed alone."""
    many = [sample(str(i)) for i in range(100)]
    a, b = write(tmp_path / "a.json", many), write(tmp_path / "b.json", RECORDS)
    spec = f"{a}@0.25,{b}@2.4"
    one, again, other = (Records.open(spec, seed=seed) for seed in (3, 3, 4))
    drawn = [one.place(i).number for i in range(25)]
    assert len(one) == 25 + 12
    assert len(set(drawn)) == 25
    assert drawn == sorted(drawn)
    assert [one.place(i).number for i in range(25, 37)][:10] == [0, 1, 2, 3, 4] * 2
    assert list(one) == list(again)
    assert one.data_hash == again.data_hash
    assert list(one) != list(other)
    assert one.data_hash != other.data_hash
    assert one.words.tolist() == [module.count_words(record) for record in one]
    assert Records.open(f"{a}@2", seed=3).data_hash == Records.open(f"{a}@2", seed=4).data_hash


def test_samples_can_be_left_out(tmp_path):
    a, b = write(tmp_path / "a.json", RECORDS), write(tmp_path / "b.json", RECORDS[:2])
    whole = Records.open(f"{a},{b}@2")
    assert whole.once() == [0, 1, 2, 3, 4, 5, 6]
    part = whole.without([(0, 1), (1, 0)])
    assert [part.place(i)[:2] for i in range(len(part))] == [
        (a, 0), (a, 2), (a, 3), (a, 4), (b, 1), (b, 1)
    ]  # fmt: skip
    assert part.once() == [0, 1, 2, 3, 4]
    assert part[1] == RECORDS[2]
    assert part.words.tolist() == [5, 4, 6, 0, 8, 8]
    assert part.data_hash != whole.data_hash
    for samples in ([(0, 5)], [(2, 0)]):
        with pytest.raises(ValueError, match="there is no sample"):
            whole.without(samples)
    with pytest.raises(ValueError, match="not one sample"):
        Records.open(b).without([(0, 0), (0, 1)])


def test_a_list_of_samples_holds_for_its_data_alone(tmp_path):
    a, b = write(tmp_path / "a.json", RECORDS), write(tmp_path / "b.json", RECORDS[1:])
    listed = {"data_hash": Records.open(a).data_hash, "samples": [{"source": 0, "number": 2}]}
    (tmp_path / "bad.json").write_text(json.dumps(listed))
    assert len(Records.open(a).without_listed(tmp_path / "bad.json")) == 4
    with pytest.raises(ValueError, match="other data"):
        Records.open(b).without_listed(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no list of samples"):
        Records.open(b).without_listed(b)


WRITER = """
import sys, time
from llava.train import records
slow, read = len(sys.argv) > 3, records.read_rows
def rows(path):
    print("written", flush=True)
    for row in read(path):
        yield row
        time.sleep(0.2 * slow)
records.read_rows = rows
print(len(records.Records.open(sys.argv[1], cache_dir=sys.argv[2], small=0)))
"""


def test_one_rank_writes_and_the_others_wait(tmp_path):
    """Also when the one that was writing is killed: the next writes it anew."""
    path, cache = write(tmp_path / "a.json", RECORDS), str(tmp_path / "cache")

    def start(*slow):
        command = [sys.executable, "-c", WRITER, path, cache, *slow]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))

    first = start("slow")
    assert first.stdout.readline() == "written\n"
    others = [start(), start()]
    first.kill()
    first.wait()
    outputs = sorted(other.communicate(timeout=60)[0] for other in others)
    assert outputs == ["5\n", "written\n5\n"]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_a_mapped_file_is_shared_not_copied(tmp_path):
    """The text of a mapped file lives in the file; a worker process gets it by name."""
    import pickle

    path = write(tmp_path / "a.jsonl", [sample(str(i), 200) for i in range(2000)])
    found = Records.open(path, cache_dir=tmp_path / "cache", small=0)
    content = pickle.dumps(found)
    assert len(content) < 0.1 * os.path.getsize(path)
    again = pickle.loads(content)
    assert again[1999] == found[1999]
    assert np.array_equal(again.words, found.words)


def test_what_others_wrote_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.json", RECORDS), tmp_path / "cache"
    Records.open(path, cache_dir=cache, small=0)
    monkeypatch.setattr("filelock.FileLock.acquire", mock.Mock(side_effect=PermissionError("no")))
    assert Records.open(path, cache_dir=cache, small=0)[4] == RECORDS[4]
    for folder, reason in ((tmp_path / "new", "no"), (Path(path) / "below", "a.json")):
        with pytest.raises(OSError, match=rf"cannot be written .*{reason}.*--data_cache_dir"):
            Records.open(path, cache_dir=folder, small=0)


def test_a_changed_file_is_other_data(tmp_path):
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    hashes = []
    for records in (RECORDS, RECORDS[1:]):
        write(path, records)
        found = Records.open(path, cache_dir=cache, small=0)
        assert list(found) == records
        hashes.append(found.data_hash)
    assert len(set(hashes)) == len(list(cache.glob("*.arrow"))) == 2


@pytest.mark.parametrize("small", [0, module.SMALL_FILE])
def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch, small):
    """Its samples would be kept under the hash of those before."""
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    write(path, RECORDS)

    def hashed_then_changed(file: Path) -> str:
        found = file_sha256(file)
        write(file, RECORDS[1:])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "file_sha256", hashed_then_changed)
        with pytest.raises(ValueError, match=r"a\.json was changed while it was read"):
            Records.open(path, cache_dir=cache, small=small)
    assert not list(cache.glob("*.arrow"))
    assert list(Records.open(path, cache_dir=cache, small=small)) == RECORDS[1:]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": ["a.png", 3]}, "a path or a list of paths"),
        ({"image": [["a.png"]]}, "a path or a list of paths"),
        ({"image": {"path": "a.png"}}, "a path or a list of paths"),
        ({"video": "a.mp4"}, "frames as a list of pictures"),
    ],
)
def test_what_names_no_pictures_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        module.image_names(record)

"""The samples of LLaVA's training files: one JSON list, JSONL, or several of them with weights.

Special here: a sample stays the JSON text that it is in its file until somebody asks for it, beside
the two columns that samplers read (words, and whether it has a picture). A file above `SMALL_FILE`
bytes is written once as an Arrow file, named by the hash of its content, and mapped into memory
from then on, so that all ranks and data workers of a machine share one copy; the first process
writes it whole or not at all, the others wait for it. `data_hash` says what a run was trained on.

A file holds ``{"id", "image": path or [paths] (optional), "conversations": [{"from", "value"},
...]}``; further keys are kept. ``--data_path`` names

    data.json                      one file
    a.json,b.jsonl@0.5             several; a weight behind @ (0.5: half of its samples, 2: twice)
    mixture.yaml                   {datasets: [{path, weight, image_folder}, ...]}, as YAML or JSON

``python -m llava.train.train --data_path mixture.yaml ...``
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.utils import atomic_write, file_sha256, get_logger, json_sha256

logger = get_logger(__name__)

SMALL_FILE = 16 * 2**20
"""Files up to this many bytes are read into memory instead of being mapped."""
FORMAT = "records-v1"
"""Part of the name of an Arrow file; another one when its columns change."""
MIXTURE_KEYS = ("path", "weight", "image_folder")
_BATCH = 2048
_SPACE = re.compile(r"\s*")
_WEIGHT = re.compile(r"(?P<path>.+)@(?P<weight>[0-9.]+(e-?[0-9]+)?)")


# -------------------------------------------------------------------------------- what is asked for
@dataclass(frozen=True)
class Source:
    """One file of a mixture. weight: how often its samples are seen in an epoch; the part behind
    the point is drawn. image_folder: in place of the run's own."""

    path: Path
    weight: float = 1.0
    image_folder: str | None = None


def parse_sources(spec: str | os.PathLike[str]) -> list[Source]:
    """The files that ``--data_path`` names.

    Raises FileNotFoundError for a file that is not there, ValueError for a weight or a mixture file
    that says nothing.
    """
    text = os.fspath(spec)
    parts = [text] if Path(text).is_file() else [part.strip() for part in text.split(",")]
    sources = [source for part in parts if part for source in _parse_part(part)]
    if not sources:
        raise ValueError(f"no data file in {text!r}")
    for source in sources:
        if not source.path.is_file():
            raise FileNotFoundError(f"data file not found: {source.path}")
        if not 0 < source.weight < float("inf"):
            raise ValueError(f"{source.path}: weight {source.weight}; accepted: a number above 0")
    return sources


def _parse_part(part: str) -> list[Source]:
    weighted = None if Path(part).is_file() else _WEIGHT.fullmatch(part)
    if weighted is not None:
        return [Source(Path(weighted["path"]), _number(weighted["weight"], part))]
    path = Path(part)
    if not path.is_file():
        raise FileNotFoundError(f"data file not found: {path}")
    if path.suffix in (".yaml", ".yml") or (path.suffix == ".json" and _starts(path) == "{"):
        return _read_mixture(path)
    return [Source(path)]


def _starts(path: Path) -> str:
    """First character of a text file that is no space."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        while block := file.read(4096):
            if block.strip():
                return block.strip()[0]
    return ""


def _read_mixture(path: Path) -> list[Source]:
    """Paths in a mixture file start from its own folder."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON (samples one a line need the ending .jsonl)"
        kind = kind if path.suffix == ".json" else "YAML"
        raise ValueError(f"{path} is not {kind}: {error}") from error
    except Exception as error:  # yaml's own errors are no ValueErrors
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    entries = found.get("datasets") if isinstance(found, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path} must hold a JSON list of samples, or a mixture: "
            "{datasets: [{path, weight, image_folder}, ...]}"
        )
    return [_mixture_entry(path, number, entry) for number, entry in enumerate(entries)]


def _mixture_entry(file: Path, number: int, entry: Any) -> Source:
    where = f"{file}, dataset {number}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{where} must be an object with a 'path', got {entry!r:.80}")
    unknown = [key for key in entry if key not in MIXTURE_KEYS]
    if unknown:
        raise ValueError(
            f"{where}: unknown key(s) {', '.join(map(str, unknown))}; accepted: "
            + ", ".join(MIXTURE_KEYS)
        )
    folder = entry.get("image_folder")
    return Source(
        file.parent / entry["path"],
        _number(entry.get("weight", 1), where),
        None if folder is None else os.path.abspath(file.parent / str(folder)),
    )


def _number(value: Any, where: str) -> float:
    try:
        return float("no weight" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: weight {value!r}; accepted: a number above 0") from None


# ------------------------------------------------------------------------------------ reading files
class Row(NamedTuple):
    """A sample: its JSON text, its words, whether it has a picture."""

    text: str
    words: int
    pictured: bool

    @classmethod
    def of(cls, text: str, record: Any, where: str) -> Row:
        """Raises ValueError for a record that is no object."""
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be an object, got {record!r:.60}")
        return cls(text, count_words(record), bool(record.get("image")))


def count_words(record: Mapping[str, Any]) -> int:
    """Words of all turns, as LLaVA's samplers count them; what is no turn or no text has none."""
    turns = record.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    return sum(len(text.split()) for text in texts if isinstance(text, str))


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The picture files of a record: none, one, or a list. ValueError for anything else, and for a
    video."""
    if record.get("video"):
        raise ValueError(
            f"has a video ({record['video']!r:.60}); accepted: its frames as a list of pictures in "
            "'image', each with an <image> mark"
        )
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"'image' must be a path or a list of paths, got {names!r:.60}")
    return names


def read_rows(path: Path) -> Iterator[Row]:
    """The samples of a JSON list or of JSONL, one after the other; only the text is held.

    Raises ValueError, naming file and record, for what is not JSON, no list, or empty.
    """
    count = 0
    try:
        for row in _read_lines(path) if path.suffix == ".jsonl" else _read_list(path):
            count += 1
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if count == 0:
        raise ValueError(f"{path} holds no sample")


def _read_lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        lines = (line.strip() for line in file)
        for number, line in enumerate(line for line in lines if line):
            where = f"{path}, record {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            yield Row.of(line, record, where)


def _read_list(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path} must hold a JSON list of samples")
    at = _skip(text, at + 1)
    number = 0
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            where = f"{path}, record {number}"
            try:
                record, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            yield Row.of(text[at:end], record, where)
            number, at = number + 1, _skip(text, end)
            mark, at = text[at : at + 1], _skip(text, at + 1)
            if mark == "]":
                break
            if mark != ",":
                raise ValueError(f"{where} is not JSON: followed by {mark!r}, not by a comma")
    if text[at:].strip():
        raise ValueError(f"{path} is not JSON: text behind the list")


def _skip(text: str, at: int) -> int:
    """Where the next character that is no space stands."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


# ------------------------------------------------------------------------------------------ caching
def cache_folder(named: str | os.PathLike[str] | None = None) -> Path:
    """Where Arrow files and token counts go: `named`, else ``llava`` in the cache of `datasets`
    (``HF_DATASETS_CACHE``)."""
    if named:
        return Path(named)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "llava"


def made_once(target: Path, make: Callable[[], None]) -> None:
    """Call `make`, which writes the file `target` whole or not at all, unless it is there: in one
    process, while the others (of this machine, where locks are kept to it) wait. What is there is
    taken without a lock, so a folder that was filled before may be read-only.

    Raises OSError, naming the flag, for a folder in which the file cannot be made.
    """
    from filelock import FileLock

    if target.is_file():
        return
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"{target.parent} cannot be written ({error}): name another folder (--data_cache_dir)"
        ) from error
    try:
        if not target.is_file():
            make()
    finally:
        lock.release()


class _Stamp(NamedTuple):
    """What changes when a file is written again."""

    size: int
    written_ns: int
    inode: int


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


def _rows_as_hashed(path: Path, stamp: _Stamp) -> Iterator[Row]:
    """The samples of a file; ValueError behind the last one if it is no longer what it was."""
    yield from read_rows(path)
    if _stamp(path) != stamp:
        raise ValueError(f"{path} was changed while it was read: start again when it is whole")


class _Table:
    """The rows of one file. texts: a list, or a mapped table of `datasets`."""

    def __init__(self, texts: Any, words: np.ndarray, pictured: np.ndarray) -> None:
        self.texts, self.words, self.pictured = texts, words, pictured

    def __len__(self) -> int:
        return len(self.words)

    def text(self, index: int) -> str:
        found = self.texts[index]
        return found if isinstance(found, str) else found["record"]

    @classmethod
    def in_memory(cls, rows: Iterator[Row]) -> _Table:
        texts, words, pictured = zip(*rows, strict=True)
        return cls(list(texts), np.array(words, np.int32), np.array(pictured, bool))

    @classmethod
    def mapped(cls, rows: Iterator[Row], path: Path, content: str, folder: Path) -> _Table:
        """The Arrow file of a data file with this content hash, written first if need be."""
        import pyarrow
        from datasets import Dataset

        arrow = folder / f"{FORMAT}-{content[:32]}.arrow"

        def write() -> None:
            logger.info("%s: written once as %s", path, arrow)
            _write_arrow(arrow, rows)

        made_once(arrow, write)
        try:
            table = Dataset.from_file(str(arrow))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{arrow} is damaged ({error}); delete it") from error
        columns = {name: table.data.column(name).to_numpy() for name in ("words", "pictured")}
        return cls(table, columns["words"], columns["pictured"])


def _write_arrow(target: Path, rows: Iterator[Row]) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [("record", pa.large_string()), ("words", pa.int32()), ("pictured", pa.bool_())]
    )
    with atomic_write(target, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _BATCH:
                writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))
                batch = []
        if batch:
            writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))


# ------------------------------------------------------------------------------------------ records
class Place(NamedTuple):
    """Where a sample comes from: a file, the position in it, and which file of the data it is."""

    name: str
    number: int
    source: int


class Records(Sequence[dict[str, Any]]):
    """The samples of a run, in the order of the files; what a weight repeats or leaves out is
    decided here, from the seed, and is the same in every epoch.

    words [N] and pictured [N]: what samplers read. data_hash: of the content of all samples.
    """

    def __init__(
        self,
        tables: Sequence[_Table],
        names: Sequence[str],
        rows: Sequence[np.ndarray],
        data_hash: str,
        folders: Sequence[str | None] | None = None,
    ) -> None:
        """rows: of each table, the positions that are used."""
        self._tables, self._names, self._rows = list(tables), list(names), list(rows)
        self._folders = list(folders) if folders is not None else [None] * len(tables)
        self._starts = np.cumsum([0, *map(len, rows)])
        self.data_hash = data_hash
        used = list(zip(tables, rows, strict=True))
        self.words = np.concatenate([table.words[own] for table, own in used])
        self.pictured = np.concatenate([table.pictured[own] for table, own in used])

    @classmethod
    def open(
        cls,
        spec: str | os.PathLike[str],
        *,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        small: int = SMALL_FILE,
    ) -> Records:
        """What ``--data_path`` names.

        seed: of the draw for weights that are no whole number. cache_dir: for the Arrow files.
        small: bytes up to which a file is held in memory. Raises FileNotFoundError or ValueError.
        """
        tables, rows, folders, hashes = [], [], [], []
        sources = parse_sources(spec)
        for number, source in enumerate(sources):
            stamp = _stamp(source.path)
            content = file_sha256(source.path)
            found = _rows_as_hashed(source.path, stamp)
            if stamp.size <= small:
                table = _Table.in_memory(found)
            else:
                table = _Table.mapped(found, source.path, content, cache_folder(cache_dir))
            own = draw(len(table), source.weight, (seed, number))
            if len(own) == 0:
                raise ValueError(f"{source.path}: weight {source.weight} leaves no sample")
            tables.append(table)
            rows.append(own)
            folders.append(source.image_folder)
            fraction = source.weight != int(source.weight)
            hashes.append([content, source.weight, seed if fraction else None])
        whole = (
            hashes[0][0] if len(sources) == 1 and sources[0].weight == 1 else json_sha256(hashes)
        )
        return cls(tables, [str(source.path) for source in sources], rows, whole, folders)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], name: str = "data") -> Records:
        """Records that are in memory already."""
        texts = [json.dumps(record, ensure_ascii=False) for record in records]
        pairs = enumerate(zip(texts, records, strict=True))
        rows = [Row.of(text, own, f"{name}, record {number}") for number, (text, own) in pairs]
        return cls(
            [_Table.in_memory(iter(rows))], [name], [np.arange(len(rows))], json_sha256(texts)
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        table = int(np.searchsorted(self._starts, index, side="right")) - 1
        return table, int(self._rows[table][index - self._starts[table]])

    def __getitem__(self, index: Any) -> dict[str, Any]:
        table, row = self._find(index)
        return json.loads(self._tables[table].text(row))

    def place(self, index: int) -> Place:
        """The file of a sample and its position there."""
        table, row = self._find(index)
        return Place(self._names[table], row, table)

    def image_folder(self, index: int) -> str | None:
        """The folder that a mixture file gives for the pictures of a sample."""
        return self._folders[self._find(index)[0]]

    @property
    def image_folders(self) -> list[str | None]:
        """The folders that the mixture file gives, one a data file."""
        return list(self._folders)

    def once(self) -> list[int]:
        """One index of every sample, however often weights repeat it."""
        firsts = [
            start + np.sort(np.unique(rows, return_index=True)[1])
            for start, rows in zip(self._starts, self._rows, strict=False)
        ]
        return np.concatenate(firsts).tolist()

    def without(self, samples: Iterable[tuple[int, int]]) -> Records:
        """The same without some samples, as (source, number) of their `Place`, however often they
        occur. Raises ValueError for one that is not here, or when nothing is left."""
        rows, left_out = list(self._rows), sorted(set(samples))
        for source in {source for source, _ in left_out}:
            numbers = [number for own, number in left_out if own == source]
            here = self._rows[source] if 0 <= source < len(rows) else np.array([], int)
            absent = np.setdiff1d(numbers, here)
            if len(absent):
                raise ValueError(f"there is no sample {absent[0]} of file {source} in the data")
            rows[source] = here[~np.isin(here, numbers)]
        if not sum(map(len, rows)):
            raise ValueError("not one sample is left")
        whole = json_sha256([self.data_hash, left_out])
        return Records(self._tables, self._names, rows, whole, self._folders)

    def without_listed(self, path: str | os.PathLike[str]) -> Records:
        """The same without the samples of a list that ``llava data check-train --skip_list`` wrote.

        Raises ValueError for a list that is not of this data.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            found = json.loads(text)
            samples = [(int(one["source"]), int(one["number"])) for one in found["samples"]]
            data_hash = found["data_hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no list of samples as llava data check-train --skip_list writes it: "
                f"{type(error).__name__} {error}"
            ) from error
        if data_hash != self.data_hash:
            raise ValueError(
                f"{path} was written for other data (its hash is {data_hash:.12}, this data's "
                f"{self.data_hash:.12}): check this data again"
            )
        return self.without(samples) if samples else self


def draw(size: int, weight: float, seed: Sequence[int]) -> np.ndarray:
    """Positions of `size` samples seen `weight` times: all as often as the weight is whole, and a
    draw without repetition for the rest, in the order of the file."""
    whole = int(weight)
    extra = round((weight - whole) * size)
    drawn = np.sort(np.random.default_rng([abs(part) for part in seed]).permutation(size)[:extra])
    return np.concatenate([np.tile(np.arange(size), whole), drawn])

"""`llava data prepare NAME`: a set from the Hugging Face hub in the layout LLaVA's docs describe.

    llava data prepare pope                                  # downloads, through `datasets`
    llava data prepare pope --source ~/hub/POPE              # what was downloaded before
    llava data prepare textvqa_ocr --limit 200               # a small part, to try things

Special here: the columns are looked at before a row is; pictures are written as the bytes they come
in, never encoded again; the question file and the annotations come last, whole or not at all, so
that a set is either there or not. Files that are there already are never written over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import (
    DATA_ROOT,
    Benchmark,
    benchmark_folder,
    get_benchmark,
)
from llava.eval.data_hub import HUB, ORGANISATIONS, HubSet
from llava.utils import atomic_write, get_logger, json_dump, progress, user_errors

log = get_logger(__name__)


class Output:
    """What a converter writes to: pictures at once, questions and annotations at the end."""

    def __init__(self, benchmark: Benchmark, folder: Path) -> None:
        self.benchmark, self.folder = benchmark, folder
        self.images = folder / benchmark.images
        self.questions: dict[str, list[dict[str, Any]]] = {benchmark.questions: []}
        self.files: dict[str, Any] = {}

    def question(
        self,
        question_id: int | str,
        image: str | list[str] | None,
        text: str,
        category: str = "default",
        *,
        file: str | None = None,
        **meta: Any,
    ) -> None:
        """One line of a question file (the benchmark's own, if no other is named)."""
        record = {"question_id": question_id, "image": image, "text": text, "category": category}
        if image is None:
            del record["image"]
        self.questions.setdefault(file or self.benchmark.questions, []).append(record | meta)

    def image(self, value: Mapping[str, Any] | None, name: str | None = None) -> str:
        """Write a picture below the image folder as it came, and return its name there.

        value: {"bytes", "path"} as `datasets` stores one undecoded. Without a name it is called
        after its content, so that questions about one picture share a file. Raises ValueError for a
        row without a picture.
        """
        data = _image_bytes(value)
        if data is None:
            where = name or f"question {sum(map(len, self.questions.values()))}"
            raise ValueError(f"{self.benchmark.name}: the row of {where} has no picture")
        if name is None:
            name = f"images/{hashlib.sha1(data).hexdigest()[:16]}"
        if not Path(name).suffix:
            name = f"{name}.{_ending(data)}"
        path = self.images / name
        if not path.is_file():
            with atomic_write(path, "wb") as file:
                file.write(data)
        return name

    def existing(self) -> list[Path]:
        """Files of ours that are there already."""
        names = [*self.questions, *self.benchmark.labels]
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def write(self) -> None:
        """Annotations, then questions."""
        for name, content in self.files.items():
            path = self.folder / name
            if isinstance(content, str):
                with atomic_write(path) as file:
                    file.write(content)
            elif name.endswith(".jsonl") or name.startswith("coco/"):
                _write_lines(path, content)
            else:
                json_dump(path, content)
        for name, records in self.questions.items():
            if name.endswith(".tsv"):
                continue  # MMBench's table is its own question file
            if name.endswith(".json"):
                json_dump(self.folder / name, records)
            else:
                _write_lines(self.folder / name, records)


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _image_bytes(value: Mapping[str, Any] | None) -> bytes | None:
    if value is None:
        return None
    if value.get("bytes"):
        return value["bytes"]
    return Path(value["path"]).read_bytes() if value.get("path") else None


def _ending(data: bytes) -> str:
    """File ending by the first bytes."""
    starts = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
    return next((ending for start, ending in starts.items() if data.startswith(start)), "jpg")


# ----------------------------------------------------------------------------- sources
def load_parts(hub: HubSet, source: str | None = None) -> list[Any]:
    """The tables of a set, pictures undecoded.

    source: another hub id, a folder of `save_to_disk`, or a folder with parquet files (of several
    tables: sub-folders named by their config). Raises ValueError, saying what was tried, where
    nothing can be loaded.
    """
    found = []
    for config, split in hub.parts:
        table = _load(hub, config, split, source)
        found.append(_undecoded(table))
    return found


def _load(hub: HubSet, config: str | None, split: str, source: str | None) -> Any:
    from datasets import load_dataset

    if source is not None and Path(source).exists():
        return _load_local(Path(source), config, split)
    names = [source] if source else [f"{org}/{hub.path}" for org in ORGANISATIONS]
    if source is None and "/" in hub.path:
        names = [hub.path]
    reasons = []
    for name in names:
        try:
            return load_dataset(name, config, split=split)
        except Exception as err:  # datasets raises a dozen kinds, by cause and version
            reasons.append(f"{name}: {type(err).__name__}: {str(err).splitlines()[0][:160]}")
    raise ValueError(
        f"could not load split {split!r} of {' or '.join(names)}; --source takes what was "
        f"downloaded elsewhere. {'; '.join(reasons)}"
    )


def _load_local(source: Path, config: str | None, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = source / config if config and (source / config).is_dir() else source
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        table = load_from_disk(str(folder))
        return table[split] if isinstance(table, DatasetDict) else table
    files = sorted(str(file) for file in folder.rglob("*.parquet"))
    own = [file for file in files if split in Path(file).name]
    if not files:
        raise ValueError(f"{folder} holds neither a saved data set nor parquet files")
    return load_dataset("parquet", data_files=own or files, split="train")


def _undecoded(table: Any) -> Any:
    """The same table with pictures as bytes."""
    from datasets import Image, List

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


def check_columns(hub: HubSet, tables: Sequence[Any]) -> None:
    """ValueError that shows needed beside found columns if one is missing."""
    for (config, split), table, needed in zip(hub.parts, tables, hub.columns, strict=True):
        lacking = [name for name in needed if name not in table.column_names]
        if lacking:
            where = f"{hub.path} {config or ''} {split}".replace("  ", " ")
            raise ValueError(
                f"{where}: columns {', '.join(lacking)} are missing; needed: {', '.join(needed)}; "
                f"found: {', '.join(table.column_names)}"
            )


def prepare(
    name: str,
    data_root: str | Path = DATA_ROOT,
    source: str | None = None,
    limit: int | None = None,
) -> Output:
    """Write a benchmark's files below the data root.

    limit: the first so many rows only. Raises ValueError for a set that the hub does not have, one
    that is there already, or missing columns.
    """
    benchmark = get_benchmark(name)
    if name not in HUB:
        raise ValueError(f"{name} is not on the hub: {benchmark.hint}; accepted: {', '.join(HUB)}")
    hub = HUB[name]
    out = Output(benchmark, benchmark_folder(benchmark, data_root))
    there = out.existing()
    if there:
        raise ValueError(f"{there[0]} is there already; move it away to prepare {name} again")
    tables = load_parts(hub, source)
    check_columns(hub, tables)
    if limit is not None:
        tables[0] = tables[0].select(range(min(limit, len(tables[0]))))
    rows = progress(tables[0], f"preparing {name}", len(tables[0]))
    hub.convert(rows, out, *tables[1:])
    out.write()
    return out


def disk_note(folder: Path) -> str:
    """Room that is left where a set goes."""
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return f"{shutil.disk_usage(place).free / 2**30:.0f} GiB free in {place}"


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the named benchmarks."""
    flags = argparse.ArgumentParser(
        prog="llava data prepare", description="Benchmarks from the hub, in LLaVA's layout."
    )
    flags.add_argument("benchmarks", nargs="+", metavar="NAME", help=", ".join(HUB))
    flags.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        help="folder of the benchmarks (default playground/data/eval)",
    )
    flags.add_argument("--source", help="another hub id, or a folder with the downloaded set")
    flags.add_argument("--limit", type=int, help="the first so many rows only")
    args = flags.parse_args(argv)
    for name in args.benchmarks:
        folder = Path(args.data_root) / get_benchmark(name).folder
        log.info("%s: %s", name, disk_note(folder))
        out = prepare(name, args.data_root, args.source, args.limit)
        counts = ", ".join(f"{len(r)} in {file}" for file, r in out.questions.items() if r)
        log.info("%s: %s: %s", name, out.folder, counts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

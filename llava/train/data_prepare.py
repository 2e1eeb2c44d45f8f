"""`llava data prepare-train SET`: the folders of a training set, from the archives it comes in.

    llava data prepare-train mix665k --list                           # files, sizes, links
    llava data prepare-train mix665k --archives ~/downloads           # -> playground/data
    llava data prepare-train mix665k --archives ~/downloads --archive ocr_vqa=~/ocr/images

Special here: the JSON says which pictures a set needs, and only those are unpacked, under the names
that it gives them. So nothing in an archive decides where a file goes (a path that climbs out is
never followed), an archive may be packed under any top folder, and a finished folder is one in
which every picture of the JSON lies. OCR-VQA's GIFs get the .jpg names that LLaVA trained with.
Files are written beside their place and moved there whole; what is there already with its size is
left alone, so an interrupted command goes on when it is given again. The JSON itself comes last.
Archives are zip or tar files, or folders (whose files are linked, or copied on another disk).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llava.train.archives import members, place
from llava.train.records import Records, image_names
from llava.train.train_sets import TRAIN_SETS, Part, TrainSet, belongs, list_lines
from llava.utils import (
    atomic_write,
    check_output,
    get_logger,
    json_dump,
    progress,
    user_errors,
)

logger = get_logger(__name__)

DATA_ROOT = Path("playground/data")
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
NAMED = 20


# ----------------------------------------------------------------------------- what is needed
def survey(records: Records) -> tuple[dict[str, None], dict[str, int]]:
    """The picture paths of a JSON, in order, and its samples by the first folder of their (first)
    picture, "" for those without one. Raises ValueError, naming the sample, for a path that is
    absolute or climbs out of the data folder, and for what is no path."""
    found: dict[str, None] = {}
    counts: Counter[str] = Counter()
    for index, record in enumerate(records):
        try:
            paths = [PurePosixPath(name) for name in image_names(record)]
            for path in paths:
                _check_inside(path)
        except ValueError as error:
            where = records.place(index)
            raise ValueError(f"{where.name}, sample {where.number}: {error}") from error
        found |= dict.fromkeys(map(str, paths))
        counts[paths[0].parts[0] if paths else ""] += 1
    return found, dict(counts)


def _check_inside(path: PurePosixPath) -> None:
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in str(path):
        raise ValueError(f"image path {str(path)!r} leaves the data folder")


class Matcher:
    """Which needed picture of a part a file of its archive is, by the end of its path."""

    def __init__(self, part: Part, needed: Mapping[str, None]) -> None:
        self.part = part
        self.wanted = {path: path for path in needed if belongs(path, part)}
        if part.by_stem:
            self.wanted |= {str(PurePosixPath(path).with_suffix("")): path for path in self.wanted}

    def __call__(self, member: str) -> str | None:
        """The path that the JSON gives to this file of the archive; None if it names it not."""
        parts = [own for own in PurePosixPath(member).parts if own not in ("/", ".", "..")]
        prefixes = ["", *(f"{own}/" for own in self.part.folders if own)]
        if len(self.part.folders) > 1:
            prefixes = [""]  # an end of a path would say nothing about the folder
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            for prefix in prefixes:
                found = self.wanted.get(prefix + end)
                if found is None and self.part.by_stem:
                    found = self.wanted.get(str(PurePosixPath(prefix + end).with_suffix("")))
                if found is not None:
                    return found
        return None


# ----------------------------------------------------------------------------- archives
def find_archive(part: Part, folder: Path | None, named: Mapping[str, Path], lone: bool) -> Path:
    """Where a part's archive is: as named, else in `folder` as <part>.zip, <part>/<its usual name>,
    <part>/ or, if no other part's archive has that name (`lone`), under its usual name.

    Raises FileNotFoundError that says where it was looked for and where it can be had.
    """
    if part.name in named:
        if not named[part.name].exists():
            raise FileNotFoundError(f"no archive at {named[part.name]} (--archive {part.name}=...)")
        return named[part.name]
    tried = []
    if folder is not None:
        tried = [folder / f"{part.name}{ending}" for ending in ARCHIVE_ENDINGS]
        tried += [folder / part.name / part.archive]
        tried += [folder / part.archive] if lone else []
        tried += [folder / part.name]
    for path in tried:
        if path.exists():
            return path
    looked = ", ".join(path.name if path.parent == folder else f"{path.parent.name}/{path.name}"
                       for path in tried)  # fmt: skip
    raise FileNotFoundError(
        f"no archive of {part.name} (looked for {looked or 'nothing: give --archives'}); "
        f"{part.archive} from {part.link}, or --archive {part.name}=PATH"
    )


# ----------------------------------------------------------------------------- the whole
@dataclass
class Prepared:
    """What lies there. pictures, missing: by folder; written: files of this call."""

    data: Path
    samples: dict[str, int]
    pictures: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    unserved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: int = 0


def prepare_train(
    name: str,
    *,
    archives: Path | None = None,
    named: Mapping[str, Path] | None = None,
    data: Path | None = None,
    data_root: Path = DATA_ROOT,
    only: Sequence[str] = (),
    allow_missing: bool = False,
) -> Prepared:
    """Unpack what a set's JSON names.

    archives: folder of the downloads. named: archives by part. data: the JSON, else in `archives`.
    only: parts to unpack now. allow_missing: put the JSON there although pictures are missing.
    Raises FileNotFoundError for an archive or a JSON that is not there, ValueError for a damaged
    one, a wrong name, or a disk without room.
    """
    if name not in TRAIN_SETS:
        raise ValueError(f"training set {name!r}; accepted: {', '.join(TRAIN_SETS)}")
    chosen, named = TRAIN_SETS[name], dict(named or {})
    known = [part.name for part in chosen.parts]
    for own in (*only, *named):
        if own not in known:
            raise ValueError(f"{name} has no part {own!r}; accepted: {', '.join(known)}")
    home = data_root / chosen.home / chosen.data
    source = _find_data(chosen, home, data, archives)
    needed, samples = survey(Records.open(source))
    result = Prepared(home, samples, notes=_compare_counts(samples, chosen.samples))
    result.unserved = [p for p in needed if not any(belongs(p, own) for own in chosen.parts)]
    root = data_root / chosen.root
    matchers = [Matcher(part, needed) for part in chosen.parts if not only or part.name in only]
    for path, matcher in _find_archives(chosen, matchers, root, archives, named):
        result.written += unpack(path, matcher, root)
    _verify(result, chosen, needed, root)
    complete = not (result.missing or result.unserved)
    if (allow_missing or complete) and not _same(source, home):
        with open(source, "rb") as file, atomic_write(home, "wb") as target:
            shutil.copyfileobj(file, target, 2**20)
    return result


def _find_data(chosen: TrainSet, home: Path, data: Path | None, archives: Path | None) -> Path:
    """The JSON: as named, else among the downloads, else in its place already."""
    places = [data] if data else [*([archives / chosen.data] if archives else []), home]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no {chosen.data} at {' or '.join(map(str, places))} (--data FILE); from {chosen.link}"
        )
    return found


def _find_archives(
    chosen: TrainSet,
    matchers: Sequence[Matcher],
    root: Path,
    archives: Path | None,
    named: Mapping[str, Path],
) -> list[tuple[Path, Matcher]]:
    """The archives of the parts that do not lie there whole. FileNotFoundError names all that are
    not found."""
    usual = Counter(part.archive for part in chosen.parts)
    found, lacking = [], []
    for matcher in matchers:
        part = matcher.part
        if all((root / path).is_file() for path in matcher.wanted.values()):
            continue
        try:
            found.append((find_archive(part, archives, named, usual[part.archive] == 1), matcher))
        except FileNotFoundError as error:
            lacking.append(str(error))
    if lacking:
        raise FileNotFoundError(f"{'; '.join(lacking)}; --only PART unpacks a part alone")
    return found


def unpack(path: Path, matcher: Matcher, root: Path) -> int:
    """Write the pictures of an archive that are needed; how many were not there yet. Of two files
    that the JSON would call the same the first is taken."""
    if zipfile.is_zipfile(path):  # a tar has no table of contents
        with members(path) as found:
            matched = [(member.size, matcher(member.path)) for member in found]
        _check_room(path, root, [(size, root / own) for size, own in matched if own])
    written, seen, twice = 0, set(), 0
    with members(path) as found:
        for member in progress(found, matcher.part.name):
            own = matcher(member.path)
            if own is None:
                continue
            if own in seen:
                twice += 1
                continue
            seen.add(own)
            written += place(member, root / own)
    if not seen:
        logger.warning("%s: not one of its files is a picture of %s", path, matcher.part.name)
    if twice:
        logger.warning("%s: %d files have the name of another one", path, twice)
    logger.info("%s: %d pictures written, %d were there", path, written, len(seen) - written)
    return written


def _check_room(path: Path, root: Path, files: Sequence[tuple[int, Path]]) -> None:
    """ValueError if what a zip still has to write does not fit on the disk."""
    size = sum(size for size, target in files if not target.is_file())
    there = next(own for own in (root, *root.parents) if own.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"{path} needs {size / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB left")


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.resolve() == other.resolve()


def _compare_counts(found: Mapping[str, int], published: Mapping[str, int] | None) -> list[str]:
    if published is None or dict(found) == dict(published):
        return []
    return [
        f"{folder or 'without a picture'}: {found.get(folder, 0)} samples, "
        f"{published.get(folder, 0)} in the published file"
        for folder in sorted({*found, *published})
        if found.get(folder, 0) != published.get(folder, 0)
    ]


def _verify(result: Prepared, chosen: TrainSet, needed: Mapping[str, None], root: Path) -> None:
    folders = sorted({own for part in chosen.parts for own in part.folders}, key=len, reverse=True)
    for path in needed:
        folder = next((own for own in folders if own and path.startswith(f"{own}/")), chosen.root)
        if (root / path).is_file():
            result.pictures[folder] = result.pictures.get(folder, 0) + 1
        else:
            result.missing[folder] = result.missing.get(folder, 0) + 1
            if len(result.examples) < NAMED:
                result.examples.append(path)


# ----------------------------------------------------------------------------- command
def result_lines(result: Prepared) -> list[str]:
    """What is there and what is not."""
    lines = [
        f"{folder}: {result.pictures.get(folder, 0)} pictures"
        + (f", {result.missing[folder]} MISSING" if folder in result.missing else "")
        for folder in sorted({*result.pictures, *result.missing})
    ]
    lines += [f"  missing: {path}" for path in result.examples]
    if result.unserved:
        lines.append(
            f"{len(result.unserved)} pictures lie in folders that no archive fills, e.g. "
            f"{result.unserved[0]}"
        )
    lines += [f"note: {note}" for note in result.notes]
    samples = sum(result.samples.values())
    if result.data.is_file():
        end = f"{samples} samples"
    else:
        end = "not put there while pictures are missing (--allow-missing)"
    return [*lines, f"{result.data}: {end}"]


def _named_archives(values: Sequence[str]) -> dict[str, Path]:
    named = {}
    for value in values:
        part, mark, path = value.partition("=")
        if not mark or not path:
            raise ValueError(f"--archive {value!r}; accepted: PART=PATH")
        named[part] = Path(path).expanduser()
    return named


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a training set; 1 where pictures are missing."""
    flags = argparse.ArgumentParser(
        prog="llava data prepare-train",
        description="The folders of a training set from its archives.",
    )
    flags.add_argument("set", choices=TRAIN_SETS, metavar="SET", help=", ".join(TRAIN_SETS))
    flags.add_argument("--archives", type=Path, metavar="DIR", help="folder of the downloads")
    flags.add_argument("--archive", action="append", default=[], metavar="PART=PATH",
                       help="archive or folder of one part (may be repeated)")  # fmt: skip
    flags.add_argument("--data", type=Path, metavar="FILE", help="the JSON, if not in --archives")
    flags.add_argument("--data-root", type=Path, default=DATA_ROOT, help=f"default {DATA_ROOT}")
    flags.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts now")
    flags.add_argument("--allow-missing", action="store_true",
                       help="put the JSON there although pictures are missing")  # fmt: skip
    flags.add_argument("--list", action="store_true", help="show files, sizes and links; stop")
    flags.add_argument("--json", metavar="FILE", help="write what was found there")
    args = flags.parse_args(argv)
    if args.list:
        sys.stdout.write("\n".join(list_lines(args.set)) + "\n")
        return 0
    check_output(args.json, [args.data] if args.data and args.data.is_file() else [])
    result = prepare_train(
        args.set,
        archives=args.archives and args.archives.expanduser(),
        named=_named_archives(args.archive),
        data=args.data and args.data.expanduser(),
        data_root=args.data_root,
        only=args.only,
        allow_missing=args.allow_missing,
    )
    sys.stdout.write("\n".join(result_lines(result)) + "\n")
    if args.json:
        content = {name: value for name, value in vars(result).items() if name != "data"}
        json_dump(args.json, {"set": args.set, "data": str(result.data), **content})
    return 1 if result.missing or result.unserved else 0


if __name__ == "__main__":
    raise SystemExit(main())

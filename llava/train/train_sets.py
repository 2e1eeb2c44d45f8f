"""The training sets of LLaVA-1.5, PyramidDrop and Open-LLaVA-NeXT: files, sizes, links, folders.

Special here: facts alone; what is done with them is `llava.train.data_prepare`'s. A set's JSON says
which pictures it needs, its parts say in which archives they come.
``llava data prepare-train mix665k --list``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_HUB = "https://huggingface.co/datasets/"


# ----------------------------------------------------------------------------- what there is
@dataclass(frozen=True)
class Part:
    """Pictures that come together. folders: of the set that they fill. archive: its usual name.
    size, images: what the archive has, None where that is not known; by_stem: a picture may have
    another ending in the archive than in the JSON."""

    name: str
    folders: tuple[str, ...]
    archive: str
    link: str
    size: str | None = None
    images: int | None = None
    by_stem: bool = False


@dataclass(frozen=True)
class TrainSet:
    """A training set. data: its JSON. root: the folder below the data root that the JSON's image
    paths start from, and where the JSON goes is `home`. samples: of the JSON by the first folder of
    the path ("" = without a picture), as published; None where nothing was."""

    data: str
    link: str
    size: str
    parts: tuple[Part, ...]
    root: str = ""
    home: str = ""
    samples: Mapping[str, int] | None = None


_COCO = Part(
    "coco", ("coco/train2017",), "train2017.zip",
    "http://images.cocodataset.org/zips/train2017.zip", "19.3 GB", 118287,
)  # fmt: skip
_GQA = Part(
    "gqa", ("gqa/images",), "images.zip",
    "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "21.8 GB", 148854,
)  # fmt: skip
_OCR_VQA = Part(
    "ocr_vqa", ("ocr_vqa/images",), "ocr_vqa_images_llava_v15.zip",
    f"{_HUB}weizhiwang/llava_v15_instruction_images", "8.97 GB", 207572, by_stem=True,
)  # fmt: skip
_TEXTVQA = Part(
    "textvqa", ("textvqa/train_images",), "train_val_images.zip",
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "7.07 GB", 25119,
)  # fmt: skip
_VG = (
    Part("vg_1", ("vg/VG_100K",), "images.zip",
         "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip", "9.73 GB", 64346),
    Part("vg_2", ("vg/VG_100K_2",), "images2.zip",
         "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip", "5.47 GB", 43903),
)  # fmt: skip
_PRETRAIN = Part(
    "pretrain", ("",), "images.zip", f"{_HUB}liuhaotian/LLaVA-Pretrain", "27.4 GB"
)  # fmt: skip
_WEB = "https://drive.google.com/drive/folders/1tCUQ-sq6vdshZVkF0ZeF3K4eztkXJgax"

TRAIN_SETS: dict[str, TrainSet] = {
    "pretrain558k": TrainSet(
        data="blip_laion_cc_sbu_558k.json",
        link=f"{_HUB}liuhaotian/LLaVA-Pretrain",
        size="181 MB",
        root="LLaVA-Pretrain/images",
        home="LLaVA-Pretrain",
        parts=(_PRETRAIN,),
    ),
    "mix665k": TrainSet(
        data="llava_v1_5_mix665k.json",
        link=f"{_HUB}liuhaotian/LLaVA-Instruct-150K",
        size="1.03 GB",
        parts=(_COCO, _GQA, _OCR_VQA, _TEXTVQA, *_VG),
        samples={
            "coco": 364100, "gqa": 72140, "ocr_vqa": 80000, "textvqa": 21953, "vg": 86417,
            "": 40688,
        },
    ),
    "mix1m": TrainSet(
        data="open-llava-next_instruct_mix1M.json",
        link=f"{_HUB}Lin-Chen/Open-LLaVA-NeXT-mix1M",
        size="1.64 GB",
        parts=(
            Part("pretrain", ("llava/llava_pretrain/images",), "images.zip", _PRETRAIN.link,
                 _PRETRAIN.size),
            _COCO, _GQA, _OCR_VQA, _TEXTVQA, *_VG,
            Part("sam", ("sam/images",), "sam_images_share-sft.zip",
                 "https://drive.google.com/file/d/1dKumdOKSXtV7lIXdrG7jsIK_z2vZv2gs", "8.87 GB"),
            Part("web-celebrity", ("web-celebrity/images",), "web-celebrity.zip", _WEB, "103 MB"),
            Part("web-landmark", ("web-landmark/images",), "web-landmark.zip", _WEB, "227 MB"),
            Part("wikiart", ("wikiart/images",), "wikiart.zip", _WEB, "185 MB"),
            Part("share_textvqa", ("share_textvqa/images",), "share_textvqa.zip", _WEB, "126 MB"),
            Part("vqa_collection",
                 ("ai2d", "chartqa", "docvqa", "dvqa", "geoqa+", "synthdog-en"),
                 "vqa_collection.zip", f"{_HUB}Lin-Chen/Open-LLaVA-NeXT-mix1M", "30.2 GB"),
            Part("allava_vflan", ("allava_vflan/images/images_191task_1k",),
                 "image_191-task_1k.zip", f"{_HUB}Vision-Flan/vision-flan_191-task_1k", "36.3 GB"),
        ),
    ),
}  # fmt: skip


def belongs(path: str, part: Part) -> bool:
    """Whether a picture path lies in one of a part's folders."""
    return any(not folder or path.startswith(f"{folder}/") for folder in part.folders)


def list_lines(name: str) -> list[str]:
    """Files of a set: name, size, where they can be had, what they fill."""
    chosen = TRAIN_SETS[name]
    lines = [f"{name}: {chosen.data} ({chosen.size}) {chosen.link}"]
    for part in chosen.parts:
        count = f", {part.images} pictures" if part.images else ""
        folders = ", ".join(str(PurePosixPath(chosen.root, own)) for own in part.folders)
        lines.append(f"  {part.name}: {part.archive} ({part.size or 'size unknown'}{count})")
        lines.append(f"      -> {folders}")
        lines.append(f"      {part.link}")
    return lines

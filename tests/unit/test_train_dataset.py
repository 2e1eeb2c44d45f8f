"""Training files, samples and batches: what is read, what is refused, what a batch holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import clip_image_processor_class
from llava.model.multimodal_prep import Splicer, tile_counts
from llava.prompting import build_prompt, side_texts
from llava.reduction import ReductionPlan
from llava.train.dataset import (
    Collator,
    ImageReader,
    LazySupervisedDataset,
    check_max_length,
    supervised_text,
)
from llava.train.preprocess import training_template
from llava.train.token_counts import count_tokens

PAD = 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "what", "is", "red", "blue"]
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=table, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip


@pytest.fixture
def reader(tmp_path) -> ImageReader:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    processor = clip_image_processor_class()(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    config = SimpleNamespace(image_aspect_ratio="pad")
    return ImageReader(processor, config, patches_per_side=2, folder=str(tmp_path))


def sample(question: str, answer: str, image=None, ident: str = "s1") -> dict:
    record = {
        "id": ident,
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
    }
    return record if image is None else {**record, "image": image}


def dataset(records, tokenizer, reader=None, **options) -> LazySupervisedDataset:
    conv = training_template("mistral_instruct")
    return LazySupervisedDataset(records, tokenizer, conv, reader=reader, **options)


def test_a_batch_may_mix_none_one_and_two_pictures(tokenizer, reader):
    data = dataset(
        [
            sample("what is", "red"),
            sample("<image>\nwhat", "red", "red.png"),
            sample("<image> is <image> what", "blue", ["red.png", "blue.png"]),
        ],
        tokenizer,
        reader,
    )
    samples = [data[i] for i in range(3)]
    batch = Collator(PAD)(samples)
    assert batch["images"].shape == (3, 3, 28, 28)
    assert batch["image_sizes"] == [(28, 28), (28, 28), (40, 20)]
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [0, 1, 2]
    lengths = [len(s["input_ids"]) for s in samples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == PAD).all()
        assert batch["attention_mask"][row, :length].all()


def test_a_pad_id_inside_the_text_is_text(tokenizer):
    data = dataset([sample("what <pad> is", "red"), sample("what", "red")], tokenizer)
    batch = Collator(PAD)([data[0], data[1]])
    at = batch["input_ids"][0].tolist().index(PAD)
    assert batch["attention_mask"][0, at]
    assert "images" not in batch


def test_pictures_of_different_shapes_come_as_a_list():
    def one(shape):
        images = {"images": [torch.zeros(shape)], "image_sizes": [(1, 1)]}
        return {"input_ids": [1], "labels": [1], **images}

    batch = Collator(PAD)([one((2, 3, 4, 4)), one((5, 3, 4, 4))])
    assert [tuple(pixels.shape) for pixels in batch["images"]] == [(2, 3, 4, 4), (5, 3, 4, 4)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (sample("<image>\nwhat", "red", "absent.png", "x7"), r"\(id x7\).*absent\.png"),
        (sample("<image>\nwhat", "red", "broken.png", "x7"), r"\(id x7\).*broken\.png"),
        (sample("<image> <image> what", "red", "red.png", "x7"), r"\(id x7\).*2 <image> mark"),
        (sample("what", "", ident="x7"), r"\(id x7\).*nothing to learn"),
        ({"id": "x7"}, r"\(id x7\).*no 'conversations'"),
        ({"id": "x7", "conversations": 5}, r"\(id x7\).*'conversations' must be"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tokenizer, reader, record, message):
    with pytest.raises(ValueError, match=message):
        dataset([record], tokenizer, reader)[0]


def test_bad_samples_are_skipped_when_asked(tokenizer, reader):
    records = [sample("<image>\nwhat", "red", "absent.png"), sample("what", "blue")]
    data = dataset(records, tokenizer, reader, skip_bad_samples=True)
    assert data[0] == data[1]
    hopeless = dataset(records[:1], tokenizer, reader, skip_bad_samples=True)
    with pytest.raises(ValueError, match="not one sample"):
        hopeless[0]


def test_an_image_needs_a_tower(tokenizer):
    with pytest.raises(ValueError, match="no vision tower"):
        dataset([sample("<image>\nwhat", "red", "red.png")], tokenizer)[0]


def test_visual_tokens_count_toward_the_limit(tokenizer, reader):
    record = sample("<image>\nwhat is", "red blue " * 5, "red.png")
    whole = dataset([record], tokenizer, reader)[0]
    length = len(whole["input_ids"]) - 1 + 4
    exact = dataset([record], tokenizer, reader, max_length=length)[0]
    assert exact["input_ids"] == whole["input_ids"]
    cut = dataset([record], tokenizer, reader, max_length=length - 3)[0]
    assert cut["input_ids"] == whole["input_ids"][:-3]
    assert len(cut["images"]) == 1
    with pytest.raises(ValueError, match="nothing would be learned"):
        dataset([record], tokenizer, reader, max_length=6)[0]


def test_a_picture_that_does_not_fit_goes_with_its_question(tokenizer, reader):
    record = sample("<image>\nwhat", "red", ["red.png", "blue.png"])
    record["conversations"] += [
        {"from": "human", "value": "<image> is"},
        {"from": "gpt", "value": "blue"},
    ]
    whole = dataset([record], tokenizer, reader)[0]
    length = len(whole["input_ids"]) - 2 + 8
    cut = dataset([record], tokenizer, reader, max_length=length - 2)[0]
    assert len(cut["images"]) == len(cut["image_sizes"]) == 1
    assert cut["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert supervised_text(cut, tokenizer.decode) == ["red </s>"]


def test_a_limit_that_holds_no_picture_is_refused():
    with pytest.raises(ValueError, match="576 visual tokens"):
        check_max_length(576, 576)
    check_max_length(577, 576)


def test_lengths_count_words_and_mark_modality(tokenizer):
    records = [sample("what is", "red"), sample("<image>\nwhat", "red", "red.png")]
    data = dataset(records, tokenizer)
    assert data.modality_lengths == [-3, 3]
    assert data.lengths == [3, 131]


def test_caches_change_nothing(tokenizer, reader, tmp_path):
    record = sample("<image>\nwhat", "red", "blue.png")
    cached = ImageReader(
        reader.image_processor, reader.model_cfg, 2, folder=reader.folder, cache_mb=1
    )
    plain, kept = (
        dataset([record], tokenizer, reader),
        dataset([record], tokenizer, cached, cache_text=True),
    )
    first, again = kept[0], kept[0]
    assert first["images"][0] is again["images"][0]
    assert first["input_ids"] == plain[0]["input_ids"]
    assert torch.equal(first["images"][0], plain[0]["images"][0])


def test_texts_are_those_of_the_prompt(tokenizer, reader):
    """Of the first question, whatever turns follow, as inference finds them in its prompt."""
    texts = ReductionPlan.parse("simignore:keep=1,text=options|question").texts
    asked = "<image>\nwhat is red ?\nA. blue\nB. red"
    record = sample(asked, "blue", "red.png")
    record["conversations"] += [
        {"from": "human", "value": "is blue what"},
        {"from": "gpt", "value": "red"},
    ]
    other = sample("<image>\nwhat is", "blue", "red.png")
    text_only = sample("blue", "red")
    for conv_mode in ("v1", "mistral_instruct"):
        data = LazySupervisedDataset(
            [record, other, text_only], tokenizer, training_template(conv_mode), reader=reader,
            texts=texts, cache_text=True,
        )  # fmt: skip
        expected = [
            side_texts(build_prompt(question, conv_mode, marks), tokenizer)
            for question, marks in ((asked, 1), ("<image>\nwhat is", 1), ("blue", 0))
        ]
        for _ in range(2):  # read, and from memory
            assert [data[i]["texts"] for i in range(3)] == expected
        assert expected[0]["options"]
        assert not expected[1]["options"]
        batch = Collator(PAD)([data[i] for i in range(3)])
        assert batch["texts"]["question"][1].tolist()[:2] == expected[1]["question"]
        strict = ReductionPlan.parse("simignore:keep=1,text=options").texts
        bare = LazySupervisedDataset(
            [record, other, text_only], tokenizer, training_template(conv_mode), reader=reader,
            texts=strict,
        )  # fmt: skip
        assert bare[0]["texts"] == expected[0]
        bare[2]  # without a picture nothing is compared
        with pytest.raises(ValueError, match="has no text 'options'"):
            bare[1]
    assert "texts" not in LazySupervisedDataset([other], tokenizer, training_template("v1"),
                                                reader=reader)[0]  # fmt: skip


@pytest.fixture
def tiled(reader) -> ImageReader:
    config = SimpleNamespace(
        image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )  # fmt: skip
    return ImageReader(reader.image_processor, config, 2, folder=reader.folder)


def mixed_records() -> list[dict]:
    return [
        sample("what is", "red"),
        sample("<image>\nwhat", "red", "red.png"),
        sample("<image> is <image> what", "blue " * 40, ["red.png", "blue.png"]),
        sample("<image>\nwhat", "red", "broken.png"),
        sample("what", ""),
    ]


@pytest.mark.parametrize("kind", ["reader", "tiled"])
@pytest.mark.parametrize("workers", [0, 1])
def test_counted_tokens_are_those_of_the_packed_batch(request, tokenizer, tmp_path, kind, workers):
    reader = request.getfixturevalue(kind)
    good = mixed_records()[:3]
    data = dataset(good, tokenizer, reader, max_length=45)
    counts = count_tokens(data, tmp_path / "cache", workers)
    splicer = Splicer(reader.model_cfg, 4, 2, 28, 45)
    batch = Collator(PAD, splicer, packed=True)([data[i] for i in range(3)])
    assert counts.sum(1).tolist() == list(batch["splice"].layout.lengths)
    visual = [0, 0, 0]
    for group in batch["splice"].layout.groups:
        visual[group.sample] += group.count
    assert counts[:, 1].tolist() == visual
    assert counts.sum(1).max() == 45  # one was cut


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_a_class_token_is_counted_in_every_tile(reader, aspect):
    config = SimpleNamespace(
        image_aspect_ratio=aspect, mm_patch_merge_type="flat",
        mm_vision_select_feature="cls_patch", image_grid_pinpoints=[[28, 56], [56, 28]],
    )  # fmt: skip
    made = ImageReader(reader.image_processor, config, 2, folder=reader.folder)
    pictures = [made(name) for name in ("red.png", "blue.png")]
    sizes = [size for _, size in pictures]
    splicer = Splicer(config, 5, 2, 28, 99)
    tiles = tile_counts([pixels for pixels, _ in pictures])
    found = [len(picture.source) for picture in splicer.pictures(tiles, sizes)]
    assert made.visual_tokens(sizes) == found == ([15, 15] if aspect == "anyres" else [5, 5])


def test_counts_are_kept_as_long_as_they_hold(tokenizer, reader, tiled, tmp_path, monkeypatch):
    records, cache = mixed_records()[:3], tmp_path / "cache"
    same = [dataset(records, tokenizer, reader) for _ in range(2)]
    first = count_tokens(same[0], cache)
    monkeypatch.setattr(LazySupervisedDataset, "measure", None)
    assert count_tokens(same[1], cache).tolist() == first.tolist()
    for other in (
        dataset(records, tokenizer, reader, max_length=20),
        dataset(records[:2], tokenizer, reader),
        dataset(records, tokenizer, tiled),
        LazySupervisedDataset(records, tokenizer, training_template("v1"), reader=reader),
    ):
        with pytest.raises(TypeError):
            count_tokens(other, cache)


def test_what_cannot_be_counted_is_named_or_left_out(
    tokenizer, reader, tiled, tmp_path, monkeypatch
):
    """A broken picture is found where its size is needed; a run takes none longer in its place."""
    data = dataset(mixed_records(), tokenizer, tiled)
    with pytest.raises(ValueError, match="sample 3"):
        count_tokens(data, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL's bomb: twice as many
        with pytest.raises(ValueError, match=r"sample 1 .*red\.png \(Image size"):
            count_tokens(data, tmp_path)
    data = dataset(mixed_records(), tokenizer, tiled, skip_bad_samples=True)
    counts = count_tokens(data, tmp_path)
    assert (counts.sum(1) == 0).tolist() == [False, False, False, True, True]
    untiled = dataset(mixed_records(), tokenizer, reader, skip_bad_samples=True)
    untiled.token_lengths = count_tokens(untiled, tmp_path).sum(1)
    assert untiled.token_lengths[3] > 0
    longer = untiled.token_lengths.tolist()
    assert longer[0] < longer[3] < longer[2]
    assert untiled[3] == untiled[0]

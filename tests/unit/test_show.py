"""`llava show`: what is drawn is what the forward pass did, wherever a token lies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from test_report import check_page
from tiny_checkpoint import save_tiny_checkpoint

from llava.drawing import Grid
from llava.eval import show
from llava.model.builder import load_pretrained_model
from llava.model.tracing import look

PLANS = [
    "none",
    "uniform:layers=[1,2],ratios=[0.5,0.2]",
    "pyramiddrop:layers=[1,3],ratios=[0.5,0.25]",
]
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
}


def two_colours(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, "red")
    ImageDraw.Draw(picture).rectangle((size[0] // 2, 0, *size), fill="blue")
    return picture


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("show")
    return {
        "square": save_tiny_checkpoint(root / "square"),
        "anyres": save_tiny_checkpoint(root / "anyres", **ANYRES),
        "pad": save_tiny_checkpoint(root / "pad", image_aspect_ratio="pad"),
    }


def scene_of(folder: Path, pictures: list[Image.Image], plans: list[str] = PLANS) -> dict[str, Any]:
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    return look(tokenizer, model, processor, "Is there a 3?", pictures, plans, max_new_tokens=3)


def stride(count: int, budget: int) -> set[int]:
    """The ranks that `uniform` keeps."""
    return {i for i in range(count) if (i + 1) * budget // count > i * budget // count}


def test_anyres_tokens_lie_where_their_pixels_are(checkpoints: dict[str, Path]) -> None:
    """Two pictures: 100 x 50 becomes 2 x 1 tiles, 90 x 90 becomes 2 x 2."""
    scene = scene_of(checkpoints["anyres"], [two_colours((100, 50)), two_colours((90, 90))])
    sizes = [(f["picture"], f["rows"], f["columns"], f["newlines"]) for f in scene["fields"]]
    assert sizes == [(0, 4, 4, 0), (0, 4, 8, 4), (1, 4, 4, 0), (1, 8, 8, 8)]
    grids = show.grids(scene)
    for field, grid in zip(scene["fields"], grids, strict=True):
        picture = show.read_uri(field["image"])
        assert picture.width / picture.height == grid.columns / grid.rows
        left, right = (picture.getpixel((int(picture.width * x), 20)) for x in (0.2, 0.8))
        assert left[0] > 240 > 20 > left[2]
        assert right[2] > 240 > 20 > right[0]
    # In the sequence: the whole picture row by row, then the tiles, each row with its newline.
    orders = []
    for first in (0, 2):
        pairs = [
            (first + i, grids[first + i].number((row, column)))
            for i in (0, 1)
            for row in range(grids[first + i].rows)
            for column in range(grids[first + i].width)
        ]
        orders.append(pairs)
    none, uniform, _ = scene["runs"]
    whole = {(f, n) for f, numbers in enumerate(none["stages"][0]["kept"]) for n in numbers}
    assert whole == {pair for order in orders for pair in order}
    expected = set()
    for order in orders:
        expected |= {order[i] for i in stride(len(order), len(order) // 2)}
    kept = uniform["stages"][1]["kept"]
    assert {(f, n) for f, numbers in enumerate(kept) for n in numbers} == expected
    assert uniform["visual_per_layer"][1] == sum(map(len, kept)) == len(expected)


def test_survivors_are_those_with_the_highest_scores(checkpoints: dict[str, Path]) -> None:
    scene = scene_of(checkpoints["square"], [two_colours((70, 56))])
    run = scene["runs"][2]
    assert [cut["method"] for cut in run["cuts"]] == ["pyramiddrop"] * 2
    assert [(s["start"], s["stop"], len(s["kept"][0])) for s in run["stages"]] == [
        (0, 1, 16), (1, 3, 8), (3, 4, 4),
    ]  # fmt: skip
    for cut, before, after in zip(run["cuts"], run["stages"], run["stages"][1:], strict=False):
        scores = dict(map(tuple, cut["scores"][0]))
        assert sorted(scores) == before["kept"][0]
        best = sorted(scores, key=scores.get, reverse=True)[: len(after["kept"][0])]
        assert sorted(best) == after["kept"][0]
    assert run["average_tokens"] == (16 + 8 + 8 + 4) / 4
    assert sum(run["flops_per_layer"]) < run["full_tflops"] * 1e12


def test_a_padded_picture_is_shown_padded(checkpoints: dict[str, Path]) -> None:
    scene = scene_of(checkpoints["pad"], [two_colours((20, 56))], ["none"])
    picture = show.read_uri(scene["fields"][0]["image"])
    grey = picture.getpixel((4, 28))
    assert max(abs(a - b) for a, b in zip(grey, (122, 116, 104), strict=True)) <= 2
    assert picture.getpixel((22, 28))[0] > 200


def test_page_draws_the_scene(checkpoints: dict[str, Path]) -> None:
    scene = scene_of(checkpoints["anyres"], [two_colours((100, 50))])
    scene["question"] = "Is <b> above 3 & 4?"
    text = show.page(scene, {"model": "tiny"})
    tags = check_page(text)
    # defs, one map a field, 2 charts, and a map a stage and a cut for each plan that cuts
    assert tags.count("svg") == 1 + 2 + 2 + 2 * 2 * (3 + 2)
    assert text.count("data:image/png;base64,") == 2
    assert "Is &lt;b&gt; above 3 &amp; 4?" in text
    shares = re.findall(r'class="stages" style="--share:([\d.]+)"', text)
    assert shares == ["3.12"] * 2  # the whole picture, and 8 cells with a newline over 4
    gone = [len(s["kept"][0]) for run in scene["runs"] for s in run["stages"] if run["cuts"]]
    whole = re.findall(r'viewBox="0 0 80 80".*?</svg>', text, flags=re.S)
    counts = [each.count('class="gone"') for each in whole if "tokens left" in each]
    assert counts == [0, *(16 - kept for kept in gone)]
    for run in scene["runs"]:
        assert f"{run['average_tokens']:.1f}" in text


def test_png_fades_dropped_cells_and_keeps_others() -> None:
    picture = Image.new("RGB", (8, 8), "black")
    drawn = show.faded(picture, Grid(2, 2), [(1, 0)], (80, 80))
    assert drawn.getpixel((20, 60)) == (0, 0, 0)
    assert all(min(drawn.getpixel(at)) > 220 for at in [(20, 20), (60, 20), (60, 60)])


def test_command_writes_page_pictures_and_json(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    image = tmp_path / "picture.png"
    two_colours((56, 56)).save(image)
    words = ["--model-path", str(checkpoints["square"]), "--image", str(image), "--device", "cpu"]
    words += ["--question", "Is there a 3?", "--max-new-tokens", "2", "--reduction", PLANS[1]]
    show.main([*words, "--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "s.json")])
    scene = json.loads((tmp_path / "s.json").read_text())
    assert [run["plan"] for run in scene["runs"]] == PLANS[:2]
    assert PLANS[1] in (tmp_path / "page.html").read_text()
    lists = ["--layer_list", "[1,3]", "--image_token_ratio_list", "[0.5,0.25]"]  # PLANS[2]
    show.main([*words, "--out", str(tmp_path / "png"), *lists])
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["0-none.png", "1-uniform.png", "2-pyramiddrop.png", "overview.png"]
    whole, one = (Image.open(tmp_path / "png" / name) for name in ("overview.png", names[1]))
    assert whole.height > 2 * one.height
    assert whole.width == one.width


def test_plans_of_one_method_are_told_apart() -> None:
    runs = [{"plan": plan} for plan in ["none", PLANS[1], PLANS[1].replace("0.5", "0.4")]]
    mixed = f"uniform:layers=[1],ratios=[0.5]+{PLANS[2].replace('[1,3]', '[2,3]')}"
    assert show.names({"runs": [*runs, {"plan": mixed}]}) == [
        "none", "uniform 1", "uniform 2", "uniform + pyramiddrop",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--reduction", "nosuch:k=1"], "nosuch"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--layer_list", "[1]"], "give both"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--reduction", "uniform:layers=[9],ratios=[0.5]"], "layer 9"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], needle: str, checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    image = tmp_path / "picture.png"
    two_colours((56, 56)).save(image)
    usual = ["--model-path", str(checkpoints["square"]), "--image", str(image), "--question", "?"]
    with pytest.raises(SystemExit) as stop:
        show.main([*usual, *words, "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert needle in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "page.html").exists()

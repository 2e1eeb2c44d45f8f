"""YOPO: its settings and masks, what it costs, what it leaves out, and the calibration's rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import FAMILIES, LAYERS, PLANS, TILE, batch, labels_of, pictures, prompts, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava.digits import build
from llava.eval import calibrate_heads
from llava.eval.calibrate_heads import choose_samples
from llava.eval.questions import Question
from llava.model.staged_cache import SplitLayer, StagedCache
from llava.model.yopo_layer import seen_by
from llava.reduction import YOPO, Cut, DropVisual, ReductionPlan, flops
from llava.reduction.flops import ModelShape
from llava.reduction.head_masks import (
    critical_ratios,
    load_head_mask,
    mask_above,
    read_origin,
    save_head_mask,
    threshold_for,
)
from llava.reduction.yopo import plan_from_config

ROOT = Path(__file__).resolve().parents[2]
HEADS = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
ROWS = ("1111", "1011", "0001", "0000", "1111", "1111")


# ----------------------------------------------------------------------------- settings and masks
def test_a_mask_may_be_given_in_many_ways(tmp_path):
    mask = np.array(HEADS, dtype=bool)
    np.save(tmp_path / "a.npy", mask)
    np.save(tmp_path / "numbers.npy", mask.astype(np.float64))
    torch.save(torch.from_numpy(mask), tmp_path / "b.pth")
    save_head_mask(tmp_path / "c", mask, np.zeros(mask.shape), {"samples": 7, "model": "m"})
    files = [str(tmp_path / n) for n in ("a.npy", "numbers.npy", "b.pth", "c.npy", "c.safetensors")]
    for given in (mask, torch.from_numpy(mask), HEADS, list(ROWS), ROWS, *files):
        assert YOPO(heads=given).heads == ROWS
    assert read_origin(tmp_path / "c.safetensors") == {"samples": "7", "model": "m"}
    assert load_file(tmp_path / "c.safetensors")["critical_ratio"].shape == mask.shape
    text = ReductionPlan.parse(f"yopo:layers=4,heads={files[0]},window=5")
    assert text == ReductionPlan((Cut(4, DropVisual()),), "original", YOPO(4, ROWS, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers 0"),
        ({"window": 2.5}, "window 2.5"),
        ({"ffn": 0.5}, "ffn 0.5"),
        ({"ffn": True}, "ffn True"),
        ({"mode": "fast"}, "renorm, renorm_layers, leaky"),
        ({"window_causal": 1}, "True, False"),
        ({"heads": 1.5}, r"share in \[0, 1\]"),
        ({"heads": [[1, 0], [1]]}, "no mask"),
        ({"heads": []}, "no mask"),
        ({"heads": [[1, 2]]}, "0 and 1"),
        ({"heads": ["1x"]}, "does not exist|0 and 1"),
        ({"heads": "nowhere.npy"}, "nowhere.npy does not exist"),
        ({"heads": "mask.txt"}, ".npy, .pth, .pt, .safetensors"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        YOPO(**options)


def test_bad_mask_files_are_refused_and_never_run(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.ones(4))
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 9)
    for name in ("object.npy", "flat.npy", "code.pth", "broken.safetensors"):
        with pytest.raises(ValueError, match=name):
            load_head_mask(tmp_path / name)


def test_settings_that_do_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="2 layers x 4 heads.*6 layers"):
        ReductionPlan(program=YOPO(heads=HEADS[:2])).validate(LAYERS)
    with pytest.raises(ValueError, match="layers=6 does not fit.*1 to 5"):
        ReductionPlan(program=YOPO(layers=6, mode="leaky")).validate(LAYERS)
    narrow = ReductionPlan(program=YOPO(heads=[[1, 0]] * LAYERS))
    with pytest.raises(ValueError, match="6 layers x 2 heads.*6 layers x 4 heads"):
        tiny_model()(**batch(prompts()), reduction=narrow)
    shape = ModelShape.from_config(tiny_model().config)
    preset = flops.Preset(shape, 4, 16, 8, "none")
    with pytest.raises(ValueError, match="4 heads"):
        flops.cost(preset, narrow)
    for text, message in (("yopo:", "needs one of"), ("yopo:w=5", "needs one of"),
                          ("drop_visual:k=2,ratio=1", "option k")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ReductionPlan.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "yopo:layers=4,heads=['1111','1011','0001','0000','1111','1111'],window=5,ffn=2",
        "yopo:heads=0.5,window_causal=True,window=3,mode=leaky",
        "yopo:ffn=2.5,mode=renorm_layers,layers=3",
        "random:layers=[0],ratios=[0.5]+yopo:layers=4,ffn=2,positions=original",
        "yopo:layers=2,ffn=2+drop_visual:k=4",
        "drop_visual:k=4",
    ],
)
def test_plans_survive_text_and_json(text):
    plan = ReductionPlan.parse(text)
    assert ReductionPlan.parse(str(plan)) == plan
    assert ReductionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.shared_depth(LAYERS) == LAYERS


def test_a_saved_model_keeps_its_mask(tmp_path):
    model = tiny_model(visual_token_reduction=PLANS["yopo"].to_dict())
    model.config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["visual_token_reduction"]
    assert stored["program"]["heads"] == list(ROWS)
    inputs = batch(prompts())
    with torch.no_grad():
        own = model(**inputs).logits
        asked = model(**inputs, reduction=PLANS["yopo"]).logits
    assert torch.equal(own, asked)


def test_checkpoints_of_the_original_name_their_settings(tmp_path):
    said = {"attncut_w": 5, "headcut_num": 16, "mlpcut_ratio": 2, "layercut_num": 4}
    config = {**said, "sprompt_len": 35, "num_hidden_layers": LAYERS}
    assert plan_from_config({"num_hidden_layers": 4}) is None
    with pytest.raises(ValueError, match="no headcut_num"):
        plan_from_config({**config, "headcut_num": None})
    with pytest.raises(ValueError, match=r"headmask_\*_16.npy.*layers=4,heads=FILE,window=5"):
        plan_from_config(config, tmp_path)
    (tmp_path / "headmask").mkdir()
    np.save(tmp_path / "headmask" / "headmask_7b_16.npy", np.array(HEADS, dtype=bool))
    found = ReductionPlan.parse(plan_from_config(config, tmp_path))
    assert found == ReductionPlan((), "original", YOPO(4, ROWS, 5, 2, "leaky"))


# ----------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize(
    ("size", "layers", "heads", "ffn", "expected"),
    [
        # Uniform halves, and masks with as many heads in the layers used as the shipped ones.
        ("7b", 16, None, 2, 1.867),
        ("7b", 16, 17.2, 2, 1.913),
        ("7b", 16, 26.3, 2, 2.267),
        ("13b", 20, None, 2, 3.657),
        ("13b", 20, 23.9, 2, 3.893),
        ("13b", 20, 33.5, 2, 4.474),
    ],
)
def test_the_papers_count(size, layers, heads, ffn, expected):
    preset = flops.get_preset(f"llava-1.5-{size}")
    shape, mask = preset.shape, 0.5
    if heads is not None:
        mask = np.zeros((shape.layers, shape.heads), dtype=bool)
        used = mask[:layers]
        used.flat[np.linspace(0, used.size - 1, round(heads * layers)).astype(int)] = True
    plan = ReductionPlan.parse({
        "positions": "original",
        "cuts": [{"at": layers, "method": "drop_visual"}],
        "program": {"method": "yopo", "layers": layers, "heads": mask, "window": 5, "ffn": ffn},
    })  # fmt: skip
    found = flops.report(preset, plan)
    assert 2 * found["visual_tmacs"] == pytest.approx(expected, abs=3e-3)
    none = {"7b": 7.634, "13b": 14.888}[size]
    assert 2 * found["none"]["visual_tmacs"] == pytest.approx(none, abs=1e-3)
    assert f"{2 * found['visual_tmacs']:.3f} T" in found["notes"][0]
    assert "nominal" in found["notes"][1]
    visual, text = preset.visual, preset.text_before + preset.text_after
    pair = 2 * 2 * shape.head_dim / 2**20
    kept = (mask[:layers].sum() if heads else layers * shape.heads // 2) * visual
    assert found["kv_cache_mib_16bit"] == pytest.approx(
        pair * (kept + shape.layers * shape.heads * text)
    )


def linear_flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_not_computed(family):
    """Counted at the dispatcher: projections and feed-forward take exactly the rows, heads and
    neurons that the plan leaves; the cache holds exactly the bytes of the closed form."""
    model, plan = tiny_model(family), PLANS["yopo"]
    shape = ModelShape.from_config(model.config)
    sequence = model.build_sequence(**batch(prompts(), "left"), kind="left")
    text = [n - v for n, v in zip(sequence.layout.lengths, sequence.layout.visual, strict=True)]
    visual = sum(sequence.layout.visual)
    expected = 0
    for layer in range(LAYERS):
        whole, rows = 2 * shape.layer_weights, sum(text)
        if layer < 4:
            kept = plan.program.kept_heads(layer, 4)
            heads = 2 * len(kept) + 2 * len({head // 2 for head in kept})
            per_row = shape.hidden * shape.head_dim * heads + 3 * shape.hidden * (shape.mlp // 2)
            expected += 2 * visual * per_row
        else:  # text alone, padded to the longest
            rows = max(text) * len(text)
        expected += rows * whole
    expected += 2 * len(text) * shape.hidden * shape.vocab
    caches = []

    def run() -> None:
        output = model(sequence=sequence, reduction=plan, use_cache=True, logits_to_keep=1)
        caches.append(output.past_key_values)

    assert linear_flops(run) == expected
    # One sample fills its cache without padding: bytes as counted.
    alone = batch(prompts()[:1])
    with torch.no_grad():
        cache = model(**alone, reduction=plan, use_cache=True).past_key_values
    stages = plan.schedule(model.build_sequence(**alone).layout, LAYERS)
    held = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, SplitLayer):
            tensors += [layer.visual_keys, layer.visual_values]
        held += sum(each.numel() * each.element_size() for each in tensors)
    if "sliding_window" not in FAMILIES[family][2]:  # a full window holds less than it was given
        assert held == flops.kv_bytes(shape, stages, 4)


# ----------------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["renorm", "leaky"])
def test_nothing_left_out_is_no_plan(family, mode):
    model, inputs = tiny_model(family), batch(prompts())
    everything = ReductionPlan(program=YOPO(heads=1.0, mode=mode))
    with torch.no_grad():
        plain = model(**inputs, reduction="none", return_trace=True)
        same = model(**inputs, reduction=everything).logits
    real = plain.sequence.origin >= 0
    torch.testing.assert_close(same[real], plain.logits[real], atol=1e-5, rtol=1e-5)


def test_a_text_only_batch_runs_as_without_a_plan():
    model, samples = tiny_model(), [prompts()[1], prompts()[1]]
    inputs = {**batch(samples), "images": None}
    for plan in ("yopo", "yopo, leaky"):
        with torch.no_grad():
            one = model(**inputs, reduction=PLANS[plan]).logits
            two = model(**inputs, reduction="none").logits
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        tokens = [
            model.generate(**inputs, reduction=p, max_new_tokens=4, do_sample=False).tolist()
            for p in (PLANS[plan], "none")
        ]
        assert tokens[0] == tokens[1]


def test_renorm_is_leaky_where_only_neurons_are_left_out():
    """Without heads and layers left out there is nothing to renormalise."""
    model, inputs = tiny_model(), batch(prompts())
    with torch.no_grad():
        both = [
            model(**inputs, reduction=ReductionPlan(program=YOPO(window=3, ffn=3, mode=mode)))
            for mode in ("renorm", "leaky")
        ]
    torch.testing.assert_close(both[0].logits, both[1].logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [0.0, 0.25])
def test_no_heads_at_all(heads):
    """Text then never reads a picture: another picture changes nothing."""
    model, samples = tiny_model("qwen2"), prompts()
    plan = ReductionPlan(program=YOPO(heads=heads, ffn=2))
    inputs = batch(samples)
    with torch.no_grad():
        one = model(**inputs, reduction=plan, return_trace=True)
        two = model(**{**inputs, "images": inputs["images"] + 1}, reduction=plan)
    text = (one.sequence.origin >= 0) & (one.sequence.cell[..., 0] < 0)
    assert torch.equal(one.logits[text], two.logits[text]) == (heads == 0)


def test_neighbours_stay_within_their_field():
    """Anyres: the whole image and the tile field are apart, and so are two pictures."""
    anyres = {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[2 * TILE, TILE], [TILE, 2 * TILE]],
    }
    model = tiny_model(**anyres)
    ids = torch.tensor([[1, 5, -200, 6, -200, 7]])
    images = [torch.randn(3, 3, TILE, TILE) for _ in range(2)]
    sequence = model.build_sequence(
        ids, images=images, image_sizes=[(2 * TILE, TILE), (TILE, 2 * TILE)]
    )
    facts = sequence.facts[0].tolist()
    for settings in (YOPO(window=3), YOPO(window=5, window_causal=True), YOPO(window=1)):
        reach = (settings.window - 1) // 2
        seen = seen_by(settings, sequence.facts, None)[0]
        for query, (*_, grid, group, row, column) in enumerate(facts):
            for key, (*_, key_grid, key_group, key_row, key_column) in enumerate(facts):
                wanted = key <= query
                if group >= 0 and key_group >= 0:
                    near = abs(row - key_row) <= reach and abs(column - key_column) <= reach
                    wanted = near and grid == key_grid and (
                        key <= query or not settings.window_causal
                    )  # fmt: skip
                assert bool(seen[query, key]) == wanted, (settings, query, key)
    grids = sequence.grid[0][sequence.cell[0, :, 0] >= 0]
    assert grids.unique().tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        model(sequence=sequence, reduction=PLANS["yopo"])


class Adapter(nn.Linear):
    """Any module that only its own call knows how to run (LoRA, 4 bit): here twice the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / 2)


@pytest.mark.parametrize("plan", ["yopo", "yopo, leaky"])
def test_modules_that_cannot_be_sliced_run_whole(plan):
    plain, adapted = tiny_model("qwen2"), tiny_model("qwen2")
    for layer in adapted.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if type(module) is nn.Linear:
                    twin = Adapter(module.in_features, module.out_features, module.bias is not None)
                    twin.weight.data = 2 * module.weight.data
                    twin.bias = module.bias
                    setattr(parent, name, twin)
    with torch.no_grad():
        one, two = (
            model(**batch(prompts()), reduction=PLANS[plan], return_trace=True)
            for model in (plain, adapted)
        )
    real = one.sequence.origin >= 0
    torch.testing.assert_close(one.logits[real], two.logits[real], atol=1e-5, rtol=1e-5)


def test_half_precision_runs():
    model = tiny_model().to(torch.bfloat16)
    inputs = batch(prompts())
    inputs["images"] = inputs["images"].to(torch.bfloat16)
    for plan in ("yopo", "yopo, leaky"):
        tokens = model.generate(**inputs, reduction=PLANS[plan], max_new_tokens=3, do_sample=False)
        assert tokens.shape == (4, 3)
        out = model(**inputs, labels=labels_of(inputs), reduction=PLANS[plan])
        assert out.loss.isfinite()


def test_the_plain_template_keeps_its_last_visual_token():
    """The token in front of the first word of a caption stays, so its loss has a row."""
    model = tiny_model().train()
    ids = torch.tensor([[-200, 5, 9, 4]])
    labels = torch.tensor([[-100, 5, 9, 4]])
    out = model(
        ids, labels=labels, images=pictures([([-200, 5], 1)]), reduction=PLANS["yopo"],
        logits_to_keep="targets", return_trace=True,
    )  # fmt: skip
    assert out.stages[1].visual == (1,)
    assert out.logits.shape[0] == 3
    out.loss.backward()


def test_a_cache_that_is_reset_serves_any_plan():
    model, inputs = tiny_model("mistral"), batch(prompts(), "left")
    cache = StagedCache(model.config)
    for plan in ("yopo", "none", "yopo, leaky", "yopo"):
        with torch.no_grad():
            fresh = model(**inputs, reduction=PLANS[plan], use_cache=True)
            again = model(**inputs, reduction=PLANS[plan], past_key_values=cache, use_cache=True)
            logits = [
                model(torch.full((4, 1), 7), past_key_values=o.past_key_values).logits
                for o in (fresh, again)
            ]
        assert torch.equal(*logits)
        cache.reset()


# ----------------------------------------------------------------------------- calibration
def test_the_vote_is_the_originals():
    """Against the rule written out: more than 40 of 100 samples above the threshold."""
    ratios = np.random.default_rng(0).lognormal(-3, 1, (100, 8, 4))
    critical = critical_ratios(ratios)
    for threshold in (0.0, 0.02, 0.035, 0.077, 0.2, 10.0):
        votes = (ratios > threshold).sum(0)
        wanted = votes > 40
        wanted[:2] = True
        assert np.array_equal(mask_above(critical, threshold), wanted)
    for few in (1, 2, 3, 5, 7):  # other numbers of samples
        part = ratios[:few]
        wanted = (part > 0.05).sum(0) > 0.4 * few
        assert np.array_equal(mask_above(critical_ratios(part), 0.05, 0), wanted)


@pytest.mark.parametrize("average", [1.0, 1.5, 2, 3.25, 4])
def test_a_wanted_average_is_met(average):
    critical = critical_ratios(np.random.default_rng(1).random((10, 8, 4)))
    mask = mask_above(critical, threshold_for(critical, average))
    assert mask.mean(1).sum() * 4 == pytest.approx(average * 8)
    left_out, kept = critical[2:][~mask[2:]], critical[2:][mask[2:]]
    assert not kept.size or not left_out.size or left_out.max() < kept.min()


def test_averages_that_cannot_be_met():
    critical = np.ones((8, 4))
    for average in (0.9, 4.1):
        with pytest.raises(ValueError, match="1 to 4 are accepted"):
            threshold_for(critical, average)
    # Equal ratios are kept or left out together.
    assert mask_above(critical, threshold_for(critical, 2)).sum() == 8
    with pytest.raises(ValueError, match="votes"):
        critical_ratios(np.ones((3, 2, 2)), 1.0)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build.main(["--out", str(folder), "--parts", "tokenizer", "eval"])
    return folder / "eval"


def run_calibration(data_root, tmp_path, *more):
    calibrate_heads.main([
        "--model-path", str(ROOT / "checkpoints/llava-digits"), "--output", str(tmp_path / "heads"),
        "--data-root", str(data_root), "--device", "cpu", *more,
    ])  # fmt: skip


def test_the_command_writes_masks_that_plans_read(data_root, tmp_path, capsys):
    run_calibration(data_root, tmp_path, "--benchmark", "digits_pope,digits_gqa", "--samples", "12",
                    "--average-heads", "2", "3")  # fmt: skip
    shown = capsys.readouterr().out
    for average in (2, 3):
        stem = tmp_path / f"heads_{average}"
        assert f"{stem}.npy" in shown
        mask = load_head_mask(f"{stem}.npy")
        assert np.array_equal(mask, load_head_mask(f"{stem}.safetensors"))
        assert mask[:2].all()
        assert mask.sum() <= average * 6
        origin = read_origin(f"{stem}.safetensors")
        assert origin["samples"] == "12"
        assert len(origin["data_sha256"]) == 64
        assert "transformers" in origin["environment"]
        plan = ReductionPlan.parse(f"yopo:layers=5,heads={stem}.npy")
        plan.validate(6)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--average-heads", "3"], "give --question-file or --benchmark"),
        (["--benchmark", "digits_pope"], "give --threshold or --average-heads"),
        (["--benchmark", "digits_pope", "--threshold", "1", "--samples", "100000"], "100000"),
        (["--benchmark", "digits_pope", "--threshold", "1", "--votes", "2"], "--votes"),
    ],
)
def test_the_command_says_what_is_wrong(data_root, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run_calibration(data_root, tmp_path, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_samples_come_evenly_from_all_sets():
    def questions(name, count):
        return [Question(f"{name}{i}", i, "?", (f"{name}{i}.png",)) for i in range(count)]

    blind = Question("x", 0, "?")
    sets = [(questions("a", 3), Path("a")), ([blind, *questions("b", 40)], Path("b")),
            (questions("c", 9), Path("c"))]  # fmt: skip
    taken = choose_samples(sets, 21)
    assert [sum(folder == Path(n) for _, folder in taken) for n in "abc"] == [3, 9, 9]
    assert len({question.uid for question, _ in taken}) == 21
    assert choose_samples(sets, 52)
    with pytest.raises(ValueError, match="53 samples.*hold 52"):
        choose_samples(sets, 53)

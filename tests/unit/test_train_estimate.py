"""``llava train --estimate`` against real runs: weights, gradients and optimizer to the byte, what
autograd keeps against its own hooks and against the allocator."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import CLIPVisionConfig, LlamaConfig, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from test_train import command, pictures  # noqa: E402
from train_fixtures import write_all  # noqa: E402

from llava.train.arguments import parse_args  # noqa: E402
from llava.train.dual_speed import dual_speed_of  # noqa: E402
from llava.train.estimate import (  # noqa: E402
    estimate,
    rate_of,
    read_command,
    time_of,
    wanted,
)
from llava.train.estimate_forward import (  # noqa: E402
    Kept,
    Sample,
    batch_of,
    build_model,
    fake_model,
    kept_of,
    micro_batch,
    samples_of,
    step_of,
    used_parameters,
)
from llava.train.estimate_state import Row, buffer_bytes, state_rows  # noqa: E402
from llava.train.train import main, make_trainer  # noqa: E402

CUTS = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    write_all(folder)
    return folder


def words(files: Path, **flags: object) -> list[str]:
    flags = {
        "init_from_config": files / "config", "output_dir": files / "out", "max_steps": 1,
        **pictures(files), **flags,
    }  # fmt: skip
    return command(**flags)


def rows_of(files: Path, ranks: int = 1, **flags: object) -> dict[str, Row]:
    """As `estimate` has them, without its backward pass."""
    asked = read_command(words(files, **flags), ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(asked)
        used = used_parameters(step_of(model, asked, Sample(10, 1, visual=4))().loss)
        rows = state_rows(model, asked.engine, asked.flags, used)
        rows.append(Row("buffers", buffer_bytes(model, asked.engine, asked.checkpointing)))
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose layers and logits are both worth counting; no weight is needed."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Gradients(TrainerCallback):
    """Bytes of all gradients in front of an update."""

    bytes = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad for p in model.parameters() if p.grad is not None]
        self.bytes = sum(grad.nbytes for grad in found)


@pytest.fixture(scope="module")
def base(files: Path) -> Path:
    main(words(files, vision_tower=None, image_folder=None, output_dir=files / "base",
               data_path=files / "data" / "text.jsonl"))  # fmt: skip
    return files / "base"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tune_mm_mlp_adapter": True, "optim": "adamw_torch"},
        {"unfreeze_mm_vision_tower": True, "optim": "adafactor"},
        {"lora_enable": True, "lora_r": 4, "bf16": True, "use_cpu": True},
    ],
)
def test_state_is_that_of_a_run_to_the_byte(files, base, tmp_path, flags):
    if "lora_enable" in flags:
        flags = {**flags, "init_from_config": None, "model_name_or_path": base}
    flags = {**flags, "output_dir": tmp_path, "save_rehearsal": False}
    trainer, _ = make_trainer(*parse_args(words(files, **flags)))
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    states = [
        value.nbytes
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()  # but for step counts
    ]
    held = sum(parameter.nbytes for parameter in trainer.model.parameters())
    found = rows_of(files, **flags)
    assert found["weights"].device == held
    assert found["gradients"].device == gradients.bytes
    assert found["optimizer"].device == sum(states)


SAMPLE = Sample(text=40, pictures=1, visual=4)


def compare(kept: Kept, forward: Callable[[], Any], samples: int, layers: int) -> None:
    """What was found for `samples` of `SAMPLE` against the allocator's figures in a real step, of
    so many layers that are computed again."""
    forward().loss.backward()  # gradients are there from now on, and whatever is made once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss = forward().loss
        with record_function("backward pass"):
            loss.backward()
    events = list(trace.profiler.kineto_results.events())
    began = next(event.start_ns() for event in events if event.name() == "backward pass")
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = list(itertools.accumulate(size for _, size in sizes))
    between, most = live[sum(time < began for time, _ in sizes) - 1], max(live)
    # The pictures are there before a real step begins, and the host's table of tokens unless soft
    # tokens change it. Each layer keeps the CPU generator's state; on a GPU that is 16 bytes.
    images, table = samples * 3 * 28 * 28 * 4, samples * SAMPLE.tokens * 9 * 8
    states = layers * torch.get_rng_state().nbytes
    for found, real in ((kept.held, between), (kept.most, most)):
        assert 0.99 * (real - states + images) < found < 1.01 * (real - states + images + table)


HALF = {"bf16": True, "use_cpu": True}


@pytest.mark.parametrize(
    ("flags", "checkpointing"),
    [
        ({**CUTS, **HALF}, False),
        ({**CUTS, **HALF}, True),
        ({**CUTS, "deepspeed": '{"zero_optimization": {"stage": 1}}', "bf16": True}, True),
        ({"attn_implementation": "eager", "packed": True}, True),
        ({"tune_mm_mlp_adapter": True, **HALF}, True),
        ({"unfreeze_mm_vision_tower": True}, True),
        ({"lora_enable": True, "lora_r": 4, "lora_dropout": 0, **HALF}, False),
        ({**CUTS, "dual_speed": 1.0}, False),
        ({**CUTS, "dual_speed": 1.0, "dual_speed_isolator": 0, **HALF}, True),
    ],
)
def test_a_step_takes_what_a_real_one_takes(files, wide, flags, checkpointing):
    """Between the passes and at the fullest moment; at --dual_speed 1 every step is slow."""
    base = {"init_from_config": wide}
    if "lora_enable" in flags:
        base = {"init_from_config": None, "model_name_or_path": wide}
    flags = {**base, **flags, "per_device_train_batch_size": 16, "model_max_length": 64}
    asked = read_command(words(files, **flags, gradient_checkpointing=checkpointing), 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(asked)
        kept = kept_of(model, asked, SAMPLE, dual_speed_of(model, asked.model, asked.flags))
    torch.manual_seed(0)
    model = build_model(asked)
    dual = dual_speed_of(model, asked.model, asked.flags)
    layers = model.config.num_hidden_layers if checkpointing else 0
    compare(kept, step_of(model, asked, SAMPLE, dual), samples=16, layers=layers)


@pytest.mark.parametrize("trained", [False, True])
def test_checkpointing_leaves_a_frozen_tower_alone(files, trained):
    """Layers are computed again for the backward pass in a tower that is trained, and there alone;
    the projector gets the same gradient as without checkpointing."""
    sample, runs, gradients = Sample(text=5, pictures=1, visual=4), [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        flags = {"unfreeze_mm_vision_tower": trained, "gradient_checkpointing": checkpointing}
        model = build_model(read_command(words(files, **flags), 1))
        calls = []
        tower = dict(model.get_vision_tower().named_modules())
        layer = next(tower[name] for name in tower if name.endswith("layers.0.mlp.fc1"))
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = {**batch_of(model, sample, 2), "images": torch.randn(2, 3, 28, 28).sign()}
        model(**batch, logits_to_keep="targets").loss.backward()
        runs.append(len(calls))
        gradients.append(model.get_model().mm_projector[0].weight.grad)
    assert runs == [1, 1 + trained]
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_ranks_share_what_their_engine_shares(files):
    def zero(stage, **more):
        return json.dumps({"zero_optimization": {"stage": stage, **more}})

    one = rows_of(files, deepspeed=zero(0), bf16=True)
    count = one["gradients"].device // 2
    weights = one["weights"].device
    assert one["optimizer"].device == 12 * count
    assert weights > 2 * count  # the tower is frozen
    two = rows_of(files, 4, deepspeed=zero(2), bf16=True)
    assert two["weights"].device == weights
    assert 4 * two["gradients"].device == pytest.approx(one["gradients"].device, abs=8)
    assert 4 * two["optimizer"].device == pytest.approx(one["optimizer"].device, abs=8)
    three = rows_of(files, 4, deepspeed=zero(3), bf16=True)
    assert three["optimizer"] == two["optimizer"]
    small = 10 * 16  # of hidden 16: parameters that stay whole
    with FakeTensorMode(allow_non_fake_inputs=True):
        asked = read_command(words(files), 1)
        shapes = [p.shape for p in fake_model(asked).parameters()]
    sizes = [shape.numel() for shape in shapes]
    whole = 2 * sum(size for size in sizes if size <= small)
    assert three["weights"].device - whole == pytest.approx(weights / 4, abs=2 * len(sizes))
    away = {f"offload_{name}": {"device": "cpu"} for name in ("optimizer", "param")}
    away = rows_of(files, 4, deepspeed=zero(3, **away), bf16=True)
    assert away["weights"].host + away["weights"].device == three["weights"].device
    assert away["optimizer"] == Row("optimizer", 0, three["optimizer"].device)
    assert away["gradients"].device == 0
    sharded = rows_of(files, 2, fsdp="full_shard")
    rows = [-(-shape[0] // 2) * (shape.numel() // shape[0]) for shape in shapes]
    assert sharded["weights"].device == 4 * sum(rows)
    assert sharded["optimizer"].device == 2 * sharded["gradients"].device
    assert rows_of(files, 2, fsdp="full_shard offload")["weights"].host == 4 * sum(rows)
    alone, ddp = rows_of(files), rows_of(files, 4)
    assert alone.pop("buffers").device == 0
    assert ddp.pop("buffers").device == alone["gradients"].device
    assert ddp == alone


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_take_what_bitsandbytes_takes(files, base, tmp_path, bits):
    """Weights with their scales and tables to the byte; of a step, where 4 bits compute in
    bfloat16 and 8 bits, whose path on a CPU is another one there, in float32."""
    pytest.importorskip("bitsandbytes")
    flags = {
        "init_from_config": None, "model_name_or_path": base, "lora_enable": True, "lora_r": 4,
        "bits": bits, "lora_dropout": 0, "gradient_checkpointing": True,
        "save_rehearsal": False, "output_dir": tmp_path, **(HALF if bits == 4 else {}),
    }  # fmt: skip
    trainer, _ = make_trainer(*parse_args(words(files, **flags)))
    trainer.train()
    model = trainer.model
    held = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            state = getattr(module.weight, "quant_state", None)
            parts = [state.absmax, state.code] if state else [module.state.SCB]
            if state and state.nested:
                parts += [state.state2.absmax, state.state2.code, state.offset]
            held += sum(part.nbytes for part in parts)
    assert rows_of(files, **flags)["weights"].device == held
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    asked = read_command(words(files, **{**flags, "per_device_train_batch_size": 16}), 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept = kept_of(fake_model(asked), asked, SAMPLE)
    compare(kept, step_of(model.train(), asked, SAMPLE), samples=16, layers=4)


def test_quantised_weights_are_whole_on_every_rank(files, base):
    flags = {"init_from_config": None, "model_name_or_path": base, "lora_enable": True}
    flags |= {"deepspeed": json.dumps({"zero_optimization": {"stage": 2}}), "bf16": True}
    layer = 4 * 16 * 16 + 3 * 16 * 32
    whole = rows_of(files, 2, **flags)["weights"]
    for double, scales in ((True, layer // 64 + 7 * 4 * (1 + 1 + 16 + 256)),
                           (False, 4 * (layer // 64 + 7 * 16))):  # fmt: skip
        quantised = rows_of(files, 2, **flags, bits=4, double_quant=double)["weights"]
        assert whole.device - quantised.device == 4 * (2 * layer - layer // 2 - scales)


def test_time_needs_a_rate(tmp_path):
    assert rate_of(989.0, None, None) is None
    assert rate_of(100.0, 0.4, None).flops == pytest.approx(4e13)
    for peak, mfu, text in ((None, 0.4, "peak_tflops"), (100.0, 1.5, "mfu 1.5")):
        with pytest.raises(ValueError, match=text):
            rate_of(peak, mfu, None)
    bench = tmp_path / "bench.json"
    figures = {"tflops": {"packed_plan": 2.0}, "packed_plan_ms": 500.0}
    bench.write_text(json.dumps({**figures, "preset": "cpu-512", "device": "cpu"}))
    assert rate_of(None, None, str(bench)).flops == pytest.approx(4e12)
    bench.write_text("{}")
    with pytest.raises(ValueError, match=r"bench\.json"):
        rate_of(None, None, str(bench))


def test_the_command_prints_a_table_and_starts_nothing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: pytest.fail("made a folder"))
    asked = ["--estimate", "--world_size", "4", "--text_tokens", "20", "--gradient_checkpointing",
             "True", "--bf16", "True", "--deepspeed", "scripts/zero2.json"]  # fmt: skip
    main([*words(files, **CUTS, output_dir=tmp_path / "none"), *asked])
    text = capsys.readouterr().out
    assert "one of 4 rank(s), zero2; 4 samples in a micro-batch, checkpointing on" in text
    assert "24 tokens" in text
    assert "64 tokens" in text
    assert "no time: give --peak_tflops and --mfu" in text
    assert "slow" not in text
    assert not (tmp_path / "none").exists()
    rate = rate_of(1e-6, 0.5, None)
    asked = read_command(words(files, **CUTS, per_device_train_batch_size=3), 2)
    found = estimate(asked, text=20, rate=rate)
    time = found.time
    assert time["samples_a_step"] == 6
    assert time["seconds_a_step"] == pytest.approx(3 * time["tflops_a_sample"] / 0.5e-6)
    assert time["computed_tokens_a_sample"] < time["tokens_a_sample"] == 24
    total = found.total("usual").device
    assert total == sum(row.device for row in [*found.rows, *found.batches["usual"]])
    assert json.loads(json.dumps(found.to_dict()))["total"]["usual"]["device"] == total
    renamed = read_command([*words(files), "--per_gpu_train_batch_size", "3"], 2)
    assert renamed.flags.per_device_train_batch_size == 3
    for line, text in (
        (words(files, no_such_flag=1), "no_such_flag"),
        (words(files, deepspeed="nowhere.json"), "nowhere.json: there is no such file"),
        (words(files, reduction="fastv:k=9,r=0.5"), "layer 9"),
        (words(files, attn_implementation="nonsense"), "nonsense"),
        (words(files, mm_vision_select_layer=-9), "the tower .* has 2 layers"),
        (words(files, model_max_length=4), "cannot hold a picture of 4 visual"),
        (words(files, model_max_length=8), "do not fit --model_max_length 8 beside text"),
        (words(files, packed=True, token_budget=7), "do not fit --token_budget 7 beside text"),
    ):
        with pytest.raises(ValueError, match=text):
            estimate(read_command(line, 1), pictures=2)


def test_two_speeds_have_rows_and_a_mean_of_their_own(files, tmp_path, capsys):
    """Memory of either kind of step is that of the commands without and with the plan, and the
    learned tokens, the teacher and its divergence beside them; time is the mean."""
    batch = {"per_device_train_batch_size": 16}
    line = words(files, **CUTS, **batch, dual_speed=0.25, peak_tflops=1)
    main([*line, "--estimate", "--text_tokens", "20", "--mfu", "0.5", "--json",
          str(tmp_path / "found.json")])  # fmt: skip
    text = capsys.readouterr().out
    assert "a slow step, on all tokens and with a teacher, in place of these:" in text
    assert "a sample of a fast step: 24 tokens, 22 computed" in text
    assert "of a slow one (25%): 24 tokens, 24 computed" in text
    found = json.loads((tmp_path / "found.json").read_text())
    rate = rate_of(1.0, 0.5, None)
    sample, plain = Sample(20, 1, visual=4), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, flags in (("fast", CUTS), ("slow", {})):
            asked = read_command(words(files, **flags, **batch), 1)
            model = fake_model(asked)
            plain[name] = time_of(model, asked, sample, rate)["seconds_a_step"]
        kept = kept_of(model, asked, sample)
    times = {name: found["time"][name]["seconds_a_step"] for name in ("fast", "slow")}
    assert times["fast"] == pytest.approx(plain["fast"])
    student = plain["slow"]
    assert times["slow"] == pytest.approx(student + times["fast"] / 3, rel=0.02)  # and a teacher
    mean = 0.75 * times["fast"] + 0.25 * times["slow"]
    assert found["time"]["seconds_a_step"] == pytest.approx(mean)
    added = [row["device"] for row in found["slow"]["usual"]]
    assert added[0] > kept.held
    assert sum(added) > kept.most
    rows = {row["name"]: row["device"] for row in found["rows"]}
    assert found["slow_total"]["usual"]["device"] == sum(rows.values()) + sum(added)
    isolator = 4 * 4 * 16
    alone = {name: row.device for name, row in rows_of(files).items()}
    assert rows["weights"] - alone["weights"] == rows["gradients"] - alone["gradients"] == isolator
    assert rows["optimizer"] - alone["optimizer"] == 2 * isolator
    for flags, message in (({"reduction": "none"}, "needs a plan"),
                           ({**CUTS, "tune_mm_mlp_adapter": True}, "always fast")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            estimate(read_command(words(files, **flags, dual_speed=0.1), 1))


@pytest.mark.parametrize("text", ["all", "options|question"])
def test_texts_that_a_plan_compares_with_are_there(files, text):
    asked = read_command(words(files, reduction=f"simignore:keep=2,text={text}"), 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step_of(fake_model(asked), asked, Sample(10, 1, visual=4))().loss.requires_grad


def test_a_token_budget_says_how_many_samples_there_are_at_once(files):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for budget, lengths, counts in ((100, [24, 64], [4, 1]), (22, [22, 22], [1, 1])):
            flags = {"token_budget": budget, "per_device_train_batch_size": 7, "packed": True}
            asked = read_command(words(files, **flags), 2)
            model = fake_model(asked)
            samples = samples_of(model, asked, 20, 1)
            assert [sample.tokens for sample in samples] == lengths
            assert [micro_batch(asked, sample) for sample in samples] == counts
            assert time_of(model, asked, samples[0], None)["samples_a_step"] == 2 * counts[0]
            logits = step_of(model, asked, samples[0])().logits
            assert len(logits) == counts[0] * (lengths[0] - 4)


def test_anyres_takes_the_picture_with_most_tiles(files):
    flags = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    found = estimate(read_command(words(files, **flags), 1), text=10)
    assert found.samples["usual"].tiles == 5  # 2 x 2 and the whole picture
    assert found.samples["usual"].visual == 4 + 4 * (4 + 1)
    assert found.samples["longest"].tokens == 64


def test_a_checkpoint_brings_its_own_tower(files):
    """Structure from its config.json; the folder that it names may be gone."""
    flags = {"mm_projector_type": None, "mm_vision_select_layer": None, "vision_tower": None}
    asked = read_command(words(files), 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = fake_model(asked).config
    config.mm_vision_tower = "/gone"
    config.save_pretrained(files / "checkpoint")
    again = {**flags, "init_from_config": None, "model_name_or_path": files / "checkpoint"}
    expected, found = (estimate(read_command(words(files, **more), 1)) for more in ({}, again))
    assert found.parameters == expected.parameters
    assert found.batches == expected.batches


def test_a_tower_may_leave_out_what_is_the_librarys_default(files, tmp_path):
    """CLIP-B/32's config.json says neither its width nor its geometry."""
    CLIPVisionConfig().save_pretrained(tmp_path)
    flags = {"vision_tower": tmp_path, "model_max_length": 100}
    found = estimate(read_command(words(files, **flags), 1), text=10)
    assert found.samples["usual"].visual == (224 // 32) ** 2
    with pytest.raises(ValueError, match=r"vision tower '.*nowhere' cannot be read"):
        estimate(read_command(words(files, vision_tower=tmp_path / "nowhere"), 1))


def test_who_asks_for_an_estimate():
    assert wanted(["--estimate"])
    assert wanted(["--estimate", "--bf16", "True"])
    assert wanted(["--estimate", "True"])
    assert not wanted(["--estimate", "False"])
    assert not wanted(["--output_dir", "estimate"])

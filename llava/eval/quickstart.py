"""The measurements of the quickstart: shipped checkpoints, with and without dropping.

Special here: every plan answers the same questions through the loop that `llava eval` uses; costs
come from the lengths of real prompts, times from one real batch with all plans in turn.
`llava.quickstart` builds the data first and writes the results: ``llava quickstart``.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava.conversation import resolve_conv_mode
from llava.eval.benchmarks import LoadedBenchmark, load_benchmark
from llava.eval.pages import method_of
from llava.eval.questions import Question
from llava.eval.run import Result, evaluate
from llava.eval.scorers.interval import paired_difference
from llava.eval.speed import Workload, time_plans
from llava.mm_utils import load_image
from llava.model.tracing import look
from llava.prompting import questions_batch
from llava.reduction import REDUCERS, ReductionPlan, flops
from llava.reduction.budget import METHODS, Budget, figures, solve
from llava.reduction.flops import ModelShape, Preset
from llava.reduction.forms import Staged
from llava.sequence import Layout
from llava.utils import progress, quiet

parse = ReductionPlan.parse
BASELINES = ("random", "uniform")
BUDGETS = (0.6, 0.5, 0.3)
"""PyramidDrop's λ; its FLOPs are what the other methods may use."""
COST_SAMPLE = 64
"""Questions of each set whose lengths give its cost."""


# ----------------------------------------------------------------------------- plans, checkpoints
@dataclass(frozen=True)
class Setting:
    """One column of the experiment. budget: λ of the PyramidDrop plan whose prefill FLOPs bound
    this one's. share: those FLOPs over the FLOPs without a plan."""

    label: str
    plan: ReductionPlan
    budget: float | None = None
    share: float | None = None
    blind: bool = False

    @property
    def plan_method(self) -> str:
        """What the plan's methods are called."""
        return method_of(str(self.plan))


def method_names() -> list[str]:
    """All methods that a budget can be given for, the two controls last."""
    return [name for name in METHODS if name not in BASELINES] + list(BASELINES)


def settings(
    layers: Sequence[int], preset: Preset, budgets: Sequence[float] = BUDGETS
) -> list[Setting]:
    """none, blind, and each method at each budget.

    PyramidDrop and the controls cut in front of `layers`; the other methods where they usually do,
    and the budget solver finds what they may keep for a question of `preset`. A method that cannot
    get down to a budget is left out there.
    """
    found = [Setting("none", ReductionPlan()), Setting("blind", ReductionPlan(), blind=True)]
    whole = figures(preset, ReductionPlan()).full_tflops
    bounds = []
    for budget in budgets:
        spent = figures(preset, staged("pyramiddrop", layers, budget)).full_tflops
        bounds.append((budget, spent, spent / whole))
    for method in method_names():
        plans = [
            (plan_within(method, layers, preset, budget, spent), budget, share)
            for budget, spent, share in bounds
        ]
        for number, (plan, budget, share) in enumerate(plans):
            # A plan that also keeps within the next budget is shown there.
            if plan is not None and plan not in [each[0] for each in plans[number + 1 :]]:
                found.append(Setting(f"{method} {100 * share:.0f} %", plan, budget, share))
    return found


def plan_within(
    method: str, layers: Sequence[int], preset: Preset, budget: float, tflops: float
) -> ReductionPlan | None:
    """The plan of a method for a budget; None where it has none.

    A layer program leaves out heads and neurons that a model must be trained to do without; here it
    only chooses its last visual layer.
    """
    room = tflops * (1 + 1e-9)  # so that a bound that is met exactly is met
    if issubclass(REDUCERS[method], Staged):
        return staged(method, layers, budget)
    if not hasattr(REDUCERS[method], "budget"):
        plans = (f"{method}:layers={last}" for last in range(preset.shape.layers - 1, 0, -1))
        fitting = (plan for plan in plans if figures(preset, parse(plan)).full_tflops <= room)
        return next(map(parse, fitting), None)
    try:
        return solve(preset, method, Budget("full_tflops", room))[0].plan
    except ValueError:
        return None


def staged(method: str, layers: Sequence[int], budget: float) -> ReductionPlan:
    """Cuts in front of `layers` that keep λ, λ², λ³ ..."""
    ratios = [round(budget ** (k + 1), 6) for k in range(len(layers))]
    return ReductionPlan.parse(f"{method}:layers={list(layers)},ratios={ratios}")


def typical(checkpoint: Checkpoint, loaded: LoadedBenchmark) -> Preset:
    """A question of a set, as the budget solver wants it."""
    batch = checkpoint.batch(loaded.questions[:COST_SAMPLE], loaded.image_folder)
    layout = checkpoint.layout(batch)
    visual = layout.visual[0]
    text = round(sum(layout.lengths) / len(layout.lengths)) - visual
    return Preset(checkpoint.shape, text // 2, visual, text - text // 2, "none")


def cut_layers(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """Where to cut: as a checkpoint that was trained with a plan says, else at the quarters."""
    for checkpoint in checkpoints:
        plan = ReductionPlan.parse(checkpoint.stored_plan)
        if plan.cuts:
            return [cut.at for cut in plan.cuts]
    depth = checkpoints[0].model.config.num_hidden_layers
    return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what it needs to read a question."""

    name: str
    tokenizer: Any
    model: Any
    image_processor: Any

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Checkpoint:
        """Raises FileNotFoundError for a folder that is not there, ValueError for a broken one."""
        from transformers.utils.logging import disable_progress_bar

        from llava.model.builder import load_pretrained_model

        disable_progress_bar()
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no checkpoint in {folder}: config.json is missing")
        with quiet():
            tokenizer, model, processor, _ = load_pretrained_model(str(folder), device=device)
        return cls(folder.name, tokenizer, model, processor)

    @property
    def stored_plan(self) -> Any:
        """The plan the checkpoint was trained with, as its config has it."""
        return getattr(self.model.config, "visual_token_reduction", None)

    @property
    def shape(self) -> ModelShape:
        """What its cost depends on."""
        return ModelShape.from_config(self.model.config, self.model.get_vision_tower().config)

    def batch(self, questions: Sequence[Question], folder: Path) -> dict[str, Any]:
        """Model inputs of some questions, left-padded."""
        config = self.model.config
        conv_mode, _ = resolve_conv_mode(None, config)
        asked = [(q.text, [load_image(folder / image) for image in q.images]) for q in questions]
        return questions_batch(self.tokenizer, self.image_processor, config, conv_mode, asked)

    def layout(self, batch: Mapping[str, Any]) -> Layout:
        """What the host knows about a batch."""
        with torch.inference_mode():
            return self.model.build_sequence(**batch, kind="left").layout

    def workload(self, questions: Sequence[Question], folder: Path, new_tokens: int) -> Workload:
        """Some questions as a batch for the timing harness."""
        batch = self.batch(questions, folder)
        return Workload(
            self.model,
            self.shape,
            batch["input_ids"],
            list(batch["images"]),
            mask=batch["attention_mask"],
            texts=batch["texts"],
            new_tokens=new_tokens,
        )


# ----------------------------------------------------------------------------- accuracy
def run(
    checkpoint: Checkpoint, loaded: LoadedBenchmark, setting: Setting, batch_size: int = 64
) -> Result:
    """Answer and score one set with one plan, silently."""
    with quiet():
        return evaluate(
            checkpoint.model,
            checkpoint.tokenizer,
            checkpoint.image_processor,
            loaded,
            reduction=setting.plan,
            batch_size=batch_size,
            blind=setting.blind,
            model_id=checkpoint.name,
        )


def questions_per_second(
    checkpoint: Checkpoint, sets: Sequence[LoadedBenchmark], setting: Setting, batch_size: int
) -> float:
    """How fast one thread answers with a plan: a batch of each set, after one that warms up."""
    batches = [replace(loaded, questions=loaded.questions[:batch_size]) for loaded in sets]
    run(checkpoint, batches[0], setting, batch_size)
    start = time.perf_counter()
    for batch in batches:
        run(checkpoint, batch, setting, batch_size)
    seconds = time.perf_counter() - start
    return sum(len(batch.questions) for batch in batches) / seconds


@dataclass(frozen=True)
class Job:
    """One set answered by one checkpoint with one plan; a worker needs no more than this."""

    folder: str
    data_root: str
    name: str
    setting: Setting
    limit: int | None
    batch_size: int


_load_checkpoint = functools.lru_cache(maxsize=None)(Checkpoint.load)
_load_set = functools.lru_cache(maxsize=None)(load_benchmark)


@dataclass(frozen=True)
class Answered:
    """row: the result row of a job. scores, pictures: of each question, in a fixed order."""

    row: dict[str, Any]
    scores: tuple[float, ...]
    pictures: tuple[str, ...]


def do_job(job: Job) -> Answered:
    """The result of one job."""
    loaded = _load_set(job.name, job.data_root, job.limit)
    result = run(_load_checkpoint(job.folder), loaded, job.setting, job.batch_size)
    items = sorted(result.scores.per_item, key=lambda item: item["uid"])
    pictures = tuple(f"{job.name}/{item['image']}" for item in items)
    return Answered(result.row, tuple(float(item["score"]) for item in items), pictures)


def do_jobs(jobs: Sequence[Job], workers: int) -> list[Answered]:
    """All results in the order of the jobs, with one bar over them.

    Small models do not get faster with threads: each worker is a process with one thread.
    """
    if workers == 1:
        return [do_job(job) for job in progress(jobs, "answering", len(jobs))]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
        rows = list(progress(pool.imap(do_job, jobs), "answering", len(jobs)))
        pool.close()
        pool.join()
    return rows


def cost_row(
    checkpoint: Checkpoint, loaded: LoadedBenchmark, plans: Sequence[Setting]
) -> dict[str, dict[str, Any]]:
    """Mean cost of a question of this set under each plan, by the plan's label."""
    layout = checkpoint.layout(
        checkpoint.batch(loaded.questions[:COST_SAMPLE], loaded.image_folder)
    )
    shape, samples, found = checkpoint.shape, len(layout.lengths), {}
    for setting in plans:
        stages = setting.plan.schedule(layout, shape.layers)
        found[setting.label] = {
            "visual_tmacs": flops.mean_visual_macs(shape, stages) / flops.TERA,
            "full_tflops": flops.prefill_flops(shape, stages) / samples / flops.TERA,
            "kept_tokens": [stage.visual[0] for stage in stages],
        }
    return found


def rows(
    checkpoint: Checkpoint,
    sets: Sequence[LoadedBenchmark],
    plans: Sequence[Setting],
    answered: Sequence[Answered],
    times: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """The rows of summary.json for one checkpoint.

    answered: its results, sets within plans. times: by label, as `times` returns them.
    """
    costs = {loaded.benchmark.name: cost_row(checkpoint, loaded, plans) for loaded in sets}
    settings_of = [setting for setting in plans for _ in sets]
    return [
        {
            "checkpoint": checkpoint.name,
            "plan": "blind" if setting.blind else one.row["plan"],
            **{key: one.row[key] for key in ("set", "accuracy", "low", "high", "n")},
            **costs[one.row["set"]][setting.label],
            **times["none" if setting.blind else setting.label],
            "budget": setting.budget,
            "flops_budget": setting.share,
        }
        for setting, one in zip(settings_of, answered, strict=True)
    ]


def comparisons(
    checkpoint: str, plans: Sequence[Setting], answered: Sequence[Answered]
) -> list[dict[str, Any]]:
    """Each method against each control at the same budget, question by question over all sets.

    `value` (points, method less control) with its 95 % interval resamples pictures; `mcnemar_p`
    takes the questions for independent.
    """
    sets = len(answered) // len(plans)
    items = {
        (setting.plan_method, setting.budget): (
            [score for one in mine for score in one.scores],
            [picture for one in mine for picture in one.pictures],
        )
        for number, setting in enumerate(plans)
        for mine in [answered[number * sets : (number + 1) * sets]]
        if setting.budget is not None
    }
    shares = {setting.budget: setting.share for setting in plans}
    found = []
    for (method, budget), (scores, pictures) in items.items():
        for control in BASELINES:
            if method in BASELINES or (control, budget) not in items:
                continue
            other, others_pictures = items[control, budget]
            assert pictures == others_pictures
            gain = paired_difference(other, scores, pictures)._asdict()
            gain.update({key: 100 * gain[key] for key in ("value", "low", "high")})
            found.append(
                {
                    "checkpoint": checkpoint,
                    "method": method,
                    "control": control,
                    "budget": budget,
                    "flops_budget": shares[budget],
                    **gain,
                }
            )
    return found


# ----------------------------------------------------------------------------- times
def times(
    checkpoint: Checkpoint,
    loaded: LoadedBenchmark,
    plans: Sequence[Setting],
    *,
    batch: int = 32,
    repeats: int = 5,
) -> dict[str, dict[str, Any]]:
    """Prefill and decode time of one real batch under each plan, by label (see `time_plans`)."""
    work = checkpoint.workload(loaded.questions[:batch], loaded.image_folder, new_tokens=4)
    seeing = {setting.label: setting.plan for setting in plans if not setting.blind}
    found = time_plans(work, seeing, repeats)
    found["none"]["share_of_ideal"] = None
    return found


# ----------------------------------------------------------------------------- survivors
def pick_questions(loaded: LoadedBenchmark, count: int) -> list[Question]:
    """The first picture's questions, up to `count` with different texts."""
    first = loaded.questions[0].images
    texts: dict[str, Question] = {}
    for question in loaded.questions:
        if question.images == first and len(question.images) == 1:
            texts.setdefault(question.text, question)
    return list(texts.values())[:count]


def scene_of(
    checkpoint: Checkpoint, loaded: LoadedBenchmark, question: Question, plans: Sequence[Any]
) -> dict[str, Any]:
    """`look` at a question of a set."""
    return look(
        checkpoint.tokenizer,
        checkpoint.model,
        checkpoint.image_processor,
        question.text,
        [load_image(loaded.image_folder / image) for image in question.images],
        plans,
        max_new_tokens=loaded.benchmark.max_new_tokens,
    )


def examples(
    checkpoint: Checkpoint, sets: Sequence[LoadedBenchmark], setting: Setting
) -> list[dict[str, Any]]:
    """What survives for a few questions: three about one picture, one of each further set."""
    found = []
    for number, loaded in enumerate(sets):
        chosen = pick_questions(loaded, 3 if number == 0 else 1)
        result = run(checkpoint, replace(loaded, questions=chosen), setting)
        for question, item in zip(chosen, result.scores.per_item, strict=True):
            found.append(
                {
                    "checkpoint": checkpoint.name,
                    "plan_label": setting.label,
                    "set": loaded.benchmark.name,
                    "label": item["label"],
                    "correct": bool(item["score"]),
                    **scene_of(checkpoint, loaded, question, [setting.plan]),
                }
            )
    return found


def every_method(
    checkpoint: Checkpoint, loaded: LoadedBenchmark, plans: Sequence[Setting]
) -> dict[str, Any]:
    """The first question of a set with all these plans. `right`: whether an answer is."""
    question = loaded.questions[0]
    scene = scene_of(checkpoint, loaded, question, [setting.plan for setting in plans])
    one = replace(loaded, questions=[question])
    said = {run["answer"] for run in scene["runs"]}
    scores = {text: one.score([{"uid": question.uid, "text": text}]) for text in said}
    return {
        "checkpoint": checkpoint.name,
        "set": loaded.benchmark.name,
        "label": loaded.labels[question.uid],
        "right": {text: bool(each.per_item[0]["score"]) for text, each in scores.items()},
        **scene,
    }

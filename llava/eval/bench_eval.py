"""``llava bench eval``: what answering picture by picture saves.

Two figures. *Run*: questions a second on the digits POPE set (18 questions a picture), the whole
way from files to texts, against a loop that takes one question at a time through `generate` as the
original scripts do. *Prefill*: nine questions about one picture, random weights at a size where one
CPU thread is compute-bound, with and without a shared prefix.

Special here: a plan that reads the question shares only the layers in front of its first cut. With
many questions a picture it can therefore be slower than no plan, and a plan that does not read the
question faster than both; the second table shows it.

    llava bench eval --json bench-eval.json                      # 2 to 3 minutes on one core
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from llava.conversation import get_conversation, resolve_conv_mode
from llava.decoding import Decoding, answer_text, cut_at_eos, eos_ids
from llava.eval.answer import Answerer
from llava.eval.benchmarks import DATA_ROOT, LoadedBenchmark, load_benchmark
from llava.eval.speed import DTYPES, Workload, build_workload
from llava.mm_utils import load_image, process_images
from llava.model.staged_cache import StagedCache
from llava.prompting import build_prompt, pad_ids, tokenize_prompt
from llava.reduction import ReductionPlan, flops
from llava.sequence import Layout
from llava.timing import Clock, Region, compare, interleave
from llava.utils import environment, json_dump, quiet, set_seed, user_errors

PARTS = ("run", "prefill")
QUESTIONS_A_PICTURE = 18
RUN_PLANS = ("none", "pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]")


# ----------------------------------------------------------------------------- the run
def one_at_a_time(loaded: tuple[Any, ...], each: LoadedBenchmark, plan: str) -> list[str]:
    """The loop of LLaVA's scripts: open, prepare, generate, decode, for one question after the
    other. loaded: tokenizer, model, image processor."""
    tokenizer, model, processor = loaded
    conv_mode, _ = resolve_conv_mode(None, model.config)
    stop, eos = get_conversation(conv_mode).stop_string, eos_ids(model, tokenizer)
    texts = []
    for question in each.questions:
        pictures = [load_image(each.image_folder / image) for image in question.images]
        pixels = process_images(pictures, processor, model.config).to(model.device, model.dtype)
        prompt = build_prompt(question.text, conv_mode, len(pictures), tokenizer=tokenizer)
        ids = torch.tensor([tokenize_prompt(prompt, tokenizer)], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                images=pixels,
                image_sizes=[picture.size for picture in pictures],
                do_sample=False,
                max_new_tokens=each.benchmark.max_new_tokens,
                reduction=plan,
            )
        texts.append(answer_text(cut_at_eos(out[0].tolist(), eos)[0], tokenizer, stop))
    return texts


def together(loaded: tuple[Any, ...], each: LoadedBenchmark, plan: str) -> list[str]:
    """The same questions as `llava eval` answers them, in one thread."""
    tokenizer, model, processor = loaded
    answerer = Answerer(
        model, tokenizer, processor, image_folder=each.image_folder, reduction=plan,
        decoding=Decoding(each.benchmark.max_new_tokens), batch_size=32, workers=0,
    )  # fmt: skip
    with quiet():
        return [record["text"] for record in answerer.answer_all(each.questions)]


def run_regions(
    loaded: tuple[Any, ...], each: LoadedBenchmark, plan: str
) -> tuple[dict[str, Region], dict[str, list[str]]]:
    """Both ways over the same questions, and where their answers will be."""
    answers: dict[str, list[str]] = {}

    def one(_: Any) -> None:
        answers["one"] = one_at_a_time(loaded, each, plan)

    def all_of_a_picture(_: Any) -> None:
        answers["together"] = together(loaded, each, plan)

    return {"one": Region(one), "together": Region(all_of_a_picture)}, answers


def measure_run(
    loaded: tuple[Any, ...], each: LoadedBenchmark, plans: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Both ways in turn, for each plan. AssertionError if they answer differently in float32."""
    clock, rows = Clock(loaded[1].device), []
    for plan in plans:
        regions, answers = run_regions(loaded, each, plan)
        found = interleave(regions, clock, repeats)
        if loaded[1].dtype == torch.float32:
            assert answers["one"] == answers["together"]
        part = compare(found["one"], found["together"], None)
        count = len(each.questions)
        rows.append(
            {
                "plan": plan,
                "questions": count,
                "one_per_second": 1e3 * count / part["none_ms"],
                "together_per_second": 1e3 * count / part["plan_ms"],
                "speedup": part["speedup"],
                "speedup_spread": part["speedup_spread"],
            }
        )
    return rows


# ----------------------------------------------------------------------------- the prefill
class Prompts:
    """Questions about one picture, random ids: what they have in common and their own tokens."""

    def __init__(self, work: Workload, preset: flops.Preset, questions: int) -> None:
        self.work = work
        self.picture = work.images[:1]
        generator = torch.Generator().manual_seed(0)
        # As in LLaVA's template: system text, picture, and a question of 20 to 40 tokens.
        lengths = torch.linspace(20, 40, questions).round().int().tolist()
        words = work.shape.vocab
        self.head = work.ids[0, : preset.text_before + 1].tolist()
        self.tails = [
            torch.randint(3, words, (length,), generator=generator).tolist() for length in lengths
        ]

    @torch.inference_mode()
    def shared(self) -> tuple[Any, Any]:
        """The picture's prefix and the questions' own tokens, embedded."""
        model, device = self.work.model, self.work.device
        ids, mask = pad_ids(self.tails, 0, "right")
        head = torch.tensor([self.head], device=device)
        prefix = model.build_sequence(head, images=self.picture, kind="left")
        return prefix, model.build_suffixes(ids.to(device), mask)

    @torch.inference_mode()
    def whole(self) -> Any:
        """The whole prompts, embedded; the tower runs once."""
        model, rows = self.work.model, [self.head + tail for tail in self.tails]
        ids, mask = pad_ids(rows, 0, "left")
        tiles = 1 if self.picture[0].dim() == 3 else len(self.picture[0])
        fields = model.splicer.pictures([tiles], None)
        splice = model.splicer(
            ids.numpy(), mask.bool().numpy(), None, fields, "left", None, [0] * len(rows)
        )
        ids = ids.to(self.work.device)
        return model.build_sequence(ids, images=self.picture, splice=splice)


def prefill_regions(prompts: Prompts, plan: ReductionPlan) -> dict[str, Region]:
    """Decoder from embedded prompts to a full cache and the first logits, both ways."""
    model = prompts.work.model
    head, tails = prompts.shared()
    rows = prompts.whole()

    @torch.inference_mode()
    def whole(_: Any) -> None:
        model(sequence=rows, reduction=plan, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def shared(_: Any) -> None:
        prefix = model.encode_prefix(head, plan, questions=[len(prompts.tails)])
        cache = StagedCache(model.config)
        cache.prefix = prefix
        model(sequence=tails, reduction=plan, past_key_values=cache, use_cache=True,
              logits_to_keep=1)  # fmt: skip

    return {"whole": Region(whole), "shared": Region(shared)}


def ideal_sharing(prompts: Prompts, plan: ReductionPlan) -> float:
    """How many times fewer FLOPs the shared prefill has."""
    shape = prompts.work.shape
    whole: Layout = prompts.whole().layout
    head: Layout = prompts.shared()[0].layout
    stages = plan.schedule(whole, shape.layers)
    heads = plan.schedule(head, shape.layers)
    owners = [0] * len(prompts.tails)
    depth = plan.shared_depth(shape.layers)
    once = flops.shared_prefill_flops(shape, stages, heads, owners, depth)
    return flops.prefill_flops(shape, stages) / once


def measure_prefill(
    work: Workload,
    preset: flops.Preset,
    plans: Sequence[str],
    questions: int,
    repeats: int,
    warmup: int = 1,
) -> list[dict[str, Any]]:
    """Whole prompts and a shared prefix in turn, for each plan."""
    clock, rows = Clock(work.device), []
    prompts = Prompts(work, preset, questions)
    for text in plans:
        plan = ReductionPlan.parse(text)
        found = interleave(prefill_regions(prompts, plan), clock, repeats, warmup)
        part = compare(found["whole"], found["shared"], ideal_sharing(prompts, plan))
        rows.append(
            {
                "plan": text,
                "shared_layers": plan.shared_depth(work.shape.layers),
                "whole_ms": part["none_ms"],
                "shared_ms": part["plan_ms"],
                "speedup": part["speedup"],
                "speedup_spread": part["speedup_spread"],
                "ideal": part["ideal"],
                "share_of_ideal": part["share_of_ideal"],
            }
        )
    return rows


# ----------------------------------------------------------------------------- command line
def format_result(result: dict[str, Any]) -> str:
    """The two tables."""
    lines = []
    if "run" in result:
        lines += [
            f"{result['checkpoint']} on digits_pope, {QUESTIONS_A_PICTURE} questions a picture",
            f"{'plan':<14}{'one at a time':>16}{'together':>16}{'speed-up':>10}",
        ]
        for row in result["run"]:
            low, high = row["speedup_spread"]
            lines.append(
                f"{row['plan'].split(':')[0]:<14}{row['one_per_second']:>12.1f} q/s"
                f"{row['together_per_second']:>12.1f} q/s{row['speedup']:>9.2f}x "
                f"[{low:.2f}, {high:.2f}]"
            )
    if "prefill" in result:
        lines += [
            "",
            f"{result['preset']}, prefill of {result['questions']} questions about one picture",
            f"{'plan':<14}{'layers':>8}{'whole':>14}{'shared':>14}{'speed-up':>10}{'ideal':>8}",
        ]
        for row in result["prefill"]:
            lines.append(
                f"{row['plan'].split(':')[0]:<14}{row['shared_layers']:>8}"
                f"{row['whole_ms']:>11.0f} ms{row['shared_ms']:>11.0f} ms"
                f"{row['speedup']:>9.2f}x{row['ideal']:>7.2f}x"
            )
    return "\n".join(lines).lstrip("\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava bench eval``."""
    parser = argparse.ArgumentParser(
        prog="llava bench eval",
        description="Questions a second, picture by picture against one question at a time.",
    )
    parser.add_argument(
        "--model-path", default="checkpoints/llava-digits", help="default checkpoints/llava-digits"
    )
    parser.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        help="where digits/ is (default playground/data/eval)",
    )
    parser.add_argument("--pictures", type=int, default=5, help="of the POPE set (default 5)")
    parser.add_argument(
        "--preset", default="cpu-512", help="size of the prefill's model (default %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=9, help="in the prefill (default 9)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side (default 3)")
    parser.add_argument("--parts", default=",".join(PARTS), help="run, prefill or both (default)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", default="float32", help=", ".join(DTYPES) + " (default %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def check_flags(args: argparse.Namespace) -> list[str]:
    """The parts. ValueError for numbers and names that cannot be."""
    for name in ("pictures", "questions", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; accepted: 1 or more")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype!r}; accepted: {', '.join(DTYPES)}")
    parts = [part.strip() for part in args.parts.split(",")]
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown; accepted: {', '.join(PARTS)}")
    return parts


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the flags describe."""
    parts = check_flags(args)
    torch.set_num_threads(args.threads)
    set_seed(0)
    result: dict[str, Any] = {"checkpoint": args.model_path, "preset": args.preset}
    if "run" in parts:
        from llava.model.builder import load_pretrained_model

        limit = QUESTIONS_A_PICTURE * args.pictures
        each = load_benchmark("digits_pope", args.data_root, limit)
        with quiet():
            tokenizer, model, processor, _ = load_pretrained_model(
                args.model_path, device=args.device, dtype=DTYPES[args.dtype]
            )
        result["run"] = measure_run((tokenizer, model, processor), each, RUN_PLANS, args.repeats)
    if "prefill" in parts:
        preset = flops.get_preset(args.preset)
        work = build_workload(preset, device=args.device, dtype=DTYPES[args.dtype], batch=1)
        # The preset's plan, and one with the same counts that does not read the question.
        plans = ("none", preset.plan, preset.plan.replace("pyramiddrop", "random"))
        result["questions"] = args.questions
        result["prefill"] = measure_prefill(work, preset, plans, args.questions, args.repeats)
    return {
        **result,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "time": "CPU time of the process" if args.device == "cpu" else "CUDA events",
        "environment": environment(),
    }


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava bench eval``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    result = bench(args)
    sys.stdout.write(format_result(result) + "\n")
    if args.json:
        json_dump(args.json, result)


if __name__ == "__main__":
    main()

"""`meteor-mini demo`: a question of every family, answered unpruned and with METEOR, timed and
drawn.

`meteor-mini ask` prints and draws its answer with the same functions.
"""

import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .budgets import Budget
from .model import Answer, Meteor
from .plots import STAGE_TITLES, survivor_figure
from .toy.questions import QUESTION_FAMILIES, Example, images_and_questions, make_example

FIRST = 90_000  # number of the first picture: no table measures these
RUNS = 3  # timed runs of each kind; the median counts
HEAD = """tokens: from the encoders -> after stage 1 -> after stage 2 -> mean per LLM layer
ms: from the picture to the first new token (prefill) and to the answer's end"""


def demo(model: Meteor, out: Path) -> None:
    """Ask a question of every family; figures go to `out`, bare pictures to out/pictures."""
    budgets = {"unpruned": Budget.keep_all(), "METEOR": model.budget}
    print(f"{len(model.encoders)} encoders: {', '.join(model.encoders)}\n{HEAD}")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    total = {name: {"right": 0, "tokens": 0, "prefill": 0} for name in budgets}
    for number, family in enumerate(QUESTION_FAMILIES):
        example = make_example(FIRST + number, "test", family)
        images, questions = images_and_questions([example])
        answers = {name: model.answer(images, questions, b)[0] for name, b in budgets.items()}
        times = measure_times(model, images, questions, budgets)  # the answers were the warm-up
        print_answers(example, answers, times)
        for name, answer in answers.items():
            total[name]["right"] += answer.text == example.answer
            total[name]["tokens"] += answer.tokens["stage3"]
            total[name]["prefill"] += times[name]["prefill"]
        Image.fromarray(example.picture.image).save(out / "pictures" / f"{family}.png")
        texts = {"question": example.question, "true answer": example.answer}
        draw_answers(images, texts, answers).savefig(out / f"{family}.png")
    right = ", ".join(
        f"{name} {total[name]['right']} of {len(QUESTION_FAMILIES)}" for name in budgets
    )
    print(f"\n{len(QUESTION_FAMILIES)} figures in {out}; right answers: {right}")
    change = {
        key: 100 * total["METEOR"][key] / total["unpruned"][key] - 100
        for key in ("tokens", "prefill")
    }
    print(f"tokens {change['tokens']:+.0f} %, prefill time {change['prefill']:+.0f} %")


@torch.no_grad()
def measure_times(
    model: Meteor, images: Tensor, questions: list[str], budgets: dict[str, Budget]
) -> dict[str, dict[str, float]]:
    """Median milliseconds of RUNS runs; the budgets take turns, so that other load hits both.

    Returns: budget name -> {"prefill": from the picture to the first new token, "answer": to the
        answer's end}.
    """
    options = {"prefill": {"max_new_tokens": 1}, "answer": {}}
    seconds = {(name, part): [] for name in budgets for part in options}
    for _ in range(RUNS):
        for name, part in seconds:
            start = time.perf_counter()
            encoded = model.encode(images, budgets[name])
            model.generate(encoded, questions, budgets[name], **options[part])
            seconds[name, part].append(time.perf_counter() - start)
    return {
        name: {part: 1000 * statistics.median(seconds[name, part]) for part in options}
        for name in budgets
    }


def print_answers(
    example: Example, answers: dict[str, Answer], times: dict[str, dict[str, float]]
) -> None:
    print(f"\n{example.family}: {example.question}  (true answer: {example.answer})")
    for name, answer in answers.items():
        prefill, whole = times[name]["prefill"], times[name]["answer"]
        print(
            f"  {name:8}  {answer.text or '(nothing)':8}  tokens {token_line(answer):26}  "
            f"prefill {prefill:4.0f} ms, answer {whole:4.0f} ms"
        )
    print("\n".join("    " + line for line in survivor_lines(answers["METEOR"])), flush=True)


def draw_answers(images: Tensor, texts: dict[str, str], answers: dict[str, Answer]) -> Figure:
    """The patches that the last of `answers` kept, with each answer and its tokens."""
    texts = dict(texts)
    for name, answer in answers.items():
        heading = f"{name}, {format_count(answer.tokens['stage3'])} tokens per LLM layer"
        texts[heading] = answer.text or "(nothing)"
    return survivor_figure(images[0], texts, answer.kept)


def format_count(count: float) -> str:
    return f"{count:.1f}".removesuffix(".0")


def token_line(answer: Answer) -> str:
    """576 -> 168 -> 80 -> 34.1: from the encoders, after stages 1 and 2, mean per LLM layer."""
    counts = [answer.tokens[key] for key in ("encoders", "stage1", "stage2", "stage3")]
    return " -> ".join(format_count(count) for count in counts)


def survivor_lines(answer: Answer) -> list[str]:
    """A line for each stage, as `Stage 1, encoding: clip 39, convnext 32`."""
    lines = []
    for stage, counts in answer.survivors.items():
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"{STAGE_TITLES[stage]}: {each}")
    return lines

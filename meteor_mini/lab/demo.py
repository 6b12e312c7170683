"""`meteor-mini demo`: a question of every family, answered unpruned and with METEOR, timed and
drawn.

`meteor-mini ask` prints and draws its answer by the same functions.
"""

import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from ..budgets import Budget
from ..toy.evaluate import make_example, to_images
from ..toy.questions import FAMILIES
from ..model import Answer, Meteor
from .survivors import survivor_figure

FIRST = 90_000  # number of the first picture shown: no table measures these
RUNS = 3  # timed runs of each kind, after one to warm up; the median counts
HEAD = """tokens: from the encoders -> after stage 1 -> after stage 2 -> mean per LLM layer
ms: from the picture to the first new token (prefill) and to the answer's end"""
WHEN = {
    "stage1": "after stage 1",
    "stage2": "after stage 2",
    "stage3": "stage 3, in the last LLM layer",
}


def demo(model: Meteor, out: Path) -> None:
    """Ask a question of every family; figures go to `out`, bare pictures to out/pictures."""
    budgets = {"unpruned": Budget.none(), "METEOR": model.budget}
    print(f"{len(model.encoders)} encoders: {', '.join(model.encoders)}\n{HEAD}")
    results = []
    for index, family in enumerate(FAMILIES):
        results.append(demo_question(model, budgets, index, family, out))
    right = []
    for name in budgets:
        number = sum(result[name]["right"] for result in results)
        right.append(f"{name} {number} of {len(results)}")
    print(f"\n{len(results)} figures in {out}; right answers: {', '.join(right)}")
    tokens, prefill = (change(results, key) for key in ("tokens", "prefill"))
    print(f"tokens {tokens:+.0f} %, prefill time {prefill:+.0f} %")


def change(results: list[dict], key: str) -> float:
    """Percent by which METEOR's sum over all questions differs from the unpruned one."""
    unpruned = sum(result["unpruned"][key] for result in results)
    meteor = sum(result["METEOR"][key] for result in results)
    return 100 * meteor / unpruned - 100


def demo_question(
    model: Meteor, budgets: dict[str, Budget], index: int, family: str, out: Path
) -> dict[str, dict]:
    """Answer one question under each budget, print it and draw it.

    Returns: {budget name: {"tokens": mean per LLM layer, "right": bool, "prefill": ms, "answer":
        ms}}.
    """
    _, picture, question, truth, _ = make_example(FIRST + index, "test", family)
    images = to_images([picture.image])
    answers = {name: model.answer(images, [question], b)[0] for name, b in budgets.items()}
    times = timings(model, images, question, budgets)  # the answers were the warm-up
    print(f"\n{family}: {question}  (true answer: {truth})")
    results = {}
    for name, answer in answers.items():
        prefill, whole = times[name]["prefill"], times[name]["answer"]
        print(
            f"  {name:8}  {said(answer):8}  tokens {token_line(answer):26}  "
            f"prefill {prefill:4.0f} ms, answer {whole:4.0f} ms"
        )
        results[name] = {"tokens": answer.tokens["stage3"], "right": answer.text == truth}
        results[name] |= times[name]
    print("\n".join("    " + line for line in survivor_lines(answers["METEOR"])), flush=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.image).save(out / "pictures" / f"{family}.png")
    figure(images, {"question": question, "true answer": truth}, answers).save(
        out / f"{family}.png"
    )
    return results


def timings(
    model: Meteor, images: torch.Tensor, question: str, budgets: dict[str, Budget]
) -> dict[str, dict[str, float]]:
    """Median milliseconds of RUNS runs, the budgets taking turns.

    Returns: {budget name: {"prefill": from picture to first new token, "answer": to the answer's
        end}}.
    """
    options = {"prefill": {"max_new_tokens": 1}, "answer": {}}
    runs = {name: {what: [] for what in options} for name in budgets}
    for _ in range(RUNS):
        for what, extra in options.items():
            for name, budget in budgets.items():
                start = time.perf_counter()
                with torch.no_grad():
                    encoded = model.encode(images, budget)
                model.generate(encoded, [question], budget, **extra)
                runs[name][what].append(1000 * (time.perf_counter() - start))
    return {
        name: {what: statistics.median(times) for what, times in of_budget.items()}
        for name, of_budget in runs.items()
    }


# ------------------------------------------------------------------------------ what an answer says


def said(answer: Answer) -> str:
    return answer.text or "(nothing)"


def short(count: float) -> str:
    return f"{count:.1f}".removesuffix(".0")


def token_line(answer: Answer) -> str:
    """576 -> 168 -> 80 -> 34.1: from the encoders, after stages 1 and 2, mean per LLM layer."""
    counts = [answer.tokens[key] for key in ("encoders", "stage1", "stage2", "stage3")]
    return " -> ".join(map(short, counts))


def survivor_lines(answer: Answer) -> list[str]:
    """A line a stage, as `after stage 1: clip 39, convnext 32, eva 45, pix2struct 52`."""
    lines = []
    for stage, counts in answer.survivors.items():
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"{WHEN[stage]}: {each}")
    return lines


def figure(images: torch.Tensor, texts: dict[str, str], answers: dict[str, Answer]) -> Image.Image:
    """The figure of the last of `answers`, with what all said and how many tokens it took."""
    texts = dict(texts)
    for name, answer in answers.items():
        heading = f"{name}, {short(answer.tokens['stage3'])} tokens per LLM layer"
        texts[heading] = said(answer)
    last = list(answers.values())[-1]
    return survivor_figure(images[0], texts, last.kept)

"""Accuracy by question family, average tokens, and which patches survive.

`accuracy` asks GlyphWorld's questions and notes one `Record` for each; all its numbers are means of
these. `meteor-mini eval` prints them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import stage2_fuse

from ..budgets import Budget
from ..flops import prefill_flops
from ..model import Answer, Meteor
from . import questions, world
from .questions import Example, example_batches, images_and_questions

# What is measured: a budget, or a function (model, images, questions) -> answers.
Method = Budget | Callable[[Meteor, Tensor, list[str]], list[Answer]]

PATCHES = {  # groups of patches, by their word in slot "what"; the background has none
    "background": [],
    "shape": world.SHAPES,
    "print": ["label", "number", "cell"],
    "header": ["header"],
    "bar": ["bar"],
}


# ----------------------------------------------------------------------------------------- accuracy


@dataclass
class Record:
    """One question. tokens: mean visual tokens per LLM layer; flops: of the LLM's prefill;
    survivors: as `Answer` has them.
    """

    family: str
    right: bool
    tokens: float
    flops: float
    survivors: dict[str, dict[str, int]]


@torch.no_grad()
def accuracy(
    model: Meteor, method: Method, split: str = "test", samples: int = 1000, first: int = 0
) -> dict:
    """Exact-match accuracy in percent.

    Args: method: a budget, or a function (model, images, questions) -> answers; first: number of
        the first question.
    Returns:
        "accuracy": mean over questions; "families": {family: accuracy}.
        "average_tokens": mean visual tokens per LLM layer; "family_tokens": the same by family.
        "right" (n,) bool, "tokens" (n,) float, "family" (n,) str: of each question.
        "llm_flops": mean FLOPs of the LLM's prefill.
        "survivors": {stage: {encoder: {family: mean tokens}}}.
    """
    records = []
    for examples in example_batches(split, samples, first=first):
        records += measure(model, method, examples)
    right = np.array([record.right for record in records])
    tokens = np.array([record.tokens for record in records])
    family = np.array([record.family for record in records])
    asked = [name for name in questions.FAMILIES if name in family]
    return {
        "accuracy": 100 * right.mean(),
        "average_tokens": tokens.mean(),
        "families": {name: 100 * right[family == name].mean() for name in asked},
        "family_tokens": {name: tokens[family == name].mean() for name in asked},
        "right": right,
        "tokens": tokens,
        "family": family,
        "llm_flops": float(np.mean([record.flops for record in records])),
        "survivors": mean_survivors(records, asked),
    }


def measure(model: Meteor, method: Method, examples: list[Example]) -> list[Record]:
    """Ask the questions of one batch."""
    images, texts = images_and_questions(examples)
    if isinstance(method, Budget):
        answers = model.answer(images, texts, method)
    else:
        answers = method(model, images, texts)
    before = len(model.before_ids)  # text tokens in front of the picture
    records = []
    for example, answer, ids in zip(examples, answers, model.tokenize(texts)):
        text_tokens = before + len(ids)
        records.append(
            Record(
                family=example.family,
                right=answer.text == example.answer,
                tokens=answer.tokens["stage3"],
                flops=prefill_flops(model.decoder.config, answer.layers, text_tokens),
                survivors=answer.survivors,
            )
        )
    return records


def mean_survivors(records: list[Record], families: list[str]) -> dict:
    """{stage: {encoder: {family: mean tokens}}}"""
    means = {}
    for stage, encoders in records[0].survivors.items():
        means[stage] = {}
        for name in encoders:
            means[stage][name] = {}
            for family in families:
                counts = [r.survivors[stage][name] for r in records if r.family == family]
                means[stage][name][family] = float(np.mean(counts))
    return means


# --------------------------------------------------------------------------------------- statistics


def interval(right: Sequence[bool], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval over questions of an accuracy or a mean difference, in percent."""
    rng = np.random.default_rng(seed)
    values = np.asarray(right, dtype=float)
    n = len(values)
    means = []
    for _ in range(draws):
        again = rng.integers(n, size=n)  # n questions, some more than once
        means.append(values[again].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def with_interval(right: Sequence[bool]) -> tuple[float, float, float]:
    """Accuracy in percent, and its 95 % interval."""
    return (100 * float(np.mean(right)), *interval(right))


def difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float, float]:
    """Accuracy of a minus b on the same questions, in points, with its paired 95 % interval.

    Returns: mean, low, high.
    """
    gains = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low, high = interval(gains)
    return 100 * float(gains.mean()), low, high


def ratio(
    a: Sequence[float], b: Sequence[float], paired: bool, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """mean(a) / mean(b), and its 95 % bootstrap interval over questions.

    Args: paired: a and b are of the same questions, else of different ones.
    Returns: ratio, low, high; nan where the mean of b, or of some questions of it, is 0.
    """
    rng = np.random.default_rng(seed)
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    ratios = []
    for _ in range(draws):
        some = rng.integers(len(a), size=len(a))
        others = some if paired else rng.integers(len(b), size=len(b))
        ratios.append(divided(a[some].mean(), b[others].mean()))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return divided(a.mean(), b.mean()), float(low), float(high)


def divided(a: float, b: float) -> float:
    return float(a / b) if b != 0 else float("nan")


def utilization(accuracies: dict[frozenset, float], names: list[str]) -> dict[str, float]:
    """CUR(e) = (acc(E) - acc(E without e)) / acc(E) for each encoder e.

    The information gap is the largest of these minus the smallest.

    Args: accuracies: subset of names -> accuracy, at least E and its subsets of one less.
    Returns: {e: CUR(e)}, at most 1; nan for all where the full model is never right.
    Source: [arXiv 2507.03262]
    """
    everyone = frozenset(names)
    full = accuracies[everyone]
    if full == 0:
        return {name: float("nan") for name in names}
    return {name: (full - accuracies[everyone - {name}]) / full for name in names}


# ------------------------------------------------------------------------------------------- recall


@torch.no_grad()
def recall(
    model: Meteor,
    budget: Budget,
    fusion: Callable = stage2_fuse.fuse,
    split: str = "val",
    samples: int = 96,
) -> dict:
    """Which percentage of the patches of each group of `PATCHES` survives each stage.

    The one table that explains most accuracy figures. fusion: of `Meteor.encode`.

    Returns: {stage: {encoder: {group: percent}}}, with encoder "any" for patches that survive in
        one encoder or more; 0 for a group without patches.
    """
    stages, names = ("stage1", "stage2", "stage3"), (*model.encoders, "any")
    total = dict.fromkeys(PATCHES, 0)  # patches of each group
    alive = {}  # how many of them are left: stage -> encoder -> group
    for stage in stages:
        alive[stage] = {name: dict.fromkeys(PATCHES, 0) for name in names}
    for examples in example_batches(split, samples):
        images, questions = images_and_questions(examples)
        encoded = model.encode(images, budget, fusion=fusion)
        answers = model.answer(encoded, questions, budget)
        for example, answer in zip(examples, answers):
            for group, patches in patch_groups(example.picture).items():
                total[group] += int(patches.sum())
                for stage, maps in answer.kept.items():
                    for name, kept in (*maps.items(), ("any", kept_by_any(maps))):
                        both = kept.flatten() & patches
                        alive[stage][name][group] += int(both.sum())
    return {
        stage: {
            name: {group: percent(counts[group], total[group]) for group in PATCHES}
            for name, counts in encoders.items()
        }
        for stage, encoders in alive.items()
    }


def patch_groups(picture: world.Picture) -> dict[str, Tensor]:
    """Group of `PATCHES` -> (N,) bool: its patches in a picture."""
    slot = list(world.SLOTS).index("what")
    number = torch.from_numpy(picture.patch_words[:, slot])  # (N,), 0 for background
    groups = {}
    for group, words in PATCHES.items():
        members = [world.SLOTS["what"].index(word) + 1 for word in words]
        if group == "background":
            members = [0]
        groups[group] = torch.isin(number, torch.tensor(members))
    return groups


def kept_by_any(maps: dict[str, Tensor]) -> Tensor:
    """The union of the encoders' maps (h, w) bool."""
    return torch.stack([*maps.values()]).any(dim=0)


def percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole > 0 else 0.0


def print_recall(table: dict) -> None:
    for stage, encoders in table.items():
        for name, groups in encoders.items():
            shares = ", ".join(f"{group} {share:3.0f} %" for group, share in groups.items())
            print(f"{stage} {name:>10}: {shares}")

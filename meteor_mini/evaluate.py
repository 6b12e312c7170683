"""Accuracy by question family, 95 % bootstrap intervals, and what each encoder is worth.

    accuracy(model, Budget.keep_all(), samples=120)["families"]
    difference(right_of_meteor, right_of_fastv)     # paired: the same questions

Accuracy is exact match, in percent, on the questions of `toy.questions`. `tables` and `findings`
measure everything with the functions of this file. Needs scipy and pandas (the extra `eval`).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import DegenerateDataWarning, bootstrap
from torch import Tensor

from .budgets import Budget
from .flops import prefill_flops
from .model import Answer, Meteor
from .toy.questions import (
    GROUPS,
    OCR_CHART,
    QUESTION_FAMILIES,
    Example,
    example_batches,
    images_and_questions,
)

# What is evaluated: a budget, or a function (model, images, questions) -> answers.
Method = Budget | Callable[[Meteor, Tensor, list[str]], list[Answer]]

RESAMPLES = 2000


# ----------------------------------------------------------------------------------------- accuracy


def accuracy(
    model: Meteor, method: Method, split: str = "test", samples: int = 1000, first: int = 0
) -> dict:
    """Exact-match accuracy in percent. Args as in `ask`.

    Returns:
        "accuracy": mean over questions; "families": {family: accuracy}.
        "average_tokens": mean visual tokens per LLM layer.
        "answers": a row for each question, as `grade` makes it.
    """
    answers = ask(model, method, split, samples, first)
    families = answers.groupby("family", sort=False)["right"].mean()
    return {
        "accuracy": 100 * float(answers["right"].mean()),
        "families": {name: 100 * float(share) for name, share in families.items()},
        "average_tokens": float(answers["tokens"].mean()),
        "answers": answers,
    }


@torch.no_grad()
def ask(
    model: Meteor, method: Method, split: str, samples: int, first: int = 0, seed: int = 0
) -> pd.DataFrame:
    """A row for each question, as `grade` makes it.

    Args: method: a budget, or a function (model, images, questions) -> answers; first: number of
        the first question; seed: of a method that chooses at random. Torch's own random numbers go
        on afterwards as if nothing had been asked.
    """
    parts = []
    with torch.random.fork_rng():
        for number, examples in enumerate(example_batches(split, samples, first=first)):
            torch.manual_seed(1000 * seed + number)  # another for each batch
            images, questions = images_and_questions(examples)
            if isinstance(method, Budget):
                answers = model.answer(images, questions, method)
            else:
                answers = method(model, images, questions)
            parts.append(grade(model, examples, answers))
    return pd.concat(parts, ignore_index=True)


def grade(model: Meteor, examples: list[Example], answers: list[Answer]) -> pd.DataFrame:
    """A row for each question: family; right (bool); tokens, the mean visual tokens per LLM layer;
    flops, those of the LLM's prefill.
    """
    before = len(model.before_ids)  # text tokens in front of the picture
    question_ids = model.tokenize([example.question for example in examples])
    rows = []
    for example, answer, ids in zip(examples, answers, question_ids):
        rows.append(
            {
                "family": example.family,
                "right": answer.text == example.answer,
                "tokens": answer.tokens["stage3"],
                "flops": prefill_flops(model.decoder.config, answer.layers, before + len(ids)),
            }
        )
    return pd.DataFrame(rows)


def families_by_kind() -> dict[str, list[str]]:
    """The kinds of question that results are given for: all, each group, OCR & Chart without the
    charts, each family.
    """
    kinds = {"all": list(QUESTION_FAMILIES)}
    for group in GROUPS:
        kinds[group] = [name for name, family in QUESTION_FAMILIES.items() if family.group == group]
    reads = kinds[OCR_CHART]
    kinds["OCR"] = [name for name in reads if QUESTION_FAMILIES[name].picture != "chart"]
    return kinds | {name: [name] for name in QUESTION_FAMILIES}


def masks_by_kind(family: Iterable[str]) -> dict[str, np.ndarray]:
    """Each kind of question that occurs, and which of the questions (n,) bool are of it."""
    family = list(family)
    masks = {kind: np.isin(family, members) for kind, members in families_by_kind().items()}
    return {kind: asked for kind, asked in masks.items() if asked.any()}


# ---------------------------------------------------------------------------------------- intervals


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float]) -> Estimate:
    """Mean of the values, one for each question."""
    return estimate(np.mean, values)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """mean(a) - mean(b), paired: a[i] and b[i] are of the same question."""

    def of_means(a, b, axis=-1):
        return a.mean(axis=axis) - b.mean(axis=axis)

    return estimate(of_means, a, b, paired=True)


def ratio(a: Sequence[float], b: Sequence[float], paired: bool) -> Estimate:
    """mean(a) / mean(b); paired: a[i] and b[i] are of the same question.

    nan where mean(b) is 0, and no interval where it is 0 in a resample.
    """

    def of_means(a, b, axis=-1):
        below = b.mean(axis=axis)
        return a.mean(axis=axis) / np.where(below == 0, np.nan, below)

    return estimate(of_means, a, b, paired=paired)


def estimate(statistic: Callable, *samples: Sequence[float], paired: bool = False) -> Estimate:
    """A statistic of samples, with its percentile interval.

    The interval is nan where a sample is of one question, or a resample has no value. The seed is
    fixed.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    value = float(statistic(*arrays))
    if min(map(len, arrays)) < 2:
        return Estimate(value, float("nan"), float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of a nan, which is the answer
        result = bootstrap(
            arrays,
            statistic,
            paired=paired,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high))


# ------------------------------------------------------------------------ what an encoder is worth


def utilization(accuracies: dict[frozenset, float], names: list[str]) -> dict[str, float]:
    """Conditional utilization rate, CUR(e) = (acc(E) - acc(E without e)) / acc(E).

    Args: accuracies: set of names -> accuracy, at least of E and of its subsets of one less.
    Returns: {e: CUR(e)}, at most 1; nan for all where the full model is never right.
    Source: [arXiv 2507.03262]
    """
    everyone = frozenset(names)
    full = accuracies[everyone]
    if full == 0:
        return {name: float("nan") for name in names}
    return {name: (full - accuracies[everyone - {name}]) / full for name in names}


def information_gap(rates: dict[str, float]) -> float:
    """IG = max CUR - min CUR over the encoders.  Source: [arXiv 2507.03262]"""
    return max(rates.values()) - min(rates.values())

"""Accuracy against counting by hand, intervals against a loop, CUR by hand."""

import math

import numpy as np
import pytest

from meteor_mini import Answer, Budget
from meteor_mini.evaluate import (
    RESAMPLES,
    accuracy,
    difference,
    families_by_kind,
    grade,
    information_gap,
    masks_by_kind,
    mean,
    ratio,
    utilization,
)
from meteor_mini.flops import prefill_flops
from meteor_mini.toy.questions import QUESTION_FAMILIES, example_batches, images_and_questions


def test_accuracy_is_the_share_of_exact_answers(untrained):
    """A method that knows the answers of three families, at one token more for each question."""
    known, asked = {"count", "tag", "row"}, []

    def method(model, images, questions):
        examples = next(example_batches("val", 24))
        answers = []
        for example in examples:
            text = example.answer if example.family in known else example.answer + "0"
            asked.append(example.family)
            answers.append(Answer(text, {"stage3": len(asked)}, [len(asked)] * 8, {}, {}))
        return answers

    result = accuracy(untrained, method, "val", samples=24)
    assert result["accuracy"] == pytest.approx(100 * 3 / 12)
    assert result["families"] == {name: 100 * (name in known) for name in QUESTION_FAMILIES}
    assert result["average_tokens"] == pytest.approx(np.mean(range(1, 25)))
    assert list(result["answers"]["family"]) == asked


def test_accuracy_asks_the_model_under_a_budget(untrained):
    budget = Budget(stage1=60, stage2=24)
    result = accuracy(untrained, budget, "val", samples=3, first=5)
    (examples,) = example_batches("val", 3, first=5)
    answers = untrained.answer(*images_and_questions(examples), budget)
    assert result["answers"].equals(grade(untrained, examples, answers))
    assert result["average_tokens"] == 24


def test_flops_of_a_question_are_of_its_whole_prompt(untrained):
    (examples,) = example_batches("val", 2)
    encoded = untrained.encode(images_and_questions(examples)[0], Budget(stage1=60, stage2=24))
    questions = [example.question for example in examples]
    answers = untrained.answer(encoded, questions, Budget.keep_all())
    _, attention_mask, visual_mask = untrained.prompt(encoded, questions)
    text = (attention_mask.sum(dim=1) - visual_mask.sum(dim=1)).tolist()
    for flops, tokens in zip(grade(untrained, examples, answers)["flops"], text):
        assert flops == prefill_flops(untrained.decoder.config, [24] * 8, tokens)


def test_kinds_of_question():
    kinds = families_by_kind()
    assert list(kinds) == ["all", "General", "OCR & Chart", "OCR", *QUESTION_FAMILIES]
    assert kinds["all"] == list(QUESTION_FAMILIES) == kinds["General"] + kinds["OCR & Chart"]
    assert kinds["OCR"] == ["number", "label", "tag", "cell", "row"]
    assert kinds["label"] == ["label"]
    assert list(masks_by_kind(["tag", "tag"])) == ["all", "OCR & Chart", "OCR", "tag"]


# ---------------------------------------------------------------------------------------- intervals


def looped(statistic, *samples, paired):
    """A percentile interval, one resample after the other."""
    rng = np.random.default_rng(1)
    values = []
    for _ in range(RESAMPLES):
        places = [rng.integers(len(sample), size=len(sample)) for sample in samples]
        if paired:
            places = [places[0]] * len(samples)
        values.append(statistic(*[sample[place] for sample, place in zip(samples, places)]))
    return np.percentile(values, [2.5, 97.5])


@pytest.fixture(scope="module")
def samples():
    """Two methods on the same 400 questions, right on 80 % and on most of the same."""
    rng = np.random.default_rng(1)
    a = 100.0 * (rng.random(400) < 0.8)
    b = np.where(rng.random(400) < 0.9, a, 100.0 - a)
    return a, b


def test_the_mean_and_its_interval(samples):
    a, _ = samples
    value, low, high = mean(a)
    assert value == a.mean()
    assert (low, high) == pytest.approx(looped(np.mean, a, paired=False), abs=0.5)
    spread = 1.96 * a.std() / math.sqrt(len(a))  # the normal approximation
    assert (low, high) == pytest.approx((value - spread, value + spread), abs=0.7)


def test_a_difference_is_paired(samples):
    a, b = samples

    def of_means(a, b):
        return a.mean() - b.mean()

    value, low, high = difference(a, b)
    assert value == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(looped(of_means, a, b, paired=True), abs=0.5)
    unpaired = looped(of_means, a, b, paired=False)
    assert high - low < 0.8 * (unpaired[1] - unpaired[0])
    assert difference(a, a) == (0, 0, 0)


def test_a_ratio_is_paired_or_not():
    b = np.random.default_rng(0).uniform(1, 9, 200)
    assert ratio(3 * b, b, paired=True) == pytest.approx((3, 3, 3))
    value, low, high = ratio(3 * b, b, paired=False)
    expected = looped(lambda x, y: x.mean() / y.mean(), 3 * b, b, paired=False)
    assert value == pytest.approx(3) and (low, high) == pytest.approx(expected, abs=0.05)
    assert ratio([2, 2, 2], [1, 1], paired=False) == (2, 2, 2)  # of different questions


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_zero_has_no_interval():
    """Where the model with all encoders is right once, some resamples never are."""
    value, low, high = ratio([0, 100, 0, 0], [0, 100, 0, 0], paired=True)
    assert value == 1 and math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, ratio([0, 100, 0, 0], [0, 0, 0, 0], paired=True)))


def test_one_question_has_no_interval():
    value, low, high = mean([100])
    assert value == 100 and math.isnan(low) and math.isnan(high)


# ------------------------------------------------------------------------ what an encoder is worth


def test_utilization_and_information_gap_by_hand():
    everyone = frozenset("abc")
    accuracies = {everyone: 80, frozenset("bc"): 20, frozenset("ac"): 80, frozenset("ab"): 88}
    rates = utilization(accuracies, list("abc"))
    assert rates == {"a": 0.75, "b": 0, "c": pytest.approx(-0.1)}
    assert information_gap(rates) == pytest.approx(0.85)
    accuracies[everyone] = 0
    assert all(map(math.isnan, utilization(accuracies, list("abc")).values()))


def test_the_interval_of_rare_values_stays_among_them():
    _, low, high = mean([0] * 38 + [100] * 2)
    assert low == 0 and high > 10

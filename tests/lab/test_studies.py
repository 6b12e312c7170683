"""The studies against counting by hand: kinds of question, losses, drops, where tokens lie."""

import numpy as np
import pytest
import torch

from meteor_mini import Answer, Budget, load
from meteor_mini.toy.evaluate import batches, difference, images_and_questions, ratio
from meteor_mini.toy.questions import FAMILIES
from meteor_mini.lab import markdown, studies


@pytest.fixture(scope="module")
def model():
    return load("toy")


def test_kinds_of_question():
    kinds = studies.question_kinds()
    assert list(kinds) == ["all", "General", "OCR & Chart", "OCR", *FAMILIES]
    assert kinds["all"] == list(FAMILIES) and kinds["label"] == ["label"]
    assert kinds["OCR"] == ["number", "label", "tag", "cell", "row"]
    assert set(kinds["OCR & Chart"]) - set(kinds["OCR"]) == {"value", "extreme"}


def test_losses_are_the_full_models_points_minus_those_without_an_encoder():
    family = ["color", "color", "number", "number"]
    right = {
        frozenset("ab"): [True, True, True, False],
        frozenset("b"): [True, False, True, True],  # without a
        frozenset("a"): [True, True, False, False],  # without b
    }
    with pytest.MonkeyPatch.context() as patch:
        kinds = {"all": ["color", "number"], "color": ["color"], "number": ["number"]}
        patch.setattr(studies, "question_kinds", lambda: kinds)
        losses = studies.losses_without(right, family, ["a", "b"])
    assert {kind: loss[0] for kind, loss in losses["a"].items()} == {
        "all": 0,
        "color": 50,
        "number": -50,
    }
    assert {kind: loss[0] for kind, loss in losses["b"].items()} == {
        "all": 25,
        "color": 0,
        "number": 50,
    }
    assert losses["b"]["all"] == difference(right[frozenset("ab")], right[frozenset("a")])


def test_drops_asks_every_question_after_each_layer(monkeypatch):
    """Of a model that needs the picture in as many layers as the family's number."""
    families = list(FAMILIES)

    class Reader:
        decoder = type("D", (), {"config": type("C", (), {"num_hidden_layers": 12})})

        def encode(self, images, budget):
            assert budget == Budget.none()
            return "encoded"

        def answer(self, encoded, questions, budget, pruner=None):
            assert encoded == "encoded" and budget == Budget.none()
            layers = 12 if pruner is None else pruner.keywords["layers"][0]
            answers = []
            for example in self.examples:
                knows = families.index(example.family) <= layers
                text = example.answer if knows else "?"
                answers.append(Answer(text, {}, [], {}, {}))
            return answers

    reader = Reader()

    def noted(split, samples):
        assert split == "test"
        for examples in batches(split, samples):
            reader.examples = examples
            yield examples

    monkeypatch.setattr(studies, "batches", noted)
    result = studies.drops(reader, 24)
    assert result["questions"] == 24 and result["unpruned"] == (100, 100, 100)
    assert [entry["layers"] for entry in result["layers"]] == list(range(1, 12))
    for entry in result["layers"]:
        known = min(entry["layers"] + 1, 12) / 12
        assert entry["accuracy"][0] == pytest.approx(100 * known)
        assert entry["loss"][0] == pytest.approx(100 - 100 * known)
    text = markdown.section("drops", result)
    assert "| 1 | 16.7 [" in text and "| all | 100.0 [100.0, 100.0] |  |" in text


def test_shares_on_asked_patches_by_hand():
    asked = np.array([True, False, False, False])
    stage3 = {
        "a": torch.tensor([[True, True], [False, False]]),
        "b": torch.tensor([[True, False], [False, True]]),
    }
    stage2 = {
        "a": torch.tensor([[True, True], [True, True]]),
        "b": torch.tensor([[True, False], [False, True]]),
    }
    stage1 = {name: torch.ones(2, 2, dtype=torch.bool) for name in "ab"}
    answer = Answer("", {}, [], {}, {"stage1": stage1, "stage2": stage2, "stage3": stage3})
    left, of_all, in_llm = studies.shares_on_asked(answer, asked)
    assert (left, of_all, in_llm) == (2 / 4, 2 / 8, 2 / 6)


def test_focus_is_of_the_questions_that_ask_about_something(model):
    result = studies.focus(model, 24)
    shares, family = [], []
    for example in next(batches("test", 24)):
        (answer,) = model.answer(*images_and_questions([example]))
        if example.asked.any():
            last = answer.kept["stage3"].values()
            on_asked = sum(int(kept.flatten()[example.asked].sum()) for kept in last)
            number = sum(int(kept.sum()) for kept in last)
            shares.append([on_asked / number, example.asked.mean()])
            family.append(example.family)
    left, of_all = np.array(shares).T
    assert result["all"]["questions"] == len(family) < 24 or "presence" in family
    assert result["all"]["left"] == pytest.approx(100 * left.mean())
    assert result["all"]["of all"] == pytest.approx(100 * of_all.mean())
    assert result["all"]["ratio"] == pytest.approx(ratio(left, of_all, paired=True))
    ocr = np.isin(family, studies.question_kinds()["OCR"])
    assert result["OCR"]["left"] == pytest.approx(100 * left[ocr].mean())
    text = markdown.section("focus", result)
    assert "| all | " in text and "left to those in the LLM" in text

"""The requirements of the embedded model: each met by a hair, and missed by a hair."""

import copy

import pytest

from meteor_mini.toy.questions import FAMILIES
from meteor_mini.lab import markdown
from meteor_mini.lab.requirements import requirements

NAMES = ["clip", "convnext", "eva", "pix2struct"]


def same(value):
    return (value, value - 1, value + 1)


def met():
    """Results that just meet every requirement."""
    losses = {name: {family: same(1.0) for family in FAMILIES} for name in NAMES}
    for name, family in zip(NAMES, ("color", "pattern", "value", "number")):
        losses[name][family] = same(10.0)
    for name in NAMES:
        losses[name]["presence"] = same(2.0)
        losses[name]["relation"] = same(2.5)
        losses[name]["count"] = same(2.5)
    subsets = {name: {"all": same(60.0)} for name in NAMES}
    subsets["eva"]["all"] = same(78.0)
    subsets["+".join(NAMES)] = {"all": same(93.0)}
    return {
        "unpruned": {
            "accuracy": {family: same(80.0) for family in FAMILIES} | {"all": same(93.0)},
            "questions": 3600,
        },
        "meteor": {
            "questions": 3600,
            "average_tokens": 0.24 * 144,
            "differences": {"all": (-1.0, -2.0, 0.0)},
            "group_tokens": {"General": same(30.0), "OCR & Chart": same(36.0)},
        },
        "ratio": (1.2, 1.15, 1.25),
        "late_ratio": (1.5, 1.4, 1.6),
        "redundancy": {
            "losses": losses,
            "subsets": subsets,
            "cur": {"OCR": dict.fromkeys(NAMES, 0.1) | {"pix2struct": 0.6}},
        },
        "drops": {
            "layers": [{"layers": i, "loss": same(10.0 if i == 3 else 0.0)} for i in range(1, 12)]
        },
        "focus": {
            "all": {
                "left": 30.0,
                "of all": 10.0,
                "ratio": (3.0, 2.8, 3.2),
                "ratio in the LLM": (1.5, 1.4, 1.6),
            }
        },
        "orders": [{"verdict": "yes"}] * 11 + [{"verdict": "not shown"}] * 3,
        "cells": 144,
    }


def test_results_that_just_meet_the_requirements_meet_them_all():
    table = requirements(**met())
    assert len(table) == 10
    assert [entry["what"] for entry in table if not entry["holds"]] == []


def spoil(results, *path, value):
    for key in path[:-1]:
        results = results[key]
    results[path[-1]] = value


@pytest.mark.parametrize(
    "path, value, missed",
    [
        (("unpruned", "accuracy", "all"), same(92.9), "unpruned"),
        (("unpruned", "accuracy", "row"), same(79.9), "unpruned"),
        (("meteor", "average_tokens"), 0.241 * 144, "METEOR"),
        (("meteor", "differences", "all"), (-1.1, -2.0, 0.0), "METEOR"),
        (("meteor", "differences", "all"), (-1.0, -2.1, 0.0), "METEOR"),
        (("redundancy", "subsets", "clip", "all"), same(78.1), "no encoder alone"),
        (
            ("redundancy", "losses", "convnext", "pattern"),
            same(9.9),
            "each encoder is worth something",
        ),
        (("redundancy", "cur", "OCR", "pix2struct"), 0.59, "Pix2Struct reads"),
        (("redundancy", "cur", "OCR", "pix2struct"), float("nan"), "Pix2Struct reads"),
        (
            ("redundancy", "losses", "eva", "presence"),
            same(2.1),
            "general questions are redundant",
        ),
        (("drops", "layers", 2, "loss"), same(9.9), "the LLM reads deep"),
        (("ratio",), (1.19, 1.1, 1.3), "counts adapt"),
        (("focus", "all", "ratio"), (2.9, 2.8, 3.2), "the figure tells the truth"),
        (("orders", 0), {"verdict": "not shown"}, "the paper's orders"),
        (("orders", 13), {"verdict": "reverse"}, "the paper's orders"),
    ],
)
def test_each_can_be_missed(path, value, missed):
    results = copy.deepcopy(met())
    spoil(results, *path, value=value)
    table = requirements(**results)
    assert [entry["what"] for entry in table if not entry["holds"]] == [missed]


def test_the_table_says_what_was_measured():
    said = {entry["what"]: entry["measured"] for entry in requirements(**met())}
    assert said["unpruned"].startswith(
        "93.0 % of 3600 questions; lowest presence 80 %; 12 families"
    )
    lost = "loses 1.0 points [0.0, 2.0] on 3600 questions"
    assert said["METEOR"] == f"34.6 tokens, 24.0 % of 144; {lost}"
    assert said["no encoder alone"] == "all 93.0 %, eva alone 78.0 %, 15.0 points below"
    assert "convnext: pattern 10.0 points [9.0, 11.0]" in said["each encoder is worth something"]
    assert said["general questions are redundant"] == "presence: at most 2.0 points (clip)"
    assert said["the LLM reads deep"] == "after 3 of 12 layers 10.0 points [9.0, 11.0]"
    assert (
        "36.0 against 30.0" in said["counts adapt"] and "+20 % [+15, +25]" in said["counts adapt"]
    )
    assert "30 % against 10.0 %: 3.0 times [2.8, 3.2]" in said["the figure tells the truth"]
    assert said["the paper's orders"] == "11 yes, 3 not shown, 0 reverse"


def test_the_page_has_a_row_for_each():
    results = met()
    spoil(results, "ratio", value=(1.0, 0.9, 1.1))
    table = requirements(**results)
    text = markdown.section("requirements", {"requirements": table})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 10
    for row, entry in zip(rows, table):
        assert row.startswith(f"| {entry['what']} |")
        assert row.endswith("| **yes** |" if entry["holds"] else "| no |")

"""Questions of the toy world: answers recomputed from the facts, and from the asked patches."""

import contextlib
import functools
import re

import numpy as np
import pytest

from meteor_mini.toy import questions as q
from meteor_mini.toy import world as g
from meteor_mini.toy.dialogues import make_dialogue
from meteor_mini.toy.parts import SYSTEM_TEXT, build_tokenizer

example_of = functools.cache(q.make_example)  # tests that look at the same example share it
SLOT = {name: number for number, name in enumerate(g.SLOTS)}


def with_shape(things, shape):
    (thing,) = (thing for thing in things if thing.shape == shape)
    return thing


def truth(picture, question):
    """Answer a question from the facts, by its wording alone: a second implementation."""
    facts = picture.facts
    things = facts.get("things")
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        pairs = {(thing.color, thing.shape) for thing in things}
        return "yes" if match.groups() in pairs else "no"
    if match := re.fullmatch(r"what color is the (tallest|shortest) bar\?", question):
        most = max if match[1] == "tallest" else min
        bars = dict(facts["bars"])
        return most(bars, key=bars.get)
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return with_shape(things, match[1]).color
    if match := re.fullmatch(r"what pattern does the (\w+) have\?", question):
        return with_shape(things, match[1]).pattern
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        shapes = [thing.shape + ("es" if thing.shape == "cross" else "s") for thing in things]
        return str(shapes.count(match[1]))
    relation = r"is the (\w+) (to the left of|to the right of|above|below) the (\w+)\?"
    if match := re.fullmatch(relation, question):
        first, second = with_shape(things, match[1]), with_shape(things, match[3])
        holds = {
            "to the left of": first.column < second.column,
            "to the right of": first.column > second.column,
            "above": first.row < second.row,
            "below": first.row > second.row,
        }
        return "yes" if holds[match[2]] else "no"
    if question == "what number is printed in the picture?":
        return "".join(map(str, facts["number"]))
    if match := re.fullmatch(r"what is the label below the (\w+) shape\?", question):
        (thing,) = (thing for thing in things if thing.color == match[1])
        return "".join(map(str, thing.label))
    if match := re.fullmatch(r"what is the label below the (\w+)\?", question):
        return "".join(map(str, with_shape(things, match[1]).label))
    if match := re.fullmatch(r"what is in row (\w), column (\w)\?", question):
        cells = facts["cells"][g.TABLE_ROWS.index(match[1])]
        return "".join(map(str, cells[g.TABLE_COLUMNS.index(match[2])]))
    if match := re.fullmatch(r"what numbers are in row (\w)\?", question):
        cells = facts["cells"][g.TABLE_ROWS.index(match[1])]
        return "".join(str(digit) for cell in cells for digit in cell)
    match = re.fullmatch(r"how tall is the (\w+) bar\?", question)
    return str(dict(facts["bars"])[match[1]])


def answer_from_patches(family, picture, asked):
    """Answer a question from the words of the asked patches alone; None where that takes more."""
    words = picture.patch_words[asked]

    def values(slot, among=words):
        return [g.SLOTS[slot][number - 1] for number in among[:, SLOT[slot]] if number]

    def single(slot, among=words):
        (value,) = set(values(slot, among))
        return value

    if family == "presence":
        return "yes" if len(words) else "no"
    if family in ("color", "pattern"):
        return single(family)
    if family == "count":
        return str(len(set(zip(values("row"), values("column")))))
    if family in ("number", "label", "tag", "cell", "row"):
        return "".join(values("digit"))
    if family == "value":
        return single("value")
    if family == "extreme":
        return single("color")
    return None  # a relation is of two places


@pytest.mark.parametrize("split, examples", [("val", 15), ("test", 6)])
@pytest.mark.parametrize("family", q.QUESTION_FAMILIES)
def test_answers_are_true(family, split, examples):
    for index in range(examples):
        example = example_of(index, split, family)
        assert example.answer == truth(example.picture, example.question), example.question


@pytest.mark.parametrize("family", q.QUESTION_FAMILIES)
def test_the_asked_patches_hold_the_answer(family):
    for index in range(15):
        example = example_of(index, "val", family)
        picture, asked = example.picture, example.asked
        assert asked.shape == (g.GRID**2,) and asked.dtype == bool
        nothing_there = (family, example.answer) in {("presence", "no"), ("count", "0")}
        assert asked.any() != nothing_there
        answer = answer_from_patches(family, picture, asked)
        assert answer in (None, example.answer), example.question
        assert not asked[picture.patch_words[:, 0] == 0].any()  # never of ground or clutter


@pytest.mark.parametrize("family", ["relation", "label", "tag"])
def test_a_relation_is_about_both_shapes_and_a_label_about_its_shape_too(family):
    for index in range(15):
        example = example_of(index, "val", family)
        shown = example.picture.patch_words[example.asked, 0]
        kinds = {g.SLOTS["what"][what - 1] for what in shown}
        assert len(kinds) == 2
        assert set(q.split_words(example.question)) & set(g.SHAPES) <= kinds


@pytest.mark.parametrize("family", ["presence", "relation"])
def test_yes_and_no_are_balanced(family):
    yes = sum(example_of(i, "val", family).answer == "yes" for i in range(40))
    assert 12 <= yes <= 28


def test_half_of_the_extremes_are_asked_for_the_shortest():
    chart, rng = g.make_picture(0, kind="chart"), np.random.default_rng(0)
    asked = [q.make_question(chart, "extreme", rng).text for _ in range(100)]
    assert 30 <= sum("shortest" in text for text in asked) <= 70


def test_absent_pairs_are_near_misses_and_none_is_held_out():
    near = absent = 0
    for index in range(40):
        example = example_of(index, "val", "presence")
        color, shape = re.fullmatch(r"is there a (\w+) (\w+)\?", example.question).groups()
        assert (color, shape) not in g.HELD_OUT_PAIRS
        if example.answer == "no":
            things = example.picture.facts["things"]
            absent += 1
            near += color in {t.color for t in things} and shape in {t.shape for t in things}
    assert near > absent / 3


def test_the_vocabulary_has_every_word_that_is_used_and_no_other():
    """In questions, answers and dialogues of 100 pictures, their patches, and the system text."""
    used, rng = set(q.split_words(SYSTEM_TEXT)), np.random.default_rng(0)
    for index in range(100):
        picture = g.make_picture(index)
        for slot, vocabulary in enumerate(g.SLOTS.values()):
            used |= {
                vocabulary[word - 1] for word in np.unique(picture.patch_words[:, slot]) if word
            }
        for keyword_share in (0.0, 0.0, 0.0, 1.0):
            for question in make_dialogue(picture, rng, keyword_share):
                used |= set(q.split_words(f"{question.text} {question.answer}"))
    assert used == set(q.WORDS)


def test_the_tokenizer_splits_a_text_as_split_words_does():
    tokenizer = build_tokenizer(q.WORDS)
    texts = [q.make_example(0, "val", family).question for family in q.QUESTION_FAMILIES]
    for text in [*texts, "red bar 42, blue bar 7", SYSTEM_TEXT]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == q.split_words(text)


def test_no_two_examples_share_a_picture_and_none_is_of_those_that_train(monkeypatch):
    picture, drawn = {kind: g.make_picture(0, kind=kind) for kind in g.KINDS}, []

    def note(index, split, kind):
        drawn.append(index)
        return picture[kind]

    monkeypatch.setattr(q, "make_picture", note)
    before = set()
    for family in q.QUESTION_FAMILIES:
        for index in range(8):
            drawn.clear()
            with contextlib.suppress(RuntimeError):  # the one picture may have no such question
                q.make_example.__wrapped__(index, "train", family)
            assert min(drawn) >= q.EXAMPLES_FROM and not before & set(drawn)
            before |= set(drawn)


def test_another_kind_of_picture_has_no_such_question():
    chart, rng = g.make_picture(0, kind="chart"), np.random.default_rng(0)
    for name, family in q.QUESTION_FAMILIES.items():
        assert (q.make_question(chart, name, rng) is None) == (family.picture != "chart")


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family must be one of"):
        q.make_example(0, "val", "poetry")

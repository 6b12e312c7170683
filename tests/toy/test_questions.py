"""GlyphWorld's questions: answers recomputed from the facts, and from the asked patches alone."""

import functools
import re

import numpy as np
import pytest

from meteor_mini.toy import questions as q
from meteor_mini.toy import world as g

SLOT = {name: number for number, name in enumerate(g.SLOTS)}


example = functools.cache(q.example)  # tests that ask the same question share its picture


def pictures(n, split="train", kind=None):
    return [g.make_picture(i, split, kind) for i in range(n)]


def with_shape(things, shape):
    (thing,) = (thing for thing in things if thing.shape == shape)
    return thing


def truth(picture, question):
    """Answer a question from the facts, by its wording alone: a second implementation."""
    facts = picture.facts
    things = facts.get("things")
    if match := re.fullmatch(r"is there a (\w+) (\w+) in the picture \? yes or no \?", question):
        pairs = {(thing.color, thing.shape) for thing in things}
        return "yes" if match.groups() in pairs else "no"
    if match := re.fullmatch(r"what color has the (\w+) in the picture \?", question):
        return with_shape(things, match[1]).color
    if match := re.fullmatch(r"what pattern has the (\w+) in the picture \?", question):
        return with_shape(things, match[1]).pattern
    if match := re.fullmatch(r"how many (\w+) shapes are there in the picture \?", question):
        return str([thing.shape for thing in things].count(match[1]))
    relation = r"is the (\w+) (left of|right of|above|below) the (\w+) in the picture"
    if match := re.match(relation, question):
        first, second = with_shape(things, match[1]), with_shape(things, match[3])
        holds = {
            "left of": first.column < second.column,
            "right of": first.column > second.column,
            "above": first.row < second.row,
            "below": first.row > second.row,
        }
        return "yes" if holds[match[2]] else "no"
    if question == "read the number .":
        return "".join(map(str, facts["number"]))
    if match := re.fullmatch(r"read the label below the (\w+) \.", question):
        return "".join(map(str, with_shape(things, match[1]).label))
    if match := re.fullmatch(r"read the label below the (\w+) shape \.", question):
        (thing,) = (thing for thing in things if thing.color == match[1])
        return "".join(map(str, thing.label))
    if match := re.fullmatch(r"read row (\w) column (\w) \.", question):
        cells = facts["cells"][g.TABLE_ROWS.index(match[1])]
        return "".join(map(str, cells[g.TABLE_COLUMNS.index(match[2])]))
    if match := re.fullmatch(r"read row (\w) \.", question):
        cells = facts["cells"][g.TABLE_ROWS.index(match[1])]
        return "".join(str(digit) for cell in cells for digit in cell)
    bars = dict(facts["bars"])
    if match := re.fullmatch(r"what value has the (\w+) bar \?", question):
        return str(bars[match[1]])
    match = re.fullmatch(r"which bar is the (tallest|shortest) \?", question)
    most = max if match[1] == "tallest" else min
    return most(bars, key=bars.get)


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


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", q.FAMILIES)
def test_answers_are_true(family, split):
    for index in range(30):
        picture, question = example(index, split, family)
        assert question.answer == truth(picture, question.text), question


@pytest.mark.parametrize("family", q.FAMILIES)
def test_the_asked_patches_hold_the_answer(family):
    for index in range(40):
        picture, question = example(index, "val", family)
        asked = q.asked_patches(picture, question)
        assert asked.shape == (g.GRID**2,) and asked.dtype == bool
        nothing_there = (family, question.answer) in {("presence", "no"), ("count", "0")}
        assert asked.any() != nothing_there
        answer = answer_from_patches(family, picture, asked)
        assert answer in (None, question.answer), question
        assert not asked[picture.patch_words[:, 0] == 0].any()  # never of ground or clutter


def test_a_relation_is_about_both_shapes_and_a_label_about_its_shape_too():
    for index in range(30):
        for family, number in (("relation", 2), ("label", 2), ("tag", 2)):
            picture, question = example(index, "val", family)
            asked = q.asked_patches(picture, question)
            kinds = {g.SLOTS["what"][what - 1] for what in picture.patch_words[asked, 0]}
            assert len(kinds) == number
            named = {word for word in question.text.split() if word in g.SHAPES}
            assert named <= kinds


@pytest.mark.parametrize("family", ["presence", "relation"])
def test_yes_and_no_are_balanced(family):
    yes = sum(example(i, "val", family)[1].answer == "yes" for i in range(150))
    assert 55 <= yes <= 95


def test_half_of_the_extremes_are_asked_for_the_shortest():
    asked = [example(i, "val", "extreme")[1].text for i in range(100)]
    assert 30 <= sum("shortest" in text for text in asked) <= 70


def test_absent_pairs_often_have_their_color_and_their_shape_in_the_picture():
    near = absent = 0
    for index in range(150):
        picture, question = example(index, "val", "presence")
        if question.answer == "no":
            color, shape = question.text.split()[3:5]
            things = picture.facts["things"]
            absent += 1
            near += color in {t.color for t in things} and shape in {t.shape for t in things}
    assert near > absent / 3


def test_questions_outside_test_never_name_a_held_out_pair():
    for split in ("train", "val"):
        for index in range(150):
            _, question = example(index, split, "presence")
            color, shape = question.text.split()[3:5]
            assert (color, shape) not in g.HELD_OUT_PAIRS


def test_where_tells_the_places_of_a_kind_in_raster_order():
    rng = np.random.default_rng(0)
    for picture in pictures(40, kind="scene"):
        question, answer = q.where(picture, rng)
        shape = re.fullmatch(r"where are the (\w+) shapes \?", question)[1]
        cells = {(t.row, t.column) for t in picture.facts["things"] if t.shape == shape}
        expected = [f"{g.ROWS[row]} {g.COLUMNS[column]}" for row, column in sorted(cells)]
        assert answer == " , ".join(expected)


def test_every_word_of_questions_and_answers_is_in_the_vocabulary():
    pairs = []
    for family in q.FAMILIES:
        for index in range(20):
            _, question = example(index, "test", family)
            pairs.append((question.text, question.answer))
    rng = np.random.default_rng(0)
    for picture in pictures(30):
        pairs.append(q.describe(picture))
    for picture in pictures(30, kind="scene"):
        pairs.append(q.where(picture, rng))
    for text in (text for pair in pairs for text in pair):
        assert all(word in q.WORDS or word.isdigit() for word in text.split()), text


def test_a_description_names_everything_that_was_drawn():
    for picture in pictures(30):
        _, answer = q.describe(picture)
        facts = picture.facts
        if picture.kind == "scene":
            number = len(facts["things"]) + bool(facts["number"])
        else:
            number = len(facts["cells"] if picture.kind == "table" else facts["bars"])
        assert len(answer.split(" , ")) == number


def test_no_two_examples_share_a_picture_and_none_is_of_those_that_train(monkeypatch):
    drawn = []

    def noted(index, split, kind):
        drawn.append(index)
        return g.make_picture(index, split, kind)

    monkeypatch.setattr(q, "make_picture", noted)
    seen = set()
    for family in q.FAMILIES:
        for index in range(8):
            drawn.clear()
            q.example(index, "train", family)
            assert min(drawn) >= q.EXAMPLES_FROM and not seen & set(drawn)
            seen |= set(drawn)


def test_another_kind_of_picture_has_no_such_question():
    chart, rng = g.make_picture(0, kind="chart"), np.random.default_rng(0)
    for family, kind in q.KIND_OF_FAMILY.items():
        assert (q.ask(chart, family, rng) is None) == (kind != "chart")


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family must be one of"):
        q.example(0, "val", "poetry")


def test_what_is_asked_in_short_is_true():
    """Each answer found again among the facts, by what the question names."""
    rng = np.random.default_rng(0)
    for picture in pictures(60):
        pairs, facts = q.in_short(picture, rng), picture.facts
        assert pairs
        for question, answer in pairs:
            asked = question.split()
            if picture.kind == "table":
                row, column = g.TABLE_ROWS.index(asked[0]), g.TABLE_COLUMNS.index(asked[1])
                assert answer == q.joined(facts["cells"][row][column])
            elif picture.kind == "chart":
                assert dict(facts["bars"])[asked[0]] == int(answer)
            elif question == "number":
                assert answer == q.joined(facts["number"])
            else:
                matching = [t for t in facts["things"] if names(t, asked[1:])]
                if answer == "no":
                    assert not matching and asked[0] == "where"
                else:
                    assert answer in [said_of(t, asked[0]) for t in matching]


def names(thing, words):
    of_thing = {thing.shape, thing.color, g.ROWS[thing.row], g.COLUMNS[thing.column]}
    return set(words) <= of_thing | {q.joined(thing.label)}


def said_of(thing, what):
    return {
        "color": thing.color,
        "pattern": thing.pattern,
        "shape": thing.shape,
        "row": g.ROWS[thing.row],
        "column": g.COLUMNS[thing.column],
        "where": q.place_name(thing),
        "label": q.joined(thing.label),
    }[what]

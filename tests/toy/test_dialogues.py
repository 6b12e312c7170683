"""What the Llama is asked in training: true answers, and dialogues of one length."""

import re

import numpy as np
import pytest

from meteor_mini.toy import dialogues as d
from meteor_mini.toy import questions as q
from meteor_mini.toy import world as g


def pictures(n, kind=None):
    return [g.make_picture(i, kind=kind) for i in range(n)]


@pytest.mark.parametrize("keyword_share", [0.0, 1.0])
def test_dialogues_are_short_and_ask_nothing_twice(keyword_share):
    rng = np.random.default_rng(0)
    for picture in pictures(30):
        asked = d.make_dialogue(picture, rng, keyword_share)
        assert asked and len({question.text for question in asked}) == len(asked)
        words = [q.split_words(f"{question.text} {question.answer}") for question in asked]
        tokens = sum(len(of_question) + 2 for of_question in words)
        assert tokens <= d.MOST_TOKENS or len(asked) == 1  # one description may be longer


def test_where_names_the_places_of_a_kind_in_raster_order():
    rng = np.random.default_rng(0)
    for picture in pictures(20, kind="scene"):
        question = d.ask_where(picture, rng)
        plural = re.fullmatch(r"where are the (\w+)\?", question.text)[1]
        cells = {(t.row, t.column) for t in picture.facts["things"] if plural.startswith(t.shape)}
        expected = [f"{g.ROWS[row]} {g.COLUMNS[column]}" for row, column in sorted(cells)]
        assert question.answer == ", ".join(expected)


def test_a_description_names_everything_that_was_drawn():
    for picture in pictures(20):
        facts = picture.facts
        if picture.kind == "scene":
            number = len(facts["things"]) + bool(facts["number"])
        else:
            number = len(facts["cells"] if picture.kind == "table" else facts["bars"])
        assert len(d.describe(picture).answer.split(", ")) == number


def test_what_is_asked_in_keywords_is_true():
    """Each answer found again among the facts, by what the keywords name."""
    rng = np.random.default_rng(0)
    for picture in pictures(40):
        asked, facts = d.ask_in_keywords(picture, rng), picture.facts
        assert asked
        for text, answer, _ in asked:
            words = text.split()
            if picture.kind == "table":
                row, column = g.TABLE_ROWS.index(words[0]), g.TABLE_COLUMNS.index(words[1])
                assert answer == q.join_digits(facts["cells"][row][column])
            elif picture.kind == "chart":
                assert dict(facts["bars"])[words[0]] == int(answer)
            elif text == "number":
                assert answer == q.join_digits(facts["number"])
            else:
                matching = [t for t in facts["things"] if has_words(t, words[1:])]
                if answer == "no":
                    assert not matching and words[0] == "where"
                else:
                    assert answer in [look_up(t, words[0]) for t in matching]


def has_words(thing, words):
    of_thing = {thing.shape, thing.color, g.ROWS[thing.row], g.COLUMNS[thing.column]}
    return set(words) <= of_thing


def look_up(thing, what):
    return {
        "color": thing.color,
        "pattern": thing.pattern,
        "shape": thing.shape,
        "row": g.ROWS[thing.row],
        "column": g.COLUMNS[thing.column],
        "where": d.name_place(thing),
        "label": q.join_digits(thing.label),
    }[what]

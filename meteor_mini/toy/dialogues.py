"""What the Llama is asked while it trains: several questions about each picture.

Besides the families of `questions.py` there are three forms that are never measured: a description
of the whole picture, the places of all shapes of a kind (to count is to find them all: without this
form the model learns to count late), and keywords, as one types them into a search box.
"""

import numpy as np

from . import questions
from .questions import PLURALS, Question, find_single, join_digits
from .world import COLORS, COLUMNS, ROWS, TABLE_COLUMNS, TABLE_ROWS, Picture, Thing, held_out

MOST_TOKENS = 72  # of all questions and answers about a picture: the rows of a batch fill alike
DESCRIBED = 0.3  # share of pictures that are described as a whole


def make_dialogue(
    picture: Picture,
    rng: np.random.Generator,
    keyword_share: float = 0.0,
    most_tokens: int = MOST_TOKENS,
) -> list[Question]:
    """Different questions about a picture, families mixed, of `most_tokens` together.

    keyword_share: share of pictures that are asked in keywords.
    """
    if rng.random() < keyword_share:
        asked = ask_in_keywords(picture, rng)
        return choose_fitting([asked[i] for i in rng.permutation(len(asked))], most_tokens)
    families = []
    for name, family in questions.QUESTION_FAMILIES.items():
        if family.picture == picture.kind:
            families += [name] * family.weight
    if picture.kind == "scene":
        families.append("where")
    asked = []
    if rng.random() < DESCRIBED:
        asked.append(describe(picture))
    for _ in range(24):
        family = families[rng.integers(len(families))]
        if family == "where":
            asked.append(ask_where(picture, rng))
            continue
        question = questions.make_question(picture, family, rng)
        if question is not None:
            asked.append(question)
    return choose_fitting(asked, most_tokens) or [describe(picture)]


def choose_fitting(asked: list[Question], most_tokens: int) -> list[Question]:
    """The questions in their order, none twice, as long as they fit into `most_tokens`."""
    chosen, tokens = {}, 0
    for question in asked:
        words = questions.split_words(f"{question.text} {question.answer}")
        more = len(words) + 2  # <ans> and <eos>
        if question.text not in chosen and tokens + more <= most_tokens:
            chosen[question.text] = question
            tokens += more
    return list(chosen.values())


def describe(picture: Picture) -> Question:
    """The whole picture in words, in raster order: a question with many supervised tokens."""
    facts, parts = picture.facts, []
    if picture.kind == "scene":
        for thing in sort_by_place(facts["things"]):
            words = [thing.color, thing.pattern, thing.shape, name_place(thing)]
            if thing.label:
                words.append(join_digits(thing.label))
            parts.append(" ".join(words))
        if facts["number"]:
            parts.append("number " + join_digits(facts["number"]))
    elif picture.kind == "table":
        for name, cells in zip(TABLE_ROWS, facts["cells"]):
            parts.append(f"row {name} " + "".join(join_digits(cell) for cell in cells))
    else:
        for color, value in facts["bars"]:
            parts.append(f"{color} bar {value}")
    return Question(questions.DESCRIBE, ", ".join(parts), about=[])


def ask_where(picture: Picture, rng: np.random.Generator) -> Question:
    """Where all shapes of a kind stand, in raster order."""
    things = picture.facts["things"]
    shape = things[rng.integers(len(things))].shape
    found = sort_by_place([thing for thing in things if thing.shape == shape])
    places = ", ".join(name_place(thing) for thing in found)
    return Question(questions.WHERE.format(shapes=PLURALS[shape]), places, about=[])


def ask_in_keywords(picture: Picture, rng: np.random.Generator) -> list[Question]:
    """All that can be looked up in a picture, each asked in one to three words.

    Most tokens of such questions are answers: a model learns to look things up from them, long
    before it would from whole sentences. The steps of longer questions are here, too: where a color
    and a shape are together, in which row a shape is.
    """
    facts = picture.facts
    pairs = []
    if picture.kind == "table":
        for row, cells in zip(TABLE_ROWS, facts["cells"]):
            for column, digits in zip(TABLE_COLUMNS, cells):
                pairs.append((f"{row} {column}", join_digits(digits)))
    elif picture.kind == "chart":
        for color, value in facts["bars"]:
            pairs.append((f"{color} bar", str(value)))
    else:
        pairs += look_up_shapes(facts["things"])
        pairs += look_up_places(facts["things"])
        pairs += look_up_pairs(facts["things"], rng)
        if facts["number"]:
            pairs.append(("number", join_digits(facts["number"])))
    return [Question(keywords, answer, about=[]) for keywords, answer in pairs]


def look_up_shapes(things: list[Thing]) -> list[tuple[str, str]]:
    """What is true of "the star"."""
    pairs = []
    for thing in find_single(things):
        pairs.append((f"color {thing.shape}", thing.color))
        pairs.append((f"pattern {thing.shape}", thing.pattern))
        pairs.append((f"row {thing.shape}", ROWS[thing.row]))
        pairs.append((f"column {thing.shape}", COLUMNS[thing.column]))
        if thing.label:
            pairs.append((f"label {thing.shape}", join_digits(thing.label)))
    return pairs


def look_up_places(things: list[Thing]) -> list[tuple[str, str]]:
    """What stands at a place, and what has a color that is there once."""
    pairs, colors = [], [thing.color for thing in things]
    for thing in things:
        pairs.append((f"shape {name_place(thing)}", thing.shape))
        pairs.append((f"color {name_place(thing)}", thing.color))
        if colors.count(thing.color) == 1:
            pairs.append((f"shape {thing.color}", thing.shape))
            if thing.label:
                pairs.append((f"label {thing.color}", join_digits(thing.label)))
        if thing.label:
            pairs.append((f"label {name_place(thing)}", join_digits(thing.label)))
    return pairs


def look_up_pairs(things: list[Thing], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Where a color and a shape are together, and for some other color that they are nowhere."""
    there = {(thing.color, thing.shape): thing for thing in reversed(things)}
    colors, pairs = list(COLORS), []
    for (color, shape), thing in there.items():
        pairs.append((f"where {color} {shape}", name_place(thing)))
        other = colors[rng.integers(len(colors))]
        if (other, shape) not in there and not held_out((other, shape), "train"):
            pairs.append((f"where {other} {shape}", "no"))
    return pairs


def sort_by_place(things: list[Thing]) -> list[Thing]:
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def name_place(thing: Thing) -> str:
    return f"{ROWS[thing.row]} {COLUMNS[thing.column]}"

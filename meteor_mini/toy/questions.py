"""Questions about the toy world's pictures, with true answers and the patches they are about.

Twelve families in the paper's two groups. Two of them need two steps: "label" finds a shape and
reads the print below it; "tag" does so from a color, so it needs two encoders.

A new family: a function that asks it, and a row of `QUESTION_FAMILIES`. New words need a Llama that
is trained anew, and the examples of all families become others: their numbers count the families.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .parts import SYSTEM_TEXT
from .world import (
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SLOTS,
    SPLIT_SEED,
    TABLE_COLUMNS,
    TABLE_ROWS,
    Picture,
    Thing,
    held_out,
    make_picture,
)

EXAMPLES_FROM = 10_000_000  # pictures from this number on are examples, and never train

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
DESCRIBE = "describe the picture."  # this and the next only train: see dialogues.py
WHERE = "where are the {shapes}?"
RELATIONS = {"vertical": ("above", "below"), "horizontal": ("to the left of", "to the right of")}


def split_words(text: str) -> list[str]:
    """Words, digits one by one, and punctuation: the tokens of a text."""
    return re.findall(r"\d|[^\W\d]+|[^\w\s]", text)


class Question(NamedTuple):
    """A text, its true answer, and the things that it is about.

    about: for each thing the words of its patches, {slot: word}; the word is None in a slot that
    the question asks for, as the color in "what color is the star?".
    """

    text: str
    answer: str
    about: list[dict[str, str | None]]


def to_pairs(asked: list[list[Question]]) -> list[list[tuple[str, str]]]:
    return [[(question.text, question.answer) for question in one] for one in asked]


def asked_patches(picture: Picture, question: Question) -> np.ndarray:
    """(144,) bool: the patches that show what a question is about."""
    asked = np.zeros(len(picture.patch_words), bool)
    for words in question.about:
        matches = np.ones(len(asked), bool)
        for column, (slot, vocabulary) in enumerate(SLOTS.items()):
            if words.get(slot) is not None:
                matches &= picture.patch_words[:, column] == 1 + vocabulary.index(words[slot])
        asked |= matches
    return asked


def make_question(
    picture: Picture, family: str, rng: np.random.Generator, split: str = "train"
) -> Question | None:
    """A question of a family, or None where the picture has nothing to ask about."""
    row = QUESTION_FAMILIES[family]
    if row.picture != picture.kind:
        return None
    asked = row.ask(picture.facts, rng, split)
    if asked is None:
        return None
    words, answer, about = asked
    return Question(row.text.format(**words), answer, about)


# What the functions that ask give back: the words for the braces of the family's text, the answer,
# and what it is about; None where the picture has nothing to ask about.
Asked = tuple[dict[str, str], str, list[dict[str, str | None]]] | None


# ------------------------------------------------------------------------------------------- scenes


def count_shapes(things: list[Thing], shape: str) -> int:
    return sum(thing.shape == shape for thing in things)


def find_single(things: list[Thing]) -> list[Thing]:
    """The things whose shape occurs once: "the star" means one of them."""
    return [thing for thing in things if count_shapes(things, thing.shape) == 1]


def words_of_cell(thing: Thing) -> dict[str, str]:
    """The words of its cell, that its patches and those of its label have in common."""
    return {"row": ROWS[thing.row], "column": COLUMNS[thing.column]}


def ask_presence(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """Balanced; half of the absent pairs have their color and their shape both in the picture."""
    there = {(thing.color, thing.shape) for thing in facts["things"]}
    if rng.random() < 0.5:
        color, shape = sorted(there)[rng.integers(len(there))]
        answer, about = "yes", [{"what": shape, "color": color}]
    else:
        pairs = [(color, shape) for color in COLORS for shape in SHAPES]
        absent = [pair for pair in pairs if pair not in there and not held_out(pair, split)]
        colors = {color for color, _ in there}
        shapes = {shape for _, shape in there}
        near = [(color, shape) for color, shape in absent if color in colors and shape in shapes]
        pool = near if near and rng.random() < 0.5 else absent
        color, shape = pool[rng.integers(len(pool))]
        answer, about = "no", []
    return {"color": color, "shape": shape}, answer, about


def ask_color(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    once = find_single(facts["things"])
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    return {"shape": thing.shape}, thing.color, [{"what": thing.shape, "color": None}]


def ask_pattern(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    once = find_single(facts["things"])
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    return {"shape": thing.shape}, thing.pattern, [{"what": thing.shape, "pattern": None}]


def ask_count(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """Mostly of a shape that is there, and often of one that is there more than once."""
    things = facts["things"]
    present = sorted({thing.shape for thing in things})
    many = [shape for shape in present if count_shapes(things, shape) > 1]
    pool = present if rng.random() < 0.8 else SHAPES
    if many and rng.random() < 0.5:
        pool = many
    shape = pool[rng.integers(len(pool))]
    return {"shapes": PLURALS[shape]}, str(count_shapes(things, shape)), [{"what": shape}]


def ask_relation(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    once = find_single(facts["things"])
    vertical = rng.integers(2) == 0
    pairs = []
    for first in once:
        for second in once:
            if vertical and first.row != second.row:
                pairs.append((first, second))
            elif not vertical and first.column != second.column:
                pairs.append((first, second))
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    asks_before = rng.integers(2) == 0
    if vertical:
        before, after = RELATIONS["vertical"]
        is_before = first.row < second.row
    else:
        before, after = RELATIONS["horizontal"]
        is_before = first.column < second.column
    relation = before if asks_before else after
    answer = "yes" if is_before == asks_before else "no"
    words = {"shape": first.shape, "relation": relation, "other": second.shape}
    return words, answer, [{"what": first.shape}, {"what": second.shape}]


def ask_number(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    if not facts["number"]:
        return None
    return {}, join_digits(facts["number"]), [{"what": "number"}]


def ask_label(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """Two steps: find the shape, read the label below it."""
    once = [thing for thing in find_single(facts["things"]) if thing.label]
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    about = [{"what": thing.shape}, {"what": "label"} | words_of_cell(thing)]
    return {"shape": thing.shape}, join_digits(thing.label), about


def ask_tag(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """Two steps, and two encoders: find a color, read the label below it."""
    things = facts["things"]
    colors = [thing.color for thing in things]
    once = [thing for thing in things if thing.label and colors.count(thing.color) == 1]
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    shape = {"what": thing.shape, "color": thing.color} | words_of_cell(thing)
    about = [shape, {"what": "label"} | words_of_cell(thing)]
    return {"color": thing.color}, join_digits(thing.label), about


# ------------------------------------------------------------------------------- tables and charts


def ask_cell(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    cells = facts["cells"]
    r, c = int(rng.integers(len(cells))), int(rng.integers(len(cells[0])))
    row, column = TABLE_ROWS[r], TABLE_COLUMNS[c]
    about = [{"what": "cell", "row": row, "column": column}]
    return {"row": row, "column": column}, join_digits(cells[r][c]), about


def ask_row(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """A whole row: four or six digits."""
    cells = facts["cells"]
    r = int(rng.integers(len(cells)))
    digits = [digit for cell in cells[r] for digit in cell]
    about = [{"what": "cell", "row": TABLE_ROWS[r]}]
    return {"row": TABLE_ROWS[r]}, join_digits(digits), about


def ask_value(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    bars = facts["bars"]
    color, value = bars[rng.integers(len(bars))]
    about = [{"what": "bar", "color": color, "value": None}]
    return {"color": color}, str(value), about


def ask_extreme(facts: dict, rng: np.random.Generator, split: str) -> Asked:
    """Half of the questions ask for the shortest."""
    colors = {value: color for color, value in facts["bars"]}
    if rng.random() < 0.5:
        extreme, color = "tallest", colors[max(colors)]
    else:
        extreme, color = "shortest", colors[min(colors)]
    about = [{"what": "bar", "extreme": extreme, "color": None}]
    return {"extreme": extreme}, color, about


def join_digits(digits: list[int]) -> str:
    return "".join(str(digit) for digit in digits)


# ------------------------------------------------------------------------ the table of families


class QuestionFamily(NamedTuple):
    """A row of the table.

    group: of the paper's two; picture: the kind of picture that has them; text: what is asked, with
    braces for the words of a picture; ask: (facts, rng, split) -> `Asked`; weight: how often the
    family is asked in training, beside one; those that are learned last are asked more often.
    """

    group: str
    picture: str
    text: str
    ask: Callable[[dict, np.random.Generator, str], Asked]
    weight: int = 1


GENERAL, OCR_CHART = "General", "OCR & Chart"
GROUPS = [GENERAL, OCR_CHART]
QUESTION_FAMILIES = {
    name: QuestionFamily(*row)
    for name, row in {
        "presence": (GENERAL, "scene", "is there a {color} {shape}?", ask_presence, 4),
        "color": (GENERAL, "scene", "what color is the {shape}?", ask_color),
        "pattern": (GENERAL, "scene", "what pattern does the {shape} have?", ask_pattern),
        "count": (GENERAL, "scene", "how many {shapes} are there?", ask_count, 4),
        "relation": (GENERAL, "scene", "is the {shape} {relation} the {other}?", ask_relation, 3),
        "number": (OCR_CHART, "scene", "what number is printed in the picture?", ask_number, 10),
        "label": (OCR_CHART, "scene", "what is the label below the {shape}?", ask_label, 2),
        "tag": (OCR_CHART, "scene", "what is the label below the {color} shape?", ask_tag, 4),
        "cell": (OCR_CHART, "table", "what is in row {row}, column {column}?", ask_cell),
        "row": (OCR_CHART, "table", "what numbers are in row {row}?", ask_row),
        "value": (OCR_CHART, "chart", "how tall is the {color} bar?", ask_value),
        "extreme": (OCR_CHART, "chart", "what color is the {extreme} bar?", ask_extreme),
    }.items()
}


def collect_words() -> list[str]:
    """The vocabulary: the words of patches, of questions, and of the text before the picture."""
    words = {word for slot in SLOTS.values() for word in slot} | set(PLURALS.values())
    asked = [family.text for family in QUESTION_FAMILIES.values()] + [DESCRIBE, WHERE]
    texts = [re.sub(r"\{\w+\}", "", text) for text in asked]
    texts += [SYSTEM_TEXT, "yes", "no", *RELATIONS["vertical"], *RELATIONS["horizontal"]]
    for text in texts:
        words.update(split_words(text))
    return sorted(words)


WORDS = collect_words()


# --------------------------------------------------------------------- what accuracy is measured on


class Example(NamedTuple):
    """A question about a picture. asked (144,) bool: the patches that show what it is about, in
    raster order; none where the answer is that nothing is there.
    """

    family: str
    picture: Picture
    question: str
    answer: str
    asked: np.ndarray


@functools.lru_cache(maxsize=4096)  # the rows of all tables ask the same questions
def make_example(index: int, split: str, family: str) -> Example:
    """Example number `index` of a family.

    Each index has a picture of its own; where a picture has no question of the family the next seed
    is tried.

    Raises: ValueError for an unknown family or split.
    """
    if family not in QUESTION_FAMILIES:
        raise ValueError(f"family must be one of {list(QUESTION_FAMILIES)}, got {family!r}")
    code = list(QUESTION_FAMILIES).index(family)
    first = EXAMPLES_FROM + (index * len(QUESTION_FAMILIES) + code) * 100
    for attempt in range(100):
        picture = make_picture(first + attempt, split, QUESTION_FAMILIES[family].picture)
        rng = np.random.default_rng([SPLIT_SEED[split], index, code])
        question = make_question(picture, family, rng, split)
        if question is not None:
            asked = asked_patches(picture, question)
            return Example(family, picture, question.text, question.answer, asked)
    # cannot happen: most pictures have one
    raise RuntimeError(f"no {family} question in 100 pictures")


def to_images(pixels: Sequence[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) uint8 of one size -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def images_and_questions(examples: list[Example]) -> tuple[Tensor, list[str]]:
    """The pictures (B, 3, H, W) and the questions of examples, as a model is asked."""
    images = to_images([example.picture.image for example in examples])
    return images, [example.question for example in examples]


def example_batches(
    split: str, samples: int, batch: int = 50, first: int = 0
) -> Iterator[list[Example]]:
    """`samples` examples from number `first` on, the families in turn, in lists of `batch`."""
    names = list(QUESTION_FAMILIES)
    end = first + samples
    for start in range(first, end, batch):
        examples = []
        for i in range(start, min(start + batch, end)):
            index, code = divmod(i, len(names))
            examples.append(make_example(index, split, names[code]))
        yield examples

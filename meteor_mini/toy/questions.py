"""Questions about the toy world's pictures, with true answers and the patches they are about.

Twelve families in the paper's two groups. Two of them need two steps: "label" finds a shape and
reads the print below it; "tag" does so from a color, so it needs two encoders.

A new family: its group in `FAMILIES`, its kind of picture in `KIND_OF_FAMILY`, its text in `TEXTS`,
a function that asks it, and a line in `make_question`. New words need a Llama that is trained anew,
and the examples of all families become others: their numbers count the families.
"""

import functools
import re
from collections.abc import Iterator, Sequence
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

FAMILIES = {
    "presence": "General",
    "color": "General",
    "pattern": "General",
    "count": "General",
    "relation": "General",
    "number": "OCR & Chart",
    "label": "OCR & Chart",
    "tag": "OCR & Chart",
    "cell": "OCR & Chart",
    "row": "OCR & Chart",
    "value": "OCR & Chart",
    "extreme": "OCR & Chart",
}
KIND_OF_FAMILY = dict.fromkeys(FAMILIES, "scene") | {
    "cell": "table",
    "row": "table",
    "value": "chart",
    "extreme": "chart",
}
EXAMPLES_FROM = 10_000_000  # pictures from this number on are examples, and never train

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
TEXTS = {
    "presence": "is there a {color} {shape}?",
    "color": "what color is the {shape}?",
    "pattern": "what pattern does the {shape} have?",
    "count": "how many {shapes} are there?",
    "relation": "is the {shape} {relation} the {other}?",
    "number": "what number is printed in the picture?",
    "label": "what is the label below the {shape}?",
    "tag": "what is the label below the {color} shape?",
    "cell": "what is in row {row}, column {column}?",
    "row": "what numbers are in row {row}?",
    "value": "how tall is the {color} bar?",
    "extreme": "what color is the {extreme} bar?",
    # these two only train: see dialogues.py
    "describe": "describe the picture.",
    "where": "where are the {shapes}?",
}
RELATIONS = {"vertical": ("above", "below"), "horizontal": ("to the left of", "to the right of")}


def split_words(text: str) -> list[str]:
    """Words, digits one by one, and punctuation: the tokens of a text."""
    return re.findall(r"\d|[^\W\d]+|[^\w\s]", text)


def collect_words() -> list[str]:
    """The vocabulary: the words of patches, of questions, and of the text before the picture."""
    words = {word for slot in SLOTS.values() for word in slot} | set(PLURALS.values())
    texts = [re.sub(r"\{\w+\}", "", text) for text in TEXTS.values()]
    texts += [SYSTEM_TEXT, "yes", "no", *RELATIONS["vertical"], *RELATIONS["horizontal"]]
    for text in texts:
        words.update(split_words(text))
    return sorted(words)


WORDS = collect_words()


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
    facts = picture.facts
    if KIND_OF_FAMILY[family] != picture.kind:
        return None
    if family == "presence":
        return ask_presence(facts["things"], rng, split)
    if family == "color":
        return ask_color(facts["things"], rng)
    if family == "pattern":
        return ask_pattern(facts["things"], rng)
    if family == "count":
        return ask_count(facts["things"], rng)
    if family == "relation":
        return ask_relation(facts["things"], rng)
    if family == "number":
        return ask_number(facts["number"])
    if family == "label":
        return ask_label(facts["things"], rng)
    if family == "tag":
        return ask_tag(facts["things"], rng)
    if family == "cell":
        return ask_cell(facts["cells"], rng)
    if family == "row":
        return ask_row(facts["cells"], rng)
    if family == "value":
        return ask_value(facts["bars"], rng)
    if family == "extreme":
        return ask_extreme(facts["bars"], rng)
    raise ValueError(f"no function asks {family}: add it to make_question")


# ------------------------------------------------------------------------------------------- scenes


def count_shapes(things: list[Thing], shape: str) -> int:
    return sum(thing.shape == shape for thing in things)


def find_single(things: list[Thing]) -> list[Thing]:
    """The things whose shape occurs once: "the star" means one of them."""
    return [thing for thing in things if count_shapes(things, thing.shape) == 1]


def words_of_cell(thing: Thing) -> dict[str, str]:
    """The words of its cell, that its patches and those of its label have in common."""
    return {"row": ROWS[thing.row], "column": COLUMNS[thing.column]}


def ask_presence(things: list[Thing], rng: np.random.Generator, split: str) -> Question:
    """Balanced; half of the absent pairs have their color and their shape both in the picture."""
    there = {(thing.color, thing.shape) for thing in things}
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
    return Question(TEXTS["presence"].format(color=color, shape=shape), answer, about)


def ask_color(things: list[Thing], rng: np.random.Generator) -> Question | None:
    once = find_single(things)
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    text = TEXTS["color"].format(shape=thing.shape)
    return Question(text, thing.color, [{"what": thing.shape, "color": None}])


def ask_pattern(things: list[Thing], rng: np.random.Generator) -> Question | None:
    once = find_single(things)
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    text = TEXTS["pattern"].format(shape=thing.shape)
    return Question(text, thing.pattern, [{"what": thing.shape, "pattern": None}])


def ask_count(things: list[Thing], rng: np.random.Generator) -> Question:
    """Mostly of a shape that is there, and often of one that is there more than once."""
    present = sorted({thing.shape for thing in things})
    many = [shape for shape in present if count_shapes(things, shape) > 1]
    pool = present if rng.random() < 0.8 else SHAPES
    if many and rng.random() < 0.5:
        pool = many
    shape = pool[rng.integers(len(pool))]
    text = TEXTS["count"].format(shapes=PLURALS[shape])
    return Question(text, str(count_shapes(things, shape)), [{"what": shape}])


def ask_relation(things: list[Thing], rng: np.random.Generator) -> Question | None:
    once = find_single(things)
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
    text = TEXTS["relation"].format(shape=first.shape, relation=relation, other=second.shape)
    return Question(text, answer, [{"what": first.shape}, {"what": second.shape}])


def ask_number(number: list[int]) -> Question | None:
    if not number:
        return None
    return Question(TEXTS["number"], join_digits(number), [{"what": "number"}])


def ask_label(things: list[Thing], rng: np.random.Generator) -> Question | None:
    """Two steps: find the shape, read the label below it."""
    once = [thing for thing in find_single(things) if thing.label]
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    about = [{"what": thing.shape}, {"what": "label"} | words_of_cell(thing)]
    text = TEXTS["label"].format(shape=thing.shape)
    return Question(text, join_digits(thing.label), about)


def ask_tag(things: list[Thing], rng: np.random.Generator) -> Question | None:
    """Two steps, and two encoders: find a color, read the label below it."""
    colors = [thing.color for thing in things]
    once = [thing for thing in things if thing.label and colors.count(thing.color) == 1]
    if not once:
        return None
    thing = once[rng.integers(len(once))]
    shape = {"what": thing.shape, "color": thing.color} | words_of_cell(thing)
    about = [shape, {"what": "label"} | words_of_cell(thing)]
    text = TEXTS["tag"].format(color=thing.color)
    return Question(text, join_digits(thing.label), about)


# ------------------------------------------------------------------------------- tables and charts


def ask_cell(cells: list[list[list[int]]], rng: np.random.Generator) -> Question:
    r, c = int(rng.integers(len(cells))), int(rng.integers(len(cells[0])))
    row, column = TABLE_ROWS[r], TABLE_COLUMNS[c]
    about = [{"what": "cell", "row": row, "column": column}]
    text = TEXTS["cell"].format(row=row, column=column)
    return Question(text, join_digits(cells[r][c]), about)


def ask_row(cells: list[list[list[int]]], rng: np.random.Generator) -> Question:
    """A whole row: four or six digits."""
    r = int(rng.integers(len(cells)))
    digits = [digit for cell in cells[r] for digit in cell]
    about = [{"what": "cell", "row": TABLE_ROWS[r]}]
    text = TEXTS["row"].format(row=TABLE_ROWS[r])
    return Question(text, join_digits(digits), about)


def ask_value(bars: list[tuple[str, int]], rng: np.random.Generator) -> Question:
    color, value = bars[rng.integers(len(bars))]
    about = [{"what": "bar", "color": color, "value": None}]
    return Question(TEXTS["value"].format(color=color), str(value), about)


def ask_extreme(bars: list[tuple[str, int]], rng: np.random.Generator) -> Question:
    """Half of the questions ask for the shortest."""
    colors = {value: color for color, value in bars}
    if rng.random() < 0.5:
        extreme, color = "tallest", colors[max(colors)]
    else:
        extreme, color = "shortest", colors[min(colors)]
    about = [{"what": "bar", "extreme": extreme, "color": None}]
    return Question(TEXTS["extreme"].format(extreme=extreme), color, about)


def join_digits(digits: list[int]) -> str:
    return "".join(str(digit) for digit in digits)


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
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    code = list(FAMILIES).index(family)
    first = EXAMPLES_FROM + (index * len(FAMILIES) + code) * 100
    for attempt in range(100):
        picture = make_picture(first + attempt, split, KIND_OF_FAMILY[family])
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
    names = list(FAMILIES)
    end = first + samples
    for start in range(first, end, batch):
        examples = []
        for i in range(start, min(start + batch, end)):
            index, code = divmod(i, len(names))
            examples.append(make_example(index, split, names[code]))
        yield examples

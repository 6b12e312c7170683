"""GlyphWorld: seeds, splits, labels, and questions whose answers are recomputed from the facts."""

import re

import numpy as np
import pytest

from meteor_mini.glyph import world as g


def pictures(n, split="train", kind=None):
    return [g.make_picture(i, split, kind) for i in range(n)]


def test_the_same_seed_draws_the_same_pixels_and_another_split_does_not():
    first, again, other = g.make_picture(3), g.make_picture(3), g.make_picture(3, "val")
    assert np.array_equal(first.image, again.image) and first.facts == again.facts
    assert not np.array_equal(first.image, other.image)


def test_shapes_and_ranges():
    for picture in pictures(30):
        assert picture.image.shape == (g.SIZE, g.SIZE, 3) and picture.image.dtype == np.uint8
        assert picture.patch_words.shape == (g.GRID**2, len(g.SLOTS))
        for slot, words in enumerate(g.SLOTS.values()):
            numbers = picture.patch_words[:, slot]
            assert 0 <= numbers.min() and numbers.max() <= len(words)


def test_all_kinds_are_drawn():
    assert {p.kind for p in pictures(60)} == {"scene", "table", "chart"}


def test_held_out_pairs_and_numbers_never_occur_outside_test():
    for split in ("train", "val"):
        for picture in pictures(300, split, "scene"):
            assert not g.HELD_OUT_PAIRS & {(o[0], o[1]) for o in picture.facts["objects"]}
            assert not (picture.facts["number"] and g.held_out_number(picture.facts["number"]))
            for _ in range(4):
                question, _ = g.ask(picture, "presence", np.random.default_rng(0), split)
                assert not any(f"{c} {s}" in question for c, s in g.HELD_OUT_PAIRS)


def test_in_test_every_number_is_held_out_and_held_out_pairs_occur():
    drawn = pictures(200, "test", "scene")
    numbers = [p.facts["number"] for p in drawn if p.facts["number"]]
    assert numbers and all(g.held_out_number(n) for n in numbers)
    assert any(g.HELD_OUT_PAIRS & {(o[0], o[1]) for o in p.facts["objects"]} for p in drawn)


def test_every_object_owns_patches_with_its_words():
    def index(slot, word):
        return 1 + g.SLOTS[slot].index(word)

    slots = list(g.SLOTS)
    for picture in pictures(40, kind="scene"):
        for color, shape, row, column in picture.facts["objects"]:
            cells = picture.patch_words.reshape(3, 4, 3, 4, -1)
            here = cells[row, :, column].reshape(16, -1)  # the shape's cell
            mine = here[here[:, slots.index("what")] == index("what", shape)]
            assert len(mine) and (mine[:, slots.index("color")] == index("color", color)).all()
    for picture in pictures(40, kind="table"):
        digits = {g.DIGITS[d - 1] for d in picture.patch_words[:, slots.index("digit")] if d}
        assert digits == {str(d) for row in picture.facts["cells"] for d in row}
    for picture in pictures(40, kind="chart"):
        values = {g.DIGITS[d - 1] for d in picture.patch_words[:, slots.index("value")] if d}
        assert values == {str(value) for _, value in picture.facts["bars"]}


def truth(picture, question):
    """Answer a question from the facts, by its wording alone: a second implementation."""
    facts, words = picture.facts, question.split()
    if match := re.match(r"is there a (\w+) (\w+)", question):
        return "yes" if any(o[:2] == match.groups() for o in facts["objects"]) else "no"
    if match := re.match(r"what color is the (\w+)", question):
        return next(o[0] for o in facts["objects"] if o[1] == match[1])
    if match := re.match(r"how many (\w+) shapes", question):
        return str(len([o for o in facts["objects"] if o[1] == match[1]]))
    if match := re.match(r"is the (\w+) (left of|right of|above|below) the (\w+)", question):
        r1, c1 = next(o[2:] for o in facts["objects"] if o[1] == match[1])
        r2, c2 = next(o[2:] for o in facts["objects"] if o[1] == match[3])
        holds = {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}
        return "yes" if holds[match[2]] else "no"
    if question == "what is the number ?":
        return "".join(map(str, facts["number"]))
    if match := re.match(r"read row (\w)", question):
        return "".join(str(d) for d in facts["cells"]["abc".index(match[1])])
    if match := re.match(r"what is in row (\w) column (\w)", question):
        return str(facts["cells"]["abc".index(match[1])]["xyz".index(match[2])])
    bars = dict(facts["bars"])
    if "bar is the" in question:
        return (max if "tallest" in words else min)(bars, key=bars.get)
    return str(bars[words[-3]])


def test_where_tells_the_places_of_a_kind_or_of_a_pair():
    rng, forms = np.random.default_rng(0), set()
    for picture in pictures(60, kind="scene"):
        question, answer = g.where(picture, rng)
        cells = [(g.ROWS[r], g.COLUMNS[c], shape) for _, shape, r, c in picture.facts["objects"]]
        if match := re.match(r"where are the (\w+) , (\w+) \?", question):
            expected = [
                f"{r} {c}" for name in match.groups() for r, c, shape in cells if shape == name
            ]
        else:
            name = re.match(r"where are the (\w+) shapes \?", question)[1]
            expected = [f"{r} {c}" for r in g.ROWS for c in g.COLUMNS if (r, c, name) in cells]
        assert answer == " , ".join(expected)
        assert all(w in g.WORDS for w in f"{question} {answer}".split())
        forms.add(bool(match))
    assert forms == {True, False}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", g.FAMILIES)
def test_answers_are_true(family, split):
    for index in range(40):
        picture, question, answer = g.example(index, split, family)
        assert answer == truth(picture, question), question


@pytest.mark.parametrize("family", ["presence", "relation"])
def test_yes_and_no_are_balanced(family):
    yes = sum(g.example(i, "val", family)[2] == "yes" for i in range(300))
    assert 120 <= yes <= 180


def test_half_of_the_heights_are_asked_for_the_shortest():
    asked = [g.example(i, "val", "tallest")[1] for i in range(100)]
    assert 30 <= sum("shortest" in q for q in asked) <= 70


def test_every_word_of_questions_and_answers_is_in_the_vocabulary():
    for family in g.FAMILIES:
        for index in range(20):
            _, question, answer = g.example(index, "test", family)
            assert all(w in g.WORDS for w in question.split())
            assert answer in g.WORDS or all(d in g.WORDS for d in answer)
    for picture in pictures(30):
        for text in g.describe(picture):
            assert all(w in g.WORDS or w.isdigit() for w in text.split())


def test_clips_are_seeded_and_their_answers_true():
    answers = set()
    for index in range(40):
        image, question, answer = g.make_clip(index, "colors")
        assert np.array_equal(image, g.make_clip(index, "colors")[0]) and image.shape == (96, 96, 3)
        color = np.array(g.COLORS[question.split()[3]])
        middles = [image[r * 32 + 16, c * 32 + 16] for r in range(2) for c in range(3)]  # of frames
        seen = any(np.array_equal(middle, color) for middle in middles)
        assert answer == ("yes" if seen else "no")
        answers.add(answer)
        _, question, answer = g.make_clip(index, "counter")
        first = int(answer[0])
        assert question == "what is the number ?"
        assert [int(digit) for digit in answer] == [first, first + 1, first + 2]
    assert answers == {"yes", "no"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, "dev"), "split must be one of"),
        ((0, "train", "photo"), "kind must be"),
        ((-1,), "index must be 0 or more"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        g.make_picture(*arguments)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family must be one of"):
        g.example(0, "val", "poetry")

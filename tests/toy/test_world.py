"""The toy world's pictures: seeds, splits, and labels against what Pillow was told to draw."""

import functools

import numpy as np
import pytest
from PIL import Image

from meteor_mini.toy import world as g

SLOT = {name: number for number, name in enumerate(g.SLOTS)}
SIGNS_AND_SPACES = set(g.SIGNS) | {" "}


picture_of = functools.cache(g.make_picture)  # tests that look at the same picture share it


def pictures(n, split="train", kind=None):
    return [picture_of(i, split, kind) for i in range(n)]


def word(picture, slot, patch):
    """The word of a patch (x, y) in a slot, "" for none."""
    number = picture.patch_words[patch[1] * g.GRID + patch[0], SLOT[slot]]
    return g.SLOTS[slot][number - 1] if number else ""


def near_color(pixel, name, strength=1.0):
    """Whether a pixel is a named color, as `vary_color` draws it."""
    return np.abs(pixel.astype(float) - strength * np.array(g.COLORS[name])).max() <= 19


# ------------------------------------------------------------------ seeds and splits


def test_the_same_seed_draws_the_same_pixels_and_another_split_does_not():
    first, again, other = g.make_picture(3), g.make_picture(3), g.make_picture(3, "val")
    assert np.array_equal(first.image, again.image) and first.facts == again.facts
    assert np.array_equal(first.patch_words, again.patch_words)
    assert not np.array_equal(first.image, other.image)


def test_pictures_do_not_depend_on_what_was_drawn_before():
    alone = g.make_picture(7, "val", "chart").image
    pictures(3)
    assert np.array_equal(g.make_picture(7, "val", "chart").image, alone)


def test_shapes_and_ranges():
    for picture in pictures(30):
        assert picture.image.shape == (g.SIZE, g.SIZE, 3) and picture.image.dtype == np.uint8
        assert picture.patch_words.shape == (g.GRID**2, len(g.SLOTS))
        for slot, words in enumerate(g.SLOTS.values()):
            numbers = picture.patch_words[:, slot]
            assert 0 <= numbers.min() and numbers.max() <= len(words)


def test_all_kinds_are_drawn():
    assert {picture.kind for picture in pictures(60)} == set(g.KINDS)


def test_held_out_pairs_and_numbers_never_occur_outside_test():
    for split in ("train", "val"):
        for picture in pictures(60, split, "scene"):
            pairs = {(thing.color, thing.shape) for thing in picture.facts["things"]}
            assert not g.HELD_OUT_PAIRS & pairs
            number = picture.facts["number"]
            assert not (number and g.held_out_number(number))


def test_in_test_every_number_is_held_out_and_held_out_pairs_occur():
    drawn = pictures(60, "test", "scene")
    numbers = [picture.facts["number"] for picture in drawn if picture.facts["number"]]
    assert numbers and all(g.held_out_number(number) for number in numbers)
    pairs = {(thing.color, thing.shape) for p in drawn for thing in p.facts["things"]}
    assert g.HELD_OUT_PAIRS & pairs


@pytest.mark.parametrize("split", g.SPLIT_SEED)
def test_numbers_of_all_lengths_occur(split):
    lengths = {len(p.facts["number"]) for p in pictures(60, split, "scene")}
    assert lengths == {0, 4, 5, 6}


# ------------------------------------------------------------------ labels


@pytest.fixture
def printed(monkeypatch):
    """What Pillow was told to print: (x, y, text) of each call."""
    calls, text = [], g.ImageDraw.ImageDraw.text

    def noted(self, xy, characters, **options):
        calls.append((*xy, characters))
        return text(self, xy, characters, **options)

    monkeypatch.setattr(g.ImageDraw.ImageDraw, "text", noted)
    return calls


@pytest.mark.parametrize("kind", g.KINDS)
def test_every_printed_character_and_no_other_patch_is_labelled_as_print(kind, printed):
    for index in range(20):
        printed.clear()
        picture = g.make_picture(index, "train", kind)
        expected = {}
        for x, y, text in printed:
            if not set(text) <= SIGNS_AND_SPACES:
                expected[int(x) // g.PATCH, int(y) // g.PATCH] = text
        labelled = {}
        for x in range(g.GRID):
            for y in range(g.GRID):
                if word(picture, "what", (x, y)) in g.PRINT:
                    name = word(picture, "row", (x, y)) or word(picture, "column", (x, y))
                    labelled[x, y] = word(picture, "digit", (x, y)) or name
        assert labelled == expected


def read(picture, what, **where):
    """The digits of print in raster order, with their places in the number."""
    read_here = []
    for words in picture.patch_words:
        is_here = words[SLOT["what"]] == 1 + g.SLOTS["what"].index(what)
        for slot, name in where.items():
            is_here &= words[SLOT[slot]] == 1 + g.SLOTS[slot].index(name)
        if is_here:
            read_here.append((int(g.DIGITS[words[SLOT["digit"]] - 1]), words[SLOT["place"]] - 1))
    return read_here


def test_labels_of_print_are_what_the_facts_say():
    for picture in pictures(60, kind="scene"):
        numbered = [(digit, place) for place, digit in enumerate(picture.facts["number"])]
        assert read(picture, "number") == numbered
        for thing in picture.facts["things"]:
            place = {"row": g.ROWS[thing.row], "column": g.COLUMNS[thing.column]}
            assert [digit for digit, _ in read(picture, "label", **place)] == thing.label
    for picture in pictures(30, kind="table"):
        for row, cells in zip(g.TABLE_ROWS, picture.facts["cells"]):
            for column, digits in zip(g.TABLE_COLUMNS, cells):
                found = read(picture, "cell", row=row, column=column)
                assert found == [(digits[0], 0), (digits[1], 1)]


def test_labels_of_shapes_are_of_their_cell_their_color_and_what_stands_there():
    for picture in pictures(60, kind="scene"):
        things = {(thing.row, thing.column): thing for thing in picture.facts["things"]}
        assert len(things) == len(picture.facts["things"])
        for row in range(g.CELLS):
            for column in range(g.CELLS):
                thing = things.get((row, column))
                found = set()
                for y in range(4 * row, 4 * row + 4):
                    for x in range(4 * column, 4 * column + 4):
                        if word(picture, "what", (x, y)) in g.SHAPES:
                            slots = ("color", "what", "pattern", "row", "column")
                            found.add(tuple(word(picture, slot, (x, y)) for slot in slots))
                if thing is None:
                    assert not found
                    continue
                place = (g.ROWS[row], g.COLUMNS[column])
                assert found == {(thing.color, thing.shape, thing.pattern, *place)}
                middle = picture.image[row * g.CELL + 24, column * g.CELL + 32]
                # the pattern's second color is half as bright
                assert any(near_color(middle, thing.color, strength) for strength in (1, 0.5))


def test_labels_of_bars_are_of_their_color_and_as_high_as_their_value():
    for picture in pictures(10, kind="chart"):
        bars = dict(picture.facts["bars"])
        assert len(bars) == len(picture.facts["bars"]) == len(set(bars.values()))
        heights = dict.fromkeys(bars, 0)
        for x in range(g.GRID):
            column = [word(picture, "color", (x, y)) for y in range(g.GRID)]
            for color in bars:
                heights[color] = max(heights[color], column.count(color))
        for color, value in bars.items():
            assert value <= heights[color] <= value + 1, (color, value)
        for y in range(g.GRID):
            for x in range(g.GRID):
                color = word(picture, "color", (x, y))
                if not color:
                    continue
                assert word(picture, "what", (x, y)) == "bar"
                assert word(picture, "value", (x, y)) == str(bars[color])
                is_tallest = bars[color] == max(bars.values())
                is_shortest = bars[color] == min(bars.values())
                extreme = "tallest" if is_tallest else "shortest" if is_shortest else ""
                assert word(picture, "extreme", (x, y)) == extreme
                tile = picture.image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].reshape(-1, 3)
                assert np.mean([near_color(pixel, color) for pixel in tile]) >= 0.25


def test_ground_and_clutter_have_no_words():
    rng = np.random.default_rng(0)
    canvas = g.Canvas(rng)
    assert canvas.patch_words().sum() == 0
    plain = g.draw_background(np.random.default_rng(0), canvas.grey)
    assert np.abs(canvas.pixels().astype(int) - plain).max() > 50  # clutter was drawn


def test_clutter_is_known_where_it_was_drawn_and_not_covered(monkeypatch):
    monkeypatch.setattr(g, "draw_clutter", lambda canvas: None)
    canvas = g.Canvas(np.random.default_rng(0))
    assert not canvas.patch_clutter().any()
    for kind, (x, y) in zip(g.CLUTTER, [(40, 40), (150, 40), (40, 150), (150, 150)]):
        g.draw_piece(canvas, kind, x, y)
    kinds = canvas.patch_clutter().reshape(g.GRID, g.GRID)
    corners = (kinds[:6, :6], kinds[:6, 6:], kinds[6:, :6], kinds[6:, 6:])
    for number, corner in enumerate(corners, 1):
        assert set(corner.flatten().tolist()) == {0, number}
    before = canvas.pixels()
    canvas.paper(0, 0, 12, 6)
    assert not canvas.patch_clutter().reshape(g.GRID, g.GRID)[:6].any()
    assert (canvas.pixels() != before).any()


def test_no_patch_has_both_words_and_clutter():
    for picture in pictures(30):
        words, clutter = picture.patch_words[:, 0] > 0, picture.patch_clutter > 0
        assert not (words & clutter).any() and clutter.any()


def test_a_patch_belongs_to_what_covers_a_quarter_of_it_at_least():
    canvas = g.Canvas(np.random.default_rng(0))
    number = canvas.add_object(what="bar")
    canvas.id_draw.rectangle([0, 0, 15, 3], fill=number)  # a quarter of patch 0
    canvas.id_draw.rectangle([16, 0, 31, 2], fill=number)  # less of patch 1
    words = canvas.patch_words()[:, SLOT["what"]]
    assert words[0] == 1 + g.SLOTS["what"].index("bar") and words[1] == 0


# ------------------------------------------------------------------ wrong input


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


def test_count_pixels_number_equal_a_loop_over_patches():
    numbers = np.random.default_rng(0).integers(0, 7, size=(g.SIZE, g.SIZE)).astype(np.uint8)
    counted = g.count_pixels(Image.fromarray(numbers), 7)
    for place in range(g.GRID**2):
        top, left = g.PATCH * (place // g.GRID), g.PATCH * (place % g.GRID)
        patch = numbers[top : top + g.PATCH, left : left + g.PATCH]
        assert counted[place].tolist() == [(patch == number).sum() for number in range(7)]


@pytest.mark.parametrize("seed", [2, 10, 0, 1])  # stripes in each of the four directions
@pytest.mark.parametrize("pattern", g.PATTERNS)
def test_a_pattern_equals_a_loop_over_pixels(pattern, seed):
    mask = g.pattern_mask(pattern, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    down, right = int(rng.integers(12)), int(rng.integers(12))
    direction = int(rng.integers(4))
    assert mask.shape == (g.SIZE, g.SIZE) and mask.dtype == bool
    for row in range(0, g.SIZE, 7):
        for column in range(0, g.SIZE, 5):
            y, x = row + down, column + right
            expected = {
                "plain": False,
                "striped": (x, y, x + y, x - y)[direction] % 10 < 5,
                "dotted": (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 < 9,
                "checked": (x // 6 + y // 6) % 2 == 0,
            }
            assert mask[row, column] == expected[pattern], (row, column)

"""The toy world: seeded pictures of shapes, small print, tables and bar charts.

The embedded model is trained and measured on this world. Everything is drawn with Pillow from a
seed, no file is read. `questions.py` asks about the pictures.

    scene   3 x 3 cells with coloured, patterned shapes; some have a printed label
            below them, some scenes have one longer number elsewhere
    table   3 to 5 rows a b c d e, 2 or 3 columns x y z, a number of two digits in each cell
    chart   3 to 5 coloured bars of heights 1..9

Two kinds of patches are of no use to anybody, and a good pruner should drop both: flat ground, and
clutter (grey textures, scribbles, outlines, signs that are no digits), which is unlike the ground
and still means nothing. The print is small: it can be read at 192 pixels, not at 96.

The generator knows what every patch shows, so it also yields dense labels
(`Picture.patch_words`): they train the encoders, and tell which patches survive a pruning stage.

Splits have disjoint seeds. `HELD_OUT_PAIRS` and `held_out_number` never occur in "train" and "val".
In "test" the pairs occur like any other, and *every* longer number is a held-out one, so that
reading cannot be recall.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

SIZE, GRID = 192, 12  # pixels per side, patches per side
PATCH = SIZE // GRID  # pixels per side of a patch
CELLS = 3  # a scene has 3 x 3 cells
CELL = SIZE // CELLS  # pixels per side of a cell: 4 patches, of which the lowest holds a label

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "cyan": (40, 190, 210),
}
SHAPES = ["circle", "square", "triangle", "star", "cross"]
PATTERNS = ["plain", "striped", "dotted", "checked"]
ROWS = ["top", "middle", "bottom"]  # where a shape stands
COLUMNS = ["left", "center", "right"]
TABLE_ROWS = ["a", "b", "c", "d", "e"]
TABLE_COLUMNS = ["x", "y", "z"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]  # which digit of a number
DIGITS = list("0123456789")
PRINT = ["label", "number", "cell", "header"]  # what is printed
CLUTTER = ["texture", "scribble", "outline", "signs"]
SIGNS = "#%&@?!*+=$<>"  # print that means nothing

# A patch has at most one word per slot; index 0 of a slot means "none".
SLOTS = {
    "what": SHAPES + PRINT + ["bar"],
    "color": list(COLORS),
    "pattern": PATTERNS,
    "digit": DIGITS,  # printed
    "place": ORDINALS,  # of a digit in its number
    "value": DIGITS,  # of a bar
    "extreme": ["tallest", "shortest"],
    "row": ROWS + TABLE_ROWS,
    "column": COLUMNS + TABLE_COLUMNS,
}
KINDS = {"scene": 0.6, "table": 0.2, "chart": 0.2}  # kinds of picture, and how often each is drawn
HELD_OUT_PAIRS = {("purple", "star"), ("green", "triangle"), ("yellow", "cross")}
SPLIT_SEED = {"train": 10, "val": 11, "test": 16}


def held_out_number(digits: list[int]) -> bool:
    """One digit string in ten: those whose digits sum to 7 modulo 10."""
    return sum(digits) % 10 == 7


def held_out(pair: tuple[str, str], split: str) -> bool:
    """Whether a (color, shape) must not occur in a split."""
    return split != "test" and pair in HELD_OUT_PAIRS


# ---------------------------------------------------------------------------------------- a picture


@dataclass
class Picture:
    """A drawn picture with everything that is true of it.

    image (192, 192, 3) uint8.
    patch_words (144, 9) int64: per patch, in raster order, one index per slot of `SLOTS`, 0 for
        none.
    kind: of `KINDS`; facts: what was drawn (see `draw_scene`, `draw_table`, `draw_chart`).
    patch_clutter (144,) int64: per patch, 1 + its kind's place in CLUTTER, 0 for none.
    """

    image: np.ndarray
    patch_words: np.ndarray
    kind: str
    facts: dict
    patch_clutter: np.ndarray | None = None


class Thing(NamedTuple):
    """A shape of a scene: row, column of its cell, 0..2; label: its digits, [] for none."""

    color: str
    shape: str
    pattern: str
    row: int
    column: int
    label: list[int]


class Canvas:
    """The picture, and beside it a canvas of object numbers from which each patch reads its words.

    Object 0 is whatever has no meaning. A canvas begins with that: dark or light, a ramp of grey,
    noise, and clutter.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        dark = rng.random() < 0.4
        self.ink = (235, 235, 235) if dark else (25, 25, 25)
        self.grey = rng.uniform(30, 75) if dark else rng.uniform(170, 230)
        self.image = Image.fromarray(draw_background(rng, self.grey))
        self.draw = ImageDraw.Draw(self.image)
        self.ids = Image.new("L", (SIZE, SIZE), 0)
        self.id_draw = ImageDraw.Draw(self.ids)
        self.words = [{}]  # of each object: slot -> word
        self.clutter_ids = Image.new("L", (SIZE, SIZE), 0)  # 1 + place in CLUTTER
        draw_clutter(self)

    def faint_ink(self, strength: float, rest: int) -> tuple[int, ...]:
        """The ink, thinned, for lines that carry no meaning."""
        return tuple((np.array(self.ink) * strength + rest).astype(int).tolist())

    def paper(self, column: int, row: int, columns: int, rows: int) -> None:
        """Blank paper over some patches, 2 pixels more on each side: print stands on it."""
        shade = vary_color((self.grey,) * 3, 8, self.rng)
        left, top = column * PATCH - 2, row * PATCH - 2
        right, bottom = (column + columns) * PATCH + 1, (row + rows) * PATCH + 1
        self.draw.rectangle([left, top, right, bottom], fill=shade)
        ImageDraw.Draw(self.clutter_ids).rectangle([left, top, right, bottom], fill=0)

    def add_object(self, **words: str) -> int:
        """Register an object with its words (slot -> word).

        Returns: its number on the canvas of numbers.
        """
        self.words.append(words)
        return len(self.words) - 1

    def print_character(self, text: str, patch: tuple[int, int], size: int, **words: str) -> None:
        """Print one character about the middle of a patch (x, y), which gets its words."""
        left, top = patch[0] * PATCH, patch[1] * PATCH
        x = left + PATCH / 2 + self.rng.uniform(-1.5, 1.5)
        y = top + PATCH / 2 + self.rng.uniform(-1.5, 1.5)
        font = print_font(size)
        self.draw.text((x, y), text, font=font, fill=self.ink, anchor="mm")
        whole = [left, top, left + PATCH - 1, top + PATCH - 1]
        self.id_draw.rectangle(whole, fill=self.add_object(**words))

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image).copy()

    def patch_words(self) -> np.ndarray:
        """Per patch the words of the object that covers most of it: a quarter of it at least."""
        words = np.array([number_words(words) for words in self.words])  # (objects, slots)
        covered = count_pixels(self.ids, len(words))  # (144, objects)
        covered[:, 0] = 0
        owner = covered.argmax(axis=1)  # (144,)
        labels = words[owner]
        labels[covered.max(axis=1) < 0.25 * PATCH * PATCH] = 0
        return labels

    def patch_clutter(self) -> np.ndarray:
        """(144,) int64: the kind of clutter on each patch, 1 + its place in CLUTTER; 0 for none.

        A patch is cluttered where a twelfth of its pixels are, as lines are thin.
        """
        covered = count_pixels(self.clutter_ids, 1 + len(CLUTTER))  # (144, 1 + kinds)
        covered[:, 0] = 0
        kinds = covered.argmax(axis=1)
        kinds[covered.max(axis=1) < PATCH * PATCH / 12] = 0
        return kinds

    def finish(self, kind: str, facts: dict) -> Picture:
        words, clutter = self.patch_words(), self.patch_clutter()
        clutter[words[:, 0] > 0] = 0
        return Picture(self.pixels(), words, kind, facts, clutter)


def count_pixels(numbers: Image.Image, count: int) -> np.ndarray:
    """(144, count) int64: how many pixels of each patch have each number of a canvas ("L")."""
    of_pixel = np.asarray(numbers, np.int64).reshape(GRID, PATCH, GRID, PATCH)
    patches = of_pixel.transpose(0, 2, 1, 3).reshape(GRID * GRID, PATCH * PATCH)
    first = count * np.arange(GRID * GRID)[:, None]  # each patch counts in places of its own
    counted = np.bincount((first + patches).ravel(), minlength=count * GRID * GRID)
    return counted.reshape(GRID * GRID, count)


@functools.cache
def print_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def number_words(words: dict[str, str]) -> list[int]:
    """One number per slot: the word's place in `SLOTS`, from 1; 0 for none."""
    numbers = []
    for slot, vocabulary in SLOTS.items():
        number = 1 + vocabulary.index(words[slot]) if slot in words else 0
        numbers.append(number)
    return numbers


def vary_color(color: tuple[float, ...], most: float, rng: np.random.Generator) -> tuple[int, ...]:
    """A colour near another, so that no colour is one exact value."""
    changed = []
    for value in color:
        moved = value + rng.uniform(-most, most)
        changed.append(int(min(max(moved, 0), 255)))
    return tuple(changed)


def make_picture(index: int, split: str = "train", kind: str | None = None) -> Picture:
    """Picture number `index` of a split; the same arguments always give the same pixels.

    Raises: ValueError for an unknown split or kind or a negative index.
    """
    if split not in SPLIT_SEED:
        raise ValueError(f"split must be one of {list(SPLIT_SEED)}, got {split!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)} or None, got {kind!r}")
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    name = "" if kind is None else kind
    rng = np.random.default_rng([SPLIT_SEED[split], index, *name.encode()])
    if kind is None:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "scene":
        return draw_scene(rng, split)
    if kind == "table":
        return draw_table(rng)
    return draw_chart(rng)


# ------------------------------------------------------------------------------ ground and clutter


def draw_background(rng: np.random.Generator, grey: float) -> np.ndarray:
    """(192, 192, 3) uint8: a grey that rises in some direction, with a tint and noise."""
    ramp = np.linspace(-1, 1, SIZE)
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0, 22)
    slope = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :]
    ground = grey + strength * slope
    tint = rng.uniform(-12, 12, size=3)
    loudness = rng.uniform(2, 8)
    noise = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    return np.clip(ground[:, :, None] + tint + loudness * noise, 0, 255).astype(np.uint8)


def draw_clutter(canvas: Canvas) -> None:
    """Nine to fifteen pieces of what is unlike the ground and means nothing, anywhere."""
    rng = canvas.rng
    for _ in range(rng.integers(9, 16)):
        x, y = (int(place) for place in rng.integers(0, SIZE, size=2))
        draw_piece(canvas, CLUTTER[rng.integers(len(CLUTTER))], x, y)


ON_OR_OFF = [0] + [255] * 255  # of each value of a pixel: does it differ from 0?


def draw_piece(canvas: Canvas, kind: str, x: int, y: int) -> None:
    """One piece of a kind of CLUTTER; the canvas notes where it changed the picture."""
    before = canvas.image.copy()
    if kind == "texture":
        draw_texture(canvas, x, y)
    elif kind == "scribble":
        draw_scribble(canvas, x, y)
    elif kind == "outline":
        draw_outline(canvas, x, y)
    else:
        draw_signs(canvas, x, y)
    changed = ImageChops.difference(before, canvas.image).convert("L").point(ON_OR_OFF)
    canvas.clutter_ids.paste(1 + CLUTTER.index(kind), mask=changed)


def choose_color(rng: np.random.Generator) -> tuple[int, ...]:
    """Mostly a colour that things have too: colour alone tells nothing."""
    if rng.random() < 0.3:
        return choose_dull_color(rng)
    names = list(COLORS)
    return vary_color(COLORS[names[rng.integers(len(names))]], 25, rng)


def choose_dull_color(rng: np.random.Generator) -> tuple[int, ...]:
    """A grey with a tint: no colour that a question names."""
    grey = rng.uniform(30, 225)
    return vary_color((grey, grey, grey), 25, rng)


def draw_texture(canvas: Canvas, x: int, y: int) -> None:
    """A grey rectangle of 24 to 64 pixels a side, in one of the patterns."""
    rng = canvas.rng
    width, height = (int(side) for side in rng.integers(24, 65, size=2))
    box = [x - width // 2, y - height // 2, x + width // 2, y + height // 2]
    if rng.random() < 0.5:
        canvas.draw.rectangle(box, fill=choose_dull_color(rng))
    mask = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    pattern = PATTERNS[rng.integers(1, len(PATTERNS))]
    paint(canvas, choose_dull_color(rng), mask, pattern_mask(pattern, rng))


def draw_scribble(canvas: Canvas, x: int, y: int) -> None:
    """Four to eight strokes within 60 pixels."""
    rng = canvas.rng
    corners = rng.integers(-30, 31, size=(rng.integers(5, 10), 2)) + (x, y)
    canvas.draw.line(
        [tuple(corner) for corner in corners.tolist()], fill=choose_color(rng), width=2
    )


def draw_outline(canvas: Canvas, x: int, y: int) -> None:
    """A shape without a filling."""
    rng = canvas.rng
    shape, radius = SHAPES[rng.integers(len(SHAPES))], rng.uniform(14, 24)
    outer, inner = Image.new("L", (SIZE, SIZE), 0), Image.new("L", (SIZE, SIZE), 0)
    draw_shape(ImageDraw.Draw(outer), shape, x, y, radius, 255)
    draw_shape(ImageDraw.Draw(inner), shape, x, y, radius - 5, 255)
    paint(canvas, choose_color(rng), outer, ~np.asarray(inner, bool))


def draw_signs(canvas: Canvas, x: int, y: int) -> None:
    """A line of three to eight printed signs that are neither digits nor headers."""
    rng = canvas.rng
    font = print_font(int(rng.integers(13, 18)))
    signs = [SIGNS[i] for i in rng.integers(len(SIGNS), size=rng.integers(3, 9))]
    canvas.draw.text((x, y), " ".join(signs), font=font, fill=choose_color(rng), anchor="mm")


def paint(canvas: Canvas, color: tuple[int, ...], shape: Image.Image, where: np.ndarray) -> None:
    """Paint a colour inside a shape ("L", white inside), where (192, 192) bool is True."""
    mask = np.asarray(shape, bool) & where
    canvas.image.paste(color, mask=Image.fromarray(mask.astype(np.uint8) * 255))


def pattern_mask(pattern: str, rng: np.random.Generator) -> np.ndarray:
    """(192, 192) bool: where the second colour of a pattern goes."""
    y, x = np.ogrid[:SIZE, :SIZE]  # (192, 1) and (1, 192)
    y, x = y + rng.integers(12), x + rng.integers(12)
    if pattern == "plain":
        return np.zeros((SIZE, SIZE), bool)
    if pattern == "striped":
        along = (x, y, x + y, x - y)[rng.integers(4)]
        return np.broadcast_to(along % 10 < 5, (SIZE, SIZE))
    if pattern == "dotted":
        return (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 < 9
    return (x // 6 + y // 6) % 2 == 0


# ------------------------------------------------------------------------------------------- scenes


def draw_scene(rng: np.random.Generator, split: str) -> Picture:
    """facts: things [`Thing`], number [digits] or []."""
    canvas = Canvas(rng)
    cells = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    style = rng.choice(["bare", "labels", "number"], p=[0.25, 0.45, 0.3])
    number = []
    if style == "number":
        number = random_number(rng, split)
        row, column = int(rng.integers(CELLS)), int(rng.integers(CELLS - 1))
        cells.remove((row, column))  # a number takes two cells
        cells.remove((row, column + 1))
        print_number(canvas, number, row, column)
    kinds = random_kinds(rng, split)
    labels = rng.permutation(100)[: len(kinds)]
    places = rng.permutation(len(cells))[: len(kinds)]
    things = []
    for (color, shape), label, place in zip(kinds, labels, places):
        digits = [int(label) // 10, int(label) % 10] if style == "labels" else []
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        things.append(Thing(color, shape, pattern, *cells[place], digits))
    for thing in things:
        draw_thing(canvas, thing)
    return canvas.finish("scene", {"things": things, "number": number})


def random_number(rng: np.random.Generator, split: str) -> list[int]:
    """Four to six digits; held-out strings only in "test", all others elsewhere."""
    while True:
        length = rng.integers(4, 7)
        digits = [int(digit) for digit in rng.integers(0, 10, size=length)]
        if held_out_number(digits) == (split == "test"):
            return digits


def print_number(canvas: Canvas, number: list[int], row: int, column: int) -> None:
    """Print a number somewhere in cell (row, column) and the next; a digit takes a patch."""
    rng = canvas.rng
    wide = CELL // PATCH  # patches
    left = wide * column + int(rng.integers(2 * wide - len(number) + 1))
    top = wide * row + int(rng.integers(wide))
    canvas.paper(left, top, len(number), 1)
    size = int(rng.integers(14, 17))
    for place, digit in enumerate(number):
        words = {"what": "number", "digit": str(digit), "place": ORDINALS[place]}
        canvas.print_character(str(digit), (left + place, top), size, **words)


def random_kinds(rng: np.random.Generator, split: str) -> list[tuple[str, str]]:
    """Two to five (color, shape), and in half of the scenes one or two more of the first shape."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    pairs = [pair for pair in pairs if not held_out(pair, split)]
    number = rng.integers(2, 6)
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=number)]
    if rng.random() < 0.5:  # so that there is something to count
        first_shape = chosen[0][1]
        alike = [pair for pair in pairs if pair[1] == first_shape]
        more = rng.integers(1, 3)
        chosen += [alike[i] for i in rng.integers(len(alike), size=more)]
    return chosen


def draw_thing(canvas: Canvas, thing: Thing) -> None:
    """Draw a shape in the upper three quarters of its cell, its label below it."""
    rng = canvas.rng
    row, column = ROWS[thing.row], COLUMNS[thing.column]
    number = canvas.add_object(
        what=thing.shape, color=thing.color, pattern=thing.pattern, row=row, column=column
    )
    radius = rng.uniform(18, 22)
    x = (thing.column + 0.5) * CELL + rng.uniform(-6, 6)
    y = thing.row * CELL + 24 + rng.uniform(-2, 2)
    fill = vary_color(COLORS[thing.color], 18, rng)
    mask = Image.new("L", (SIZE, SIZE), 0)
    draw_shape(ImageDraw.Draw(mask), thing.shape, x, y, radius, 255)
    paint(canvas, fill, mask, np.ones((SIZE, SIZE), bool))
    dark = tuple(int(0.5 * value) for value in fill)
    paint(canvas, dark, mask, pattern_mask(thing.pattern, rng))
    draw_shape(canvas.id_draw, thing.shape, x, y, radius, number)
    if thing.label:
        left, top = thing.column * 4 + 1, thing.row * 4 + 3
        canvas.paper(left, top, 2, 1)
        size = int(rng.integers(14, 17))
        for place, digit in enumerate(thing.label):
            words = {"what": "label", "digit": str(digit), "place": ORDINALS[place]}
            words |= {"row": row, "column": column}
            canvas.print_character(str(digit), (left + place, top), size, **words)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill) -> None:
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "square":
        draw.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
    elif shape == "cross":
        draw.rectangle([x - r, y - r / 3, x + r, y + r / 3], fill=fill)
        draw.rectangle([x - r / 3, y - r, x + r / 3, y + r], fill=fill)
    else:
        draw.polygon(star_corners(x, y, r), fill=fill)


def star_corners(x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Five points and the five corners between them, from the top."""
    corners = []
    for i, angle in enumerate(np.pi / 5 * np.arange(10) - np.pi / 2):
        reach = 1.1 * r if i % 2 == 0 else 0.45 * r
        corners.append((x + reach * np.cos(angle), y + reach * np.sin(angle)))
    return corners


# ------------------------------------------------------------------------------- tables and charts


def draw_table(rng: np.random.Generator) -> Picture:
    """facts: cells (rows, columns, 2) digits, as a nested list."""
    canvas = Canvas(rng)
    rows, columns = int(rng.integers(3, 6)), int(rng.integers(2, 4))
    cells = rng.integers(0, 10, size=(rows, columns, 2)).tolist()
    wide, high = 1 + 3 * columns, 1 + 2 * rows  # patches: headers, a gap before each column and row
    left = int(rng.integers(GRID - wide + 1))
    top = int(rng.integers(GRID - high + 1))
    canvas.paper(left, top, wide, high)
    draw_lines(canvas, left, top, rows, columns)
    size = int(rng.integers(14, 17))
    for r in range(rows):
        row = TABLE_ROWS[r]
        canvas.print_character(row, (left, top + 2 * r + 2), size, what="header", row=row)
    for c in range(columns):
        column = TABLE_COLUMNS[c]
        canvas.print_character(column, (left + 3 * c + 2, top), size, what="header", column=column)
    for r in range(rows):
        for c in range(columns):
            for place, digit in enumerate(cells[r][c]):
                words = {"what": "cell", "digit": str(digit), "place": ORDINALS[place]}
                words |= {"row": TABLE_ROWS[r], "column": TABLE_COLUMNS[c]}
                patch = (left + 3 * c + 2 + place, top + 2 * r + 2)
                canvas.print_character(str(digit), patch, size, **words)
    return canvas.finish("table", {"cells": cells})


def draw_lines(canvas: Canvas, left: int, top: int, rows: int, columns: int) -> None:
    """Faint lines in the gaps of a table whose upper left patch is (left, top)."""
    faint = canvas.faint_ink(0.4, 75)
    start, end = left * PATCH, (left + 1 + 3 * columns) * PATCH
    for r in range(rows):
        y = (top + 2 * r + 1.5) * PATCH
        canvas.draw.line([(start, y), (end, y)], fill=faint)
    start, end = top * PATCH, (top + 1 + 2 * rows) * PATCH
    for c in range(columns):
        x = (left + 3 * c + 1.5) * PATCH
        canvas.draw.line([(x, start), (x, end)], fill=faint)


def draw_chart(rng: np.random.Generator) -> Picture:
    """facts: bars [(color, value 1..9)] from left to right; values are distinct."""
    canvas = Canvas(rng)
    n = int(rng.integers(3, 6))
    names = list(COLORS)
    colors = [names[i] for i in rng.permutation(len(names))[:n]]
    values = [int(value) for value in rng.permutation(9)[:n] + 1]
    bottom, left = rng.uniform(170, 184), rng.uniform(8, 20)
    step = (SIZE - 8 - left) / n
    width = step * rng.uniform(0.55, 0.8)
    draw_axes(canvas, left, bottom)
    for i, (color, value) in enumerate(zip(colors, values)):
        words = {"what": "bar", "color": color, "value": str(value)}
        if value == max(values):
            words["extreme"] = "tallest"
        elif value == min(values):
            words["extreme"] = "shortest"
        x = left + i * step + (step - width) / 2
        box = [x, bottom - PATCH * value, x + width, bottom - 1]  # one unit is a patch high
        canvas.draw.rectangle(box, fill=vary_color(COLORS[color], 18, rng))
        canvas.id_draw.rectangle(box, fill=canvas.add_object(**words))
    return canvas.finish("chart", {"bars": list(zip(colors, values))})


def draw_axes(canvas: Canvas, left: float, bottom: float) -> None:
    """Two axes, a faint tick at each unit, at every fifth a faint line through the picture."""
    faint = canvas.faint_ink(0.25, 96)
    for unit in range(10):
        y = bottom - PATCH * unit
        end = left + SIZE if unit % 5 == 0 else left
        canvas.draw.line([(left - 6, y), (end, y)], fill=faint)
    canvas.draw.line([(left - 4, bottom), (SIZE - 6, bottom)], fill=canvas.ink, width=2)
    canvas.draw.line([(left - 4, bottom), (left - 4, bottom - 152)], fill=canvas.ink, width=2)

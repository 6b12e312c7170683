r"""GlyphWorld: seeded pictures of shapes, numbers, tables and bar charts, and questions about them.

The embedded model is trained and measured on this world. Everything is drawn with Pillow from a
seed, no file is read. The generator knows what every patch shows, so it also yields dense labels
(`Picture.patch_words`): they train the encoders, and tell which patches survived a pruning stage.

Three kinds of picture, eight families of question in the paper's two groups:

    scene   3 x 3 cells with shapes,        presence, color, count, relation    General
            often a printed number          number                              OCR & Chart
    table   rows a b c, columns x y z       cell                                OCR & Chart
    chart   3 to 5 bars of heights 1..9     tallest, value                      OCR & Chart

Splits have disjoint seeds. `HELD_OUT_PAIRS` and `held_out_number` never occur in "train" and "val".
In "test" the pairs occur like any other, and *every* printed number is a held-out one, so that
reading cannot be recall.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE, GRID = 96, 12  # pixels per side, patches per side
PATCH = SIZE // GRID  # pixels per side of a patch
CELL = SIZE // 3  # pixels per side of one of a scene's 3 x 3 cells

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "cyan": (40, 190, 210),
}
SHAPES = ["circle", "square", "triangle", "star", "cross"]
ROWS = ["top", "middle", "bottom"]  # where a shape stands
COLUMNS = ["left", "center", "right"]
TABLE_ROWS = ["a", "b", "c"]
TABLE_COLUMNS = ["x", "y", "z"]
ORDINALS = ["first", "second", "third", "fourth"]  # which digit of a printed number
DIGITS = list("0123456789")

# A patch has at most one word per slot; index 0 of a slot means "none".
SLOTS = {
    "what": SHAPES + ["number", "cell", "bar", "header"],
    "color": list(COLORS),
    "digit": DIGITS,  # printed
    "value": DIGITS,  # of a bar
    "count": DIGITS,  # how many shapes of this kind the picture has
    "row": ROWS + TABLE_ROWS,
    "column": COLUMNS + TABLE_COLUMNS + ORDINALS,
    "extreme": ["tallest", "shortest"],
}
FAMILIES = {
    "presence": "General",
    "color": "General",
    "count": "General",
    "relation": "General",
    "number": "OCR & Chart",
    "cell": "OCR & Chart",
    "tallest": "OCR & Chart",
    "value": "OCR & Chart",
}
KIND_OF_FAMILY = {
    "presence": "scene",
    "color": "scene",
    "count": "scene",
    "relation": "scene",
    "number": "scene",
    "cell": "table",
    "tallest": "chart",
    "value": "chart",
}
HELD_OUT_PAIRS = {("purple", "star"), ("green", "triangle"), ("yellow", "cross")}
SPLIT_SEED = {"train": 0, "val": 1, "test": 2}
CLIP_SEED = 3
EXAMPLES_FROM = 10_000_000  # pictures from this number on are examples, and never train

QUESTION_WORDS = (
    "is there a what color the how many are left right of above below number in row column cell "
    "read which bar tallest shortest value describe where picture yes no shapes digit , ? ."
).split()
WORDS = sorted({word for slot in SLOTS.values() for word in slot} | set(QUESTION_WORDS))


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

    image (96, 96, 3) uint8.
    patch_words (144, 8) int64: per patch, in raster order, one index per slot of `SLOTS`, 0 for
        none.
    kind: "scene", "table" or "chart"; facts: what was drawn (see `draw_scene`, `draw_table`,
        `draw_chart`).
    """

    image: np.ndarray
    patch_words: np.ndarray
    kind: str
    facts: dict


class Canvas:
    """The picture, and beside it a canvas of object numbers from which each patch reads its words.

    Object 0 is the background. A canvas begins with one: dark or light, a ramp of grey, noise.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        dark = rng.random() < 0.4
        self.ink = (235, 235, 235) if dark else (25, 25, 25)
        grey = rng.uniform(30, 75) if dark else rng.uniform(170, 230)
        self.image = Image.fromarray(background(rng, grey))
        self.draw = ImageDraw.Draw(self.image)
        self.ids = Image.new("L", (SIZE, SIZE), 0)
        self.id_draw = ImageDraw.Draw(self.ids)
        self.words = [{}]  # of each object: slot -> word
        self.scratch(grey)

    def scratch(self, grey: float) -> None:
        """A few faint lines, so that an edge alone means nothing."""
        rng = self.rng
        for _ in range(rng.integers(0, 4)):
            shade = varied((grey, grey, grey), 30, rng)
            start = tuple(rng.integers(0, SIZE, 2))
            end = tuple(rng.integers(0, SIZE, 2))
            self.draw.line([start, end], fill=shade, width=1)

    def faint_ink(self, strength: float, rest: int) -> tuple[int, ...]:
        """The ink, thinned, for lines that carry no meaning."""
        return tuple((np.array(self.ink) * strength + rest).astype(int).tolist())

    def add_object(self, **words: str) -> int:
        """Register an object with its words (slot -> word).

        Returns: its number on the canvas of numbers.
        """
        self.words.append(words)
        return len(self.words) - 1

    def glyph(
        self, text: str, left: int, top: int, box: tuple[int, int], size: int, **words: str
    ) -> None:
        """Print one character in the middle of a box (width, height), up to a pixel beside it.

        What it covers gets its words.
        """
        font = ImageFont.load_default(size)
        width, height = box
        x = left + width / 2 + self.rng.uniform(-1, 1)
        y = top + height / 2 + self.rng.uniform(-1, 1)
        self.draw.text((x, y), text, font=font, fill=self.ink, anchor="mm")
        covered = self.draw.textbbox((x, y), text, font=font, anchor="mm")
        self.id_draw.rectangle(covered, fill=self.add_object(**words))

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image).copy()

    def patch_words(self) -> np.ndarray:
        """Per patch the words of the object that covers most of it: 15 % of its pixels at least."""
        ids = np.asarray(self.ids).reshape(GRID, PATCH, GRID, PATCH)
        patches = ids.transpose(0, 2, 1, 3).reshape(GRID * GRID, PATCH * PATCH)
        words = [word_numbers(words) for words in self.words]
        labels = np.zeros((GRID * GRID, len(SLOTS)), np.int64)
        for place, patch in enumerate(patches):
            covered = np.bincount(patch)  # pixels of each object
            covered[0] = 0  # the background is none
            owner = covered.argmax()
            if covered[owner] >= 0.15 * PATCH * PATCH:
                labels[place] = words[owner]
        return labels

    def finish(self, kind: str, facts: dict) -> Picture:
        return Picture(self.pixels(), self.patch_words(), kind, facts)


def background(rng: np.random.Generator, grey: float) -> np.ndarray:
    """(96, 96, 3) uint8: a grey that rises in some direction, with a tint and noise."""
    ramp = np.linspace(-1, 1, SIZE)
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0, 22)
    slope = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :]
    ground = grey + strength * slope
    tint = rng.uniform(-12, 12, size=3)
    loudness = rng.uniform(2, 7)
    noise = rng.normal(0, loudness, size=(SIZE, SIZE, 3))
    return np.clip(ground[:, :, None] + tint + noise, 0, 255).astype(np.uint8)


def word_numbers(words: dict[str, str]) -> list[int]:
    """One number per slot: the word's place in `SLOTS`, from 1; 0 for none."""
    numbers = []
    for slot, vocabulary in SLOTS.items():
        number = 1 + vocabulary.index(words[slot]) if slot in words else 0
        numbers.append(number)
    return numbers


def varied(color: tuple[float, ...], most: float, rng: np.random.Generator) -> tuple[int, ...]:
    """A colour near another, so that no colour is one exact value."""
    changed = []
    for value in color:
        changed.append(int(np.clip(value + rng.uniform(-most, most), 0, 255)))
    return tuple(changed)


def make_picture(index: int, split: str = "train", kind: str | None = None) -> Picture:
    """Picture number `index` of a split; the same arguments always give the same pixels.

    Raises: ValueError for an unknown split or kind or a negative index.
    """
    if split not in SPLIT_SEED:
        raise ValueError(f"split must be one of {list(SPLIT_SEED)}, got {split!r}")
    if kind not in (None, "scene", "table", "chart"):
        raise ValueError(f"kind must be 'scene', 'table', 'chart' or None, got {kind!r}")
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    name = "" if kind is None else kind
    rng = np.random.default_rng([SPLIT_SEED[split], index, *name.encode()])
    if kind is None:
        kind = str(rng.choice(["scene", "table", "chart"], p=[0.5, 0.2, 0.3]))
    if kind == "scene":
        return draw_scene(rng, split)
    if kind == "table":
        return draw_table(rng)
    return draw_chart(rng)


# ------------------------------------------------------------------------------------------- scenes


def draw_scene(rng: np.random.Generator, split: str) -> Picture:
    """facts: objects [(color, shape, row 0..2, column 0..2)], number [digits] or None."""
    canvas = Canvas(rng)
    cells = [(row, column) for row in range(3) for column in range(3)]
    number = None
    if rng.random() < 0.6:
        number = random_number(rng, split)
        row, column = int(rng.integers(3)), int(rng.integers(2))
        cells.remove((row, column))  # a number takes two cells
        cells.remove((row, column + 1))
        print_number(canvas, number, row, column)
    kinds = random_kinds(rng, split)
    places = rng.permutation(len(cells))[: len(kinds)]
    objects = []
    for (color, shape), place in zip(kinds, places):
        row, column = cells[place]
        objects.append((color, shape, row, column))
    for color, shape, row, column in objects:
        stand(canvas, color, shape, row, column, how_many(objects, shape))
    return canvas.finish("scene", {"objects": objects, "number": number})


def random_number(rng: np.random.Generator, split: str) -> list[int]:
    """Three or four digits; held-out strings only in "test", all others elsewhere."""
    while True:
        length = rng.integers(3, 5)
        digits = [int(digit) for digit in rng.integers(0, 10, size=length)]
        if held_out_number(digits) == (split == "test"):
            return digits


def print_number(canvas: Canvas, number: list[int], row: int, column: int) -> None:
    """Print a number somewhere in cell (row, column) and the next; a digit is 2 x 3 patches."""
    rng = canvas.rng
    size = int(rng.integers(21, 25))
    free = 2 * CELL // PATCH - 2 * len(number)  # patches that the digits leave in two cells
    left = column * CELL + PATCH * int(rng.integers(0, free + 1))
    top = row * CELL + PATCH * int(rng.integers(2))
    box = (2 * PATCH, 3 * PATCH)
    for place, digit in enumerate(number):
        words = {"what": "number", "digit": str(digit), "column": ORDINALS[place]}
        canvas.glyph(str(digit), left + 2 * PATCH * place, top, box, size, **words)


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


def stand(canvas: Canvas, color: str, shape: str, row: int, column: int, count: int) -> None:
    """Draw a shape about the middle of its cell, and label it; count: of its kind in the scene."""
    rng = canvas.rng
    radius = rng.uniform(10, 13)
    x = column * CELL + CELL // 2 + rng.uniform(-2, 2)
    y = row * CELL + CELL // 2 + rng.uniform(-2, 2)
    number = canvas.add_object(
        what=shape, color=color, count=str(count), row=ROWS[row], column=COLUMNS[column]
    )
    fill = varied(COLORS[color], 18, rng)
    draw_shape(canvas.draw, shape, x, y, radius, fill)
    draw_shape(canvas.id_draw, shape, x, y, radius, number)


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


def how_many(objects: list, shape: str) -> int:
    return sum(kind == shape for _, kind, _, _ in objects)


def single(objects: list) -> list:
    """The objects whose shape occurs once: "the star" means one of them."""
    return [item for item in objects if how_many(objects, item[1]) == 1]


# ------------------------------------------------------------------------------- tables and charts


def draw_table(rng: np.random.Generator) -> Picture:
    """facts: cells (rows, columns) digits, as a nested list."""
    canvas = Canvas(rng)
    rows, columns = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    cells = rng.integers(0, 10, size=(rows, columns)).tolist()
    step = 3 * PATCH  # small encoders read best where glyphs keep to their grid
    left = PATCH * int(rng.integers(0, GRID - 3 * columns - 2))
    top = PATCH * int(rng.integers(0, GRID - 3 * rows - 2))
    size = int(rng.integers(18, 22))
    draw_lines(canvas, left, top, rows + 1, columns + 1, step)  # with a row and column of headers

    def write(text, r, c, **words):
        canvas.glyph(text, left + c * step, top + r * step, (step, step), size, **words)

    for r in range(rows):
        write(TABLE_ROWS[r], r + 1, 0, what="header", row=TABLE_ROWS[r])
    for c in range(columns):
        write(TABLE_COLUMNS[c], 0, c + 1, what="header", column=TABLE_COLUMNS[c])
    for r in range(rows):
        for c in range(columns):
            digit = str(cells[r][c])
            place = {"row": TABLE_ROWS[r], "column": TABLE_COLUMNS[c]}
            write(digit, r + 1, c + 1, what="cell", digit=digit, **place)
    return canvas.finish("table", {"cells": cells})


def draw_lines(canvas: Canvas, left: int, top: int, rows: int, columns: int, step: int) -> None:
    """The faint lines around rows x columns cells."""
    faint = canvas.faint_ink(0.4, 75)
    right, bottom = left + step * columns, top + step * rows
    for r in range(rows + 1):
        y = top + r * step
        canvas.draw.line([(left, y), (right, y)], fill=faint)
    for c in range(columns + 1):
        x = left + c * step
        canvas.draw.line([(x, top), (x, bottom)], fill=faint)


def draw_chart(rng: np.random.Generator) -> Picture:
    """facts: bars [(color, value 1..9)] from left to right; values are distinct."""
    canvas = Canvas(rng)
    n = int(rng.integers(3, 6))
    names = list(COLORS)
    colors = [names[i] for i in rng.permutation(len(names))[:n]]
    values = [int(value) for value in rng.permutation(9)[:n] + 1]
    bottom, left = rng.uniform(85, 92), rng.uniform(4, 10)
    step = (SIZE - 4 - left) / n
    width = step * rng.uniform(0.55, 0.8)
    draw_axes(canvas, left, bottom)
    for i, (color, value) in enumerate(zip(colors, values)):
        words = {"what": "bar", "color": color, "value": str(value)}
        if value == max(values):
            words["extreme"] = "tallest"
        elif value == min(values):
            words["extreme"] = "shortest"
        x = left + i * step + (step - width) / 2
        box = [x, bottom - 8 * value, x + width, bottom - 1]  # one unit is 8 pixels high
        canvas.draw.rectangle(box, fill=varied(COLORS[color], 18, rng))
        canvas.id_draw.rectangle(box, fill=canvas.add_object(**words))
    return canvas.finish("chart", {"bars": list(zip(colors, values))})


def draw_axes(canvas: Canvas, left: float, bottom: float) -> None:
    """Two axes, a faint tick at each unit, at every fifth a faint line through the picture."""
    faint = canvas.faint_ink(0.25, 96)
    for unit in range(10):
        y = bottom - 8 * unit
        end = left + SIZE if unit % 5 == 0 else left
        canvas.draw.line([(left - 3, y), (end, y)], fill=faint)
    canvas.draw.line([(left - 2, bottom), (SIZE - 3, bottom)], fill=canvas.ink)
    canvas.draw.line([(left - 2, bottom), (left - 2, bottom - 76)], fill=canvas.ink)


# ---------------------------------------------------------------------------------------- questions


def ask(
    picture: Picture, family: str, rng: np.random.Generator, split: str = "train"
) -> tuple[str, str] | None:
    """A question of a family with its true answer.

    Returns: (question, answer), or None where the picture has nothing to ask about.
    """
    facts = picture.facts
    if KIND_OF_FAMILY[family] != picture.kind:
        return None
    if family == "presence":
        return ask_presence(facts["objects"], rng, split)
    if family == "color":
        return ask_color(facts["objects"], rng)
    if family == "count":
        return ask_count(facts["objects"], rng)
    if family == "relation":
        return ask_relation(facts["objects"], rng)
    if family == "number":
        return ask_number(facts["number"])
    if family == "cell":
        return ask_cell(facts["cells"], rng)
    if family == "tallest":
        return ask_tallest(facts["bars"], rng)
    return ask_value(facts["bars"], rng)


def ask_presence(objects: list, rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Balanced; half of the absent pairs have their color and their shape both in the picture."""
    there = {(color, shape) for color, shape, _, _ in objects}
    if rng.random() < 0.5:
        color, shape = sorted(there)[rng.integers(len(there))]
        return f"is there a {color} {shape} ?", "yes"
    colors = {color for color, _ in there}
    shapes = {shape for _, shape in there}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    absent = [pair for pair in pairs if pair not in there and not held_out(pair, split)]
    near = [(color, shape) for color, shape in absent if color in colors and shape in shapes]
    pool = absent
    if near and rng.random() < 0.5:
        pool = near
    color, shape = pool[rng.integers(len(pool))]
    return f"is there a {color} {shape} ?", "no"


def ask_color(objects: list, rng: np.random.Generator) -> tuple[str, str] | None:
    once = single(objects)
    if not once:
        return None
    color, shape, _, _ = once[rng.integers(len(once))]
    return f"what color is the {shape} ?", color


def ask_count(objects: list, rng: np.random.Generator) -> tuple[str, str]:
    """Mostly of a shape that is there, and often of one that is there more than once."""
    present = sorted({shape for _, shape, _, _ in objects})
    many = [shape for shape in present if how_many(objects, shape) > 1]
    pool = present if rng.random() < 0.8 else SHAPES
    if many and rng.random() < 0.5:
        pool = many
    shape = pool[rng.integers(len(pool))]
    return f"how many {shape} shapes are there ?", str(how_many(objects, shape))


def ask_relation(objects: list, rng: np.random.Generator) -> tuple[str, str] | None:
    once = single(objects)
    vertical = rng.integers(2) == 0
    axis = 2 if vertical else 3  # an object's row or column
    pairs = [(a, b) for a in once for b in once if a[axis] != b[axis]]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    asks_before = rng.integers(2) == 0
    if vertical:
        relation = "above" if asks_before else "below"
    else:
        relation = "left of" if asks_before else "right of"
    is_before = a[axis] < b[axis]
    answer = "yes" if is_before == asks_before else "no"
    return f"is the {a[1]} {relation} the {b[1]} ?", answer


def ask_number(number: list[int] | None) -> tuple[str, str] | None:
    if number is None:
        return None
    return "what is the number ?", joined(number)


def ask_cell(cells: list[list[int]], rng: np.random.Generator) -> tuple[str, str]:
    """One cell, or a whole row."""
    r, c = int(rng.integers(len(cells))), int(rng.integers(len(cells[0])))
    row, column = TABLE_ROWS[r], TABLE_COLUMNS[c]
    if rng.random() < 0.4:
        return f"read row {row} .", joined(cells[r])
    return f"what is in row {row} column {column} ?", str(cells[r][c])


def ask_tallest(bars: list[tuple[str, int]], rng: np.random.Generator) -> tuple[str, str]:
    """Half of the questions ask for the shortest."""
    by_value = sorted(bars, key=bar_value)
    if rng.random() < 0.5:
        word, (color, _) = "tallest", by_value[-1]
    else:
        word, (color, _) = "shortest", by_value[0]
    return f"which bar is the {word} ?", color


def bar_value(bar: tuple[str, int]) -> int:
    return bar[1]


def ask_value(bars: list[tuple[str, int]], rng: np.random.Generator) -> tuple[str, str]:
    color, value = bars[rng.integers(len(bars))]
    return f"what is the value of the {color} bar ?", str(value)


def joined(digits: list[int]) -> str:
    return "".join(str(digit) for digit in digits)


def place_name(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


# ------------------------------------------------------- questions that train, and are not measured


def describe(picture: Picture) -> tuple[str, str]:
    """The whole picture in words, in raster order: a question with many supervised tokens."""
    facts, parts = picture.facts, []
    if picture.kind == "scene":
        for color, shape, row, column in sorted(facts["objects"], key=object_place):
            parts.append(f"{color} {shape} {place_name(row, column)}")
        if facts["number"]:
            parts.append("number " + joined(facts["number"]))
    elif picture.kind == "table":
        for name, digits in zip(TABLE_ROWS, facts["cells"]):
            parts.append(f"row {name} {joined(digits)}")
    else:
        for color, value in facts["bars"]:
            parts.append(f"{color} bar {value}")
    return "describe the picture .", " , ".join(parts)


def object_place(item: tuple) -> tuple[int, int]:
    _, _, row, column = item
    return row, column


def where(scene: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """Where all shapes of a kind stand, in raster order, or where two shapes stand.

    To count is to find all of a kind, to compare is to find two: without being asked where things
    are, the model learns neither in 3,000 steps.
    """
    objects = scene.facts["objects"]
    once = single(objects)
    if len(once) >= 2 and rng.random() < 0.5:
        first, second = (once[i] for i in rng.permutation(len(once))[:2])
        question = f"where are the {first[1]} , {second[1]} ?"
        places = [object_place(first), object_place(second)]
    else:
        shape = objects[rng.integers(len(objects))][1]
        question = f"where are the {shape} shapes ?"
        places = sorted(object_place(item) for item in objects if item[1] == shape)
    return question, " , ".join(place_name(row, column) for row, column in places)


# --------------------------------------------------------------------- what accuracy is measured on


def example(index: int, split: str, family: str) -> tuple[Picture, str, str]:
    """(picture, question, answer) number `index` of a family.

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
        asked = ask(picture, family, rng, split)
        if asked:
            return picture, *asked
    # cannot happen: most pictures have one
    raise RuntimeError(f"no {family} question in 100 pictures")


def make_clip(index: int, kind: str) -> tuple[np.ndarray, str, str]:
    """A short film as one picture: its frames fill the cells of a scene, row by row (as IG-VLM).

    Neither kind occurs in training. "colors": six frames of a shape that changes its colour once;
    was it ever of some colour? "counter": three frames of a digit that counts up; which digits?

    Returns: image (96, 96, 3) uint8, question, answer.
    """
    rng = np.random.default_rng([CLIP_SEED, index, *kind.encode()])
    canvas = Canvas(rng)
    if kind == "colors":
        question, answer = draw_color_clip(canvas)
    else:
        question, answer = draw_counter_clip(canvas)
    return canvas.pixels(), question, answer


def draw_color_clip(canvas: Canvas) -> tuple[str, str]:
    rng, names = canvas.rng, list(COLORS)
    shape = SHAPES[rng.integers(len(SHAPES))]
    before, after, *never = (names[i] for i in rng.permutation(len(names)))
    change = int(rng.integers(1, 6))  # the first frame of the second colour
    for frame in range(6):
        row, column = divmod(frame, 3)
        color = before if frame < change else after
        x, y = column * CELL + CELL / 2, row * CELL + CELL / 2
        draw_shape(canvas.draw, shape, x, y, 12, COLORS[color])
    if rng.random() < 0.5:
        color, answer = (before, after)[rng.integers(2)], "yes"
    else:
        color, answer = never[rng.integers(2, len(names)) - 2], "no"
    return f"is there a {color} {shape} ?", answer


def draw_counter_clip(canvas: Canvas) -> tuple[str, str]:
    rng = canvas.rng
    first, size, row = int(rng.integers(8)), int(rng.integers(21, 25)), int(rng.integers(3))
    digits = [first, first + 1, first + 2]
    for frame, digit in enumerate(digits):
        box = (2 * PATCH, 3 * PATCH)
        canvas.glyph(str(digit), frame * CELL + PATCH, row * CELL, box, size)
    return "what is the number ?", joined(digits)

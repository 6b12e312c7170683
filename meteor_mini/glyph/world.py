r"""GlyphWorld: seeded pictures of shapes, numbers, tables and bar charts, and questions about them.

The embedded model is trained and measured on this world. Everything is drawn with Pillow from a seed, no file is
read, and because the generator knows what every patch shows it also yields dense labels (`Picture.patch_words`)
for training encoders and for asking, after each pruning stage, which patches survived.

Three kinds of picture, eight families of question in the paper's two groups:

    scene   3x3 cells with shapes, often a printed number     presence, color, count, relation (General); number
    table   2-3 rows a b c by 2-3 columns x y z of digits     cell                                  (OCR & Chart)
    chart   3-5 coloured bars of distinct heights 1..9        tallest, value                        (OCR & Chart)

Splits have disjoint seeds. `HELD_OUT_PAIRS` and `held_out_number` never occur in "train" and "val"; in "test" the
pairs occur like any other and *every* printed number is a held-out one, so reading cannot be recall.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE, GRID = 96, 12  # pixels per side, patches per side
PATCH = SIZE // GRID

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "cyan": (40, 190, 210),
}
SHAPES = ["circle", "square", "triangle", "star", "cross"]
ROWS, COLUMNS = (
    ["top", "middle", "bottom"],
    ["left", "center", "right"],
)  # where a shape stands, thirds
TABLE_ROWS, TABLE_COLUMNS = ["a", "b", "c"], ["x", "y", "z"]
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

_QUESTION_WORDS = (
    "is there a what color the how many are left right of above below number in row column cell read "
    "which bar tallest shortest value describe where picture yes no shapes digit , ? ."
).split()
WORDS = sorted({w for slot in SLOTS.values() for w in slot} | set(_QUESTION_WORDS))


def held_out_number(digits: list[int]) -> bool:
    """One digit string in ten, those whose digits sum to 7 modulo 10, never occurs in "train" and "val"."""
    return sum(digits) % 10 == 7


@dataclass
class Picture:
    """A drawn picture with everything that is true of it.

    image (96, 96, 3) uint8; patch_words (144, 8) int64: per patch, raster order, one index per slot of `SLOTS`,
    0 for none; kind "scene" | "table" | "chart"; facts: what was drawn, by kind (see the `_scene`, `_table`,
    `_chart` functions).
    """

    image: np.ndarray
    patch_words: np.ndarray
    kind: str
    facts: dict


@dataclass
class _Canvas:
    """The picture, and beside it a canvas of object numbers from which each patch reads its words."""

    rng: np.random.Generator
    image: Image.Image = None
    ids: Image.Image = field(default_factory=lambda: Image.new("L", (SIZE, SIZE), 0))
    words: list = field(default_factory=lambda: [dict()])

    def __post_init__(self):
        rng, dark = self.rng, self.rng.random() < 0.4
        self.ink = (235, 235, 235) if dark else (25, 25, 25)
        base = rng.uniform(30, 75) if dark else rng.uniform(170, 230)
        ramp = np.linspace(-1, 1, SIZE)
        angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 22)
        grey = base + strength * (np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :])
        tint = rng.uniform(-12, 12, size=3)
        noise = rng.normal(0, rng.uniform(2, 7), size=(SIZE, SIZE, 3))
        pixels = np.clip(grey[:, :, None] + tint + noise, 0, 255).astype(np.uint8)
        self.image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(self.image)
        for _ in range(rng.integers(0, 4)):  # faint scratches, so that an edge alone means nothing
            shade = tuple(int(np.clip(base + rng.uniform(-30, 30), 0, 255)) for _ in range(3))
            draw.line(
                [tuple(rng.integers(0, SIZE, 2)), tuple(rng.integers(0, SIZE, 2))],
                fill=shade,
                width=1,
            )
        self.draw, self.id_draw = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)

    def object(self, **words) -> int:
        """Register an object with its words (slot name -> word); returns its number on the id canvas."""
        self.words.append(words)
        return len(self.words) - 1

    def glyph(
        self, text: str, left: int, top: int, box: tuple[int, int], size: int, **words
    ) -> None:
        """Print one character in the middle of a box (width, height) up to a pixel, and label what it covers."""
        font = ImageFont.load_default(size)
        x, y = (
            left + box[0] / 2 + self.rng.uniform(-1, 1),
            top + box[1] / 2 + self.rng.uniform(-1, 1),
        )
        self.draw.text((x, y), text, font=font, fill=self.ink, anchor="mm")
        covered = self.draw.textbbox((x, y), text, font=font, anchor="mm")
        self.id_draw.rectangle(covered, fill=self.object(**words))

    def patch_words(self) -> np.ndarray:
        """Per patch the words of the object that covers most of it, where that is at least 15 % of its pixels."""
        ids = (
            np.asarray(self.ids)
            .reshape(GRID, PATCH, GRID, PATCH)
            .transpose(0, 2, 1, 3)
            .reshape(GRID * GRID, -1)
        )
        cover = (ids[:, :, None] == np.arange(1, max(len(self.words), 2))).mean(
            axis=1
        )  # (144, objects)
        owner = np.where(cover.max(axis=1) >= 0.15, cover.argmax(axis=1) + 1, 0)
        table = np.array(
            [
                [
                    1 + vocabulary.index(w[slot]) if slot in w else 0
                    for slot, vocabulary in SLOTS.items()
                ]
                for w in self.words
            ],
            dtype=np.int64,
        )
        return table[owner]

    def finish(self, kind: str, facts: dict) -> Picture:
        return Picture(np.asarray(self.image).copy(), self.patch_words(), kind, facts)


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
    rng = np.random.default_rng([SPLIT_SEED[split], index, *(kind or "").encode()])
    kind = kind or str(rng.choice(["scene", "table", "chart"], p=[0.5, 0.2, 0.3]))
    return {"scene": _scene, "table": _table, "chart": _chart}[kind](rng, split)


def _scene(rng: np.random.Generator, split: str) -> Picture:
    """facts: objects [(color, shape, row 0..2, column 0..2)], number [digits] or None."""
    canvas = _Canvas(rng)
    cells = [(r, c) for r in range(3) for c in range(3)]
    number = None
    if rng.random() < 0.6:
        number = _number(rng, split)
        row, column = int(rng.integers(3)), int(rng.integers(2))
        cells.remove((row, column)), cells.remove((row, column + 1))
        size = int(rng.integers(21, 25))
        left, top = (
            column * 32 + PATCH * int(rng.integers(0, 9 - 2 * len(number))),
            row * 32 + PATCH * int(rng.integers(2)),
        )
        for place, (digit, ordinal) in enumerate(zip(number, ORDINALS)):
            canvas.glyph(
                str(digit),
                left + 2 * PATCH * place,
                top,
                (2 * PATCH, 3 * PATCH),
                size,
                what="number",
                digit=str(digit),
                column=ordinal,
            )
    pairs = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if split == "test" or (color, shape) not in HELD_OUT_PAIRS
    ]
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=rng.integers(2, 6))]
    if rng.random() < 0.5:  # repeat one kind, so that there is something to count
        extra = [p for p in pairs if p[1] == chosen[0][1]]
        chosen += [extra[i] for i in rng.integers(len(extra), size=rng.integers(1, 3))]
    places = rng.permutation(len(cells))[: len(chosen)]
    objects = [(color, shape, *cells[place]) for (color, shape), place in zip(chosen, places)]
    counts = {shape: sum(o[1] == shape for o in objects) for shape in SHAPES}
    for color, shape, row, column in objects:
        radius = rng.uniform(10, 13)
        x, y = column * 32 + 16 + rng.uniform(-2, 2), row * 32 + 16 + rng.uniform(-2, 2)
        number_on_ids = canvas.object(
            what=shape, color=color, count=str(counts[shape]), row=ROWS[row], column=COLUMNS[column]
        )
        jitter = tuple(int(np.clip(v + rng.uniform(-18, 18), 0, 255)) for v in COLORS[color])
        _shape(canvas.draw, shape, x, y, radius, jitter)
        _shape(canvas.id_draw, shape, x, y, radius, number_on_ids)
    return canvas.finish("scene", {"objects": objects, "number": number})


def _number(rng: np.random.Generator, split: str) -> list[int]:
    """Three or four digits; held-out strings only in "test", all others elsewhere."""
    digits = [int(d) for d in rng.integers(0, 10, size=rng.integers(3, 5))]
    wrong = held_out_number(digits) != (split == "test")
    return _number(rng, split) if wrong else digits


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill) -> None:
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
        angles = np.pi / 5 * np.arange(10) - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.1 * r, 0.45 * r)
        draw.polygon(
            [(x + s * np.cos(a), y + s * np.sin(a)) for a, s in zip(angles, radii)], fill=fill
        )


def _table(rng: np.random.Generator, split: str) -> Picture:
    """facts: cells (rows, columns) digits, as a nested list."""
    canvas = _Canvas(rng)
    rows, columns = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    cells = rng.integers(0, 10, size=(rows, columns)).tolist()
    step = (
        3 * PATCH
    )  # a cell is 3 x 3 patches: small encoders read best where glyphs keep to their grid
    left, top = (PATCH * int(rng.integers(0, GRID - 3 * n - 2)) for n in (columns, rows))
    size = int(rng.integers(18, 22))
    faint = tuple((np.array(canvas.ink) * 0.4 + 75).astype(int).tolist())
    for r in range(rows + 2):
        canvas.draw.line(
            [(left, top + r * step), (left + step * (columns + 1), top + r * step)], fill=faint
        )
    for c in range(columns + 2):
        canvas.draw.line(
            [(left + c * step, top), (left + c * step, top + step * (rows + 1))], fill=faint
        )

    def cell(text, r, c, **words):
        canvas.glyph(text, left + c * step, top + r * step, (step, step), size, **words)

    for r in range(rows):
        cell(TABLE_ROWS[r], r + 1, 0, what="header", row=TABLE_ROWS[r])
    for c in range(columns):
        cell(TABLE_COLUMNS[c], 0, c + 1, what="header", column=TABLE_COLUMNS[c])
    for r in range(rows):
        for c in range(columns):
            cell(
                str(cells[r][c]),
                r + 1,
                c + 1,
                what="cell",
                digit=str(cells[r][c]),
                row=TABLE_ROWS[r],
                column=TABLE_COLUMNS[c],
            )
    return canvas.finish("table", {"cells": cells})


def _chart(rng: np.random.Generator, split: str) -> Picture:
    """facts: bars [(color, value 1..9)] from left to right; values are distinct. One unit is 8 pixels high."""
    canvas = _Canvas(rng)
    n = int(rng.integers(3, 6))
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:n]]
    values = [int(v) for v in rng.permutation(9)[:n] + 1]
    base, left = rng.uniform(85, 92), rng.uniform(4, 10)
    step = (SIZE - 4 - left) / n
    width = step * rng.uniform(0.55, 0.8)
    faint = tuple((np.array(canvas.ink) * 0.25 + 96).astype(int).tolist())
    for unit in range(0, 10):
        canvas.draw.line(
            [(left - 3, base - 8 * unit), (left - (0 if unit % 5 else -SIZE), base - 8 * unit)],
            fill=faint,
        )
    canvas.draw.line([(left - 2, base), (SIZE - 3, base)], fill=canvas.ink)
    canvas.draw.line([(left - 2, base), (left - 2, base - 76)], fill=canvas.ink)
    for i, (color, value) in enumerate(zip(colors, values)):
        extreme = {max(values): "tallest", min(values): "shortest"}.get(value)
        words = {"what": "bar", "color": color, "value": str(value)} | (
            {"extreme": extreme} if extreme else {}
        )
        x = left + i * step + (step - width) / 2
        box = [x, base - 8 * value, x + width, base - 1]
        jitter = tuple(int(np.clip(v + rng.uniform(-18, 18), 0, 255)) for v in COLORS[color])
        canvas.draw.rectangle(box, fill=jitter)
        canvas.id_draw.rectangle(box, fill=canvas.object(**words))
    return canvas.finish("chart", {"bars": list(zip(colors, values))})


def ask(
    picture: Picture, family: str, rng: np.random.Generator, split: str = "train"
) -> tuple[str, str] | None:
    """A question of a family with its true answer, or None where the picture has nothing to ask about.

    Yes-no questions are balanced; half of the absent pairs have their color and their shape both in the picture.
    """
    facts = picture.facts
    if KIND_OF_FAMILY[family] != picture.kind:
        return None
    if family == "number":
        if facts["number"] is None:
            return None
        return "what is the number ?", "".join(map(str, facts["number"]))
    if picture.kind == "scene":
        objects = facts["objects"]
        once = [o for o in objects if sum(p[1] == o[1] for p in objects) == 1]
        if family == "presence":
            there = {(o[0], o[1]) for o in objects}
            if rng.random() < 0.5:
                (color, shape), answer = sorted(there)[rng.integers(len(there))], "yes"
            else:
                absent = [
                    (c, s)
                    for c in COLORS
                    for s in SHAPES
                    if (c, s) not in there and (split == "test" or (c, s) not in HELD_OUT_PAIRS)
                ]
                near = [
                    (c, s)
                    for c, s in absent
                    if any(o[0] == c for o in objects) and any(o[1] == s for o in objects)
                ]
                pool = near if near and rng.random() < 0.5 else absent
                (color, shape), answer = pool[rng.integers(len(pool))], "no"
            return f"is there a {color} {shape} ?", answer
        if family == "color":
            if not once:
                return None
            color, shape, *_ = once[rng.integers(len(once))]
            return f"what color is the {shape} ?", color
        if family == "count":
            present = sorted({o[1] for o in objects})
            pool = present if rng.random() < 0.8 else SHAPES
            many = [s for s in present if sum(o[1] == s for o in objects) > 1]
            pool = many if many and rng.random() < 0.5 else pool
            shape = pool[rng.integers(len(pool))]
            return f"how many {shape} shapes are there ?", str(sum(o[1] == shape for o in objects))
        axis = int(rng.integers(2))  # relation: 0 above/below, 1 left/right
        pairs = [(a, b) for a in once for b in once if a[2 + axis] != b[2 + axis]]
        if not pairs:
            return None
        a, b = pairs[rng.integers(len(pairs))]
        word = [["above", "below"], ["left of", "right of"]][axis][int(rng.integers(2))]
        before = a[2 + axis] < b[2 + axis]
        return f"is the {a[1]} {word} the {b[1]} ?", "yes" if before == (
            word in ("above", "left of")
        ) else "no"
    if family == "cell":
        cells = facts["cells"]
        r, c = int(rng.integers(len(cells))), int(rng.integers(len(cells[0])))
        if rng.random() < 0.4:
            return f"read row {TABLE_ROWS[r]} .", "".join(map(str, cells[r]))
        return f"what is in row {TABLE_ROWS[r]} column {TABLE_COLUMNS[c]} ?", str(cells[r][c])
    bars = facts["bars"]
    if family == "tallest":
        pick, word = (max, "tallest") if rng.random() < 0.5 else (min, "shortest")
        return f"which bar is the {word} ?", pick(bars, key=lambda bar: bar[1])[0]
    color, value = bars[rng.integers(len(bars))]
    return f"what is the value of the {color} bar ?", str(value)


def describe(picture: Picture) -> tuple[str, str]:
    """The whole picture in words, in raster order: a training question with many supervised tokens."""
    facts = picture.facts
    if picture.kind == "scene":
        parts = [
            f"{c} {s} {ROWS[r]} {COLUMNS[k]}"
            for c, s, r, k in sorted(facts["objects"], key=lambda o: o[2:])
        ]
        parts += ["number " + "".join(map(str, facts["number"]))] if facts["number"] else []
    elif picture.kind == "table":
        parts = [
            f"row {TABLE_ROWS[r]} " + "".join(map(str, row)) for r, row in enumerate(facts["cells"])
        ]
    else:
        parts = [f"{color} bar {value}" for color, value in facts["bars"]]
    return "describe the picture .", " , ".join(parts)


def where(scene: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """Where shapes stand, in raster order; a training question, never measured. To count is to find all of a kind, to
    compare is to find two: without being asked where things are, the model learns neither in 3,000 steps."""
    objects = scene.facts["objects"]
    once = [o for o in objects if sum(p[1] == o[1] for p in objects) == 1]
    if len(once) >= 2 and rng.random() < 0.5:
        pair = [once[i] for i in rng.permutation(len(once))[:2]]
        return f"where are the {pair[0][1]} , {pair[1][1]} ?", " , ".join(
            f"{ROWS[r]} {COLUMNS[c]}" for *_, r, c in pair
        )
    shape = objects[rng.integers(len(objects))][1]
    places = sorted(o[2:] for o in objects if o[1] == shape)
    return f"where are the {shape} shapes ?", " , ".join(
        f"{ROWS[r]} {COLUMNS[c]}" for r, c in places
    )


def make_clip(index: int, kind: str) -> tuple[np.ndarray, str, str]:
    """A short film as one picture, its frames tiled row by row into the 3 x 3 cells of a scene (as IG-VLM does).

    kind "colors": six frames of a shape that changes colour once, asked whether it was ever of some colour; "counter":
    three frames of a digit that counts up, asked for the digits. Neither occurs in training.
    Returns: image (96, 96, 3) uint8, question, answer.
    """
    rng = np.random.default_rng([3, index, *kind.encode()])
    canvas, cell = _Canvas(rng), SIZE // 3
    if kind == "colors":
        shape = SHAPES[rng.integers(len(SHAPES))]
        seen = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
        change = int(rng.integers(1, 6))
        for frame in range(6):
            x, y = frame % 3 * cell + cell / 2, frame // 3 * cell + cell / 2
            _shape(canvas.draw, shape, x, y, 12, COLORS[seen[frame >= change]])
        asked = seen[rng.integers(2) if rng.random() < 0.5 else rng.integers(2, len(seen))]
        return (
            np.asarray(canvas.image).copy(),
            f"is there a {asked} {shape} ?",
            "yes" if asked in seen[:2] else "no",
        )
    first, size, row = int(rng.integers(8)), int(rng.integers(21, 25)), int(rng.integers(3))
    for frame in range(3):
        canvas.glyph(
            str(first + frame), frame * cell + PATCH, row * cell, (2 * PATCH, 3 * PATCH), size
        )
    return (
        np.asarray(canvas.image).copy(),
        "what is the number ?",
        "".join(str(first + frame) for frame in range(3)),
    )


def example(index: int, split: str, family: str) -> tuple[Picture, str, str]:
    """(picture, question, answer) number `index` of a family: what accuracy is measured on.

    Each index has a picture of its own; where a picture has no question of the family the next seed is tried.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    code = list(FAMILIES).index(family)
    for attempt in range(100):
        picture = make_picture(
            10_000_000 + (index * len(FAMILIES) + code) * 100 + attempt,
            split,
            KIND_OF_FAMILY[family],
        )
        asked = ask(picture, family, np.random.default_rng([SPLIT_SEED[split], index, code]), split)
        if asked:
            return picture, *asked
    raise RuntimeError(
        f"no {family} question in 100 pictures"
    )  # cannot happen: most pictures have one

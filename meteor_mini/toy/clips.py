"""Short films as one picture: their frames fill the cells of a scene, row by row (as IG-VLM does).

Neither kind occurs in training; the questions are worded as those of `questions.py`.

    colors     six frames of a shape that changes its color once: was it ever of some color?
    counter    four frames of a printed digit that counts up: which digits?
"""

import numpy as np

from .questions import QUESTION_FAMILIES, join_digits
from .world import (
    CELL,
    CELLS,
    COLORS,
    PATCH,
    SHAPES,
    Canvas,
    draw_shape,
    vary_color,
)

CLIPS = ["colors", "counter"]
CLIP_SEED = 13  # none of `world.SPLIT_SEED`
COLOR_FRAMES = 6
COUNTER_FRAMES = 4  # as many digits as the shortest number of a scene


def make_clip(index: int, kind: str) -> tuple[np.ndarray, str, str]:
    """Clip number `index` of a kind; the same arguments always give the same pixels.

    Returns: image (192, 192, 3) uint8, question, answer.
    Raises: ValueError for an unknown kind.
    """
    if kind not in CLIPS:
        raise ValueError(f"kind must be one of {CLIPS}, got {kind!r}")
    rng = np.random.default_rng([CLIP_SEED, index, *kind.encode()])
    canvas = Canvas(rng)
    draw = draw_color_clip if kind == "colors" else draw_counter_clip
    question, answer = draw(canvas)
    return canvas.pixels(), question, answer


def frame_cell(frame: int) -> tuple[int, int]:
    """Row and column of a frame's cell."""
    return divmod(frame, CELLS)


def draw_color_clip(canvas: Canvas) -> tuple[str, str]:
    """Draw the frames. Returns: question, answer."""
    rng, names = canvas.rng, list(COLORS)
    shape = SHAPES[rng.integers(len(SHAPES))]
    before, after, *never = (names[i] for i in rng.permutation(len(names)))
    change = int(rng.integers(1, COLOR_FRAMES))  # the first frame of the second color
    radius = rng.uniform(18, 22)
    for frame in range(COLOR_FRAMES):
        row, column = frame_cell(frame)
        color = before if frame < change else after
        fill = vary_color(COLORS[color], 18, rng)
        x, y = (column + 0.5) * CELL, row * CELL + 24  # where the shapes of a scene stand
        draw_shape(canvas.draw, shape, x, y, radius, fill)
    if rng.random() < 0.5:
        color, answer = (before, after)[rng.integers(2)], "yes"
    else:
        color, answer = never[rng.integers(len(never))], "no"
    return QUESTION_FAMILIES["presence"].text.format(color=color, shape=shape), answer


def draw_counter_clip(canvas: Canvas) -> tuple[str, str]:
    """Draw the frames, a digit in the middle of each. Returns: question, answer."""
    rng = canvas.rng
    first = int(rng.integers(10 - COUNTER_FRAMES + 1))
    size = int(rng.integers(14, 17))  # of the print of a scene
    digits = list(range(first, first + COUNTER_FRAMES))
    middle = CELL // PATCH // 2  # patches from the edge of a cell
    for frame, digit in enumerate(digits):
        row, column = frame_cell(frame)
        left = column * CELL // PATCH + middle
        top = row * CELL // PATCH + middle
        canvas.paper(left, top, 1, 1)
        canvas.print_character(str(digit), (left, top), size)
    return QUESTION_FAMILIES["number"].text, join_digits(digits)

"""Which patches survive: one figure a question, drawn with Pillow alone (matplotlib is no
dependency).

On the left the picture and the texts; on the right a grid: a row for each stage, a column for each
encoder. Patches whose token is still there are clear and framed in the encoder's colour, the others
are grey.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

# One for each encoder, in order: Okabe and Ito's, which people of all kinds of colour vision tell
# apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
TITLES = {
    "stage1": "Stage 1, encoding",
    "stage2": "Stage 2, fusion",
    "stage3": "Stage 3, decoding (last LLM layer)",
}
INK, GREY = "#1a1a1a", "#666666"
LEGEND = "clear: token kept    grey: token dropped"

# In pixels. On the left, MARGIN from the edges:
MARGIN, GAP = 20, 14
PICTURE = 312  # side of the picture, and width of the texts
HEADING, LINE = 16, 22  # heights in a text
PARAGRAPH = 26  # height of a heading and the space above the next
FOOT = 34  # height of the legend with the space above it
# On the right, from LEFT on, a row for each stage: its title, the captions, the cells.
LEFT = MARGIN + PICTURE + 2 * GAP
TITLE_WIDTH = 350  # room for a row's title
CAPTION_TOP, CELL_TOP = 30, 50  # below the top of a row
CELL = 168  # side of a cell
ROW = CELL_TOP + CELL + GAP


# ------------------------------------------------------------------ the figure


def survivor_figure(
    image: torch.Tensor, texts: dict[str, str], kept: dict[str, dict[str, torch.Tensor]]
) -> Image.Image:
    """Draw a picture, what was asked and answered, and the patches that each stage left.

    Args:
        image (3, H, W) float: the picture in [0, 1], drawn as a square.
        texts: what stands under the picture, heading -> text, as {"question": ..., "METEOR": ...}.
        kept: stage name -> {encoder: (h, w) bool}, True where the patch's token is there:
            `Answer.kept`.
    """
    picture = to_pillow(image)
    paragraphs = {heading: wrap(text, PICTURE, font(17)) for heading, text in texts.items()}
    figure = Image.new("RGB", figure_size(paragraphs, kept), "white")
    draw = ImageDraw.Draw(figure)
    large = picture.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    figure.paste(large, (MARGIN, MARGIN))
    draw_texts(draw, paragraphs)
    for row, (stage, maps) in enumerate(kept.items()):
        top = MARGIN + row * ROW
        total = sum(int(alive.sum()) for alive in maps.values())
        title = f"{TITLES.get(stage, stage)}: {total} tokens"
        draw.text((LEFT, top), title, font=font(16), fill=INK)
        for column, (name, alive) in enumerate(maps.items()):
            x, color = LEFT + column * (CELL + GAP), COLORS[column % len(COLORS)]
            draw_caption(draw, x, top + CAPTION_TOP, color, name, alive)
            figure.paste(patch_map(picture, alive, color), (x, top + CELL_TOP))
    return figure


def figure_size(paragraphs: dict[str, list[str]], kept: dict[str, dict]) -> tuple[int, int]:
    """(width, height) that holds the texts and the grid."""
    rows, columns = len(kept), max(len(maps) for maps in kept.values())
    grid_width = max(columns * (CELL + GAP) - GAP, TITLE_WIDTH)
    grid_height = rows * ROW - GAP
    text_height = sum(PARAGRAPH + LINE * len(lines) for lines in paragraphs.values())
    left_height = PICTURE + 2 * GAP + text_height + FOOT
    return LEFT + grid_width + MARGIN, 2 * MARGIN + max(grid_height, left_height)


def draw_texts(draw: ImageDraw.ImageDraw, paragraphs: dict[str, list[str]]) -> None:
    """The texts under the picture, and what the cells mean."""
    y = MARGIN + PICTURE + GAP
    for heading, lines in paragraphs.items():
        draw.text((MARGIN, y), heading, font=font(13), fill=GREY)
        for i, line in enumerate(lines):
            draw.text((MARGIN, y + HEADING + LINE * i), line, font=font(17), fill=INK)
        y += PARAGRAPH + LINE * len(lines)
    draw.text((MARGIN, y + GAP), LEGEND, font=font(13), fill=GREY)


def draw_caption(
    draw: ImageDraw.ImageDraw, x: int, y: int, color: str, name: str, alive: torch.Tensor
) -> None:
    """A square of the encoder's colour, its name and its counts, above a cell."""
    side, text_x = 11, x + 17
    draw.rectangle([x, y, x + side, y + side], fill=color)
    caption = f"{name}: {int(alive.sum())} of {alive.numel()}"
    fitting = fitting_font(caption, x + CELL - text_x)
    draw.text((text_x, y + 6), caption, font=fitting, fill=INK, anchor="lm")


# ------------------------------------------------------------------ one cell


def patch_map(picture: Image.Image, alive: torch.Tensor, color: str) -> Image.Image:
    """One cell, CELL x CELL: patches where alive (h, w) is True as they are and framed, the others
    grey.
    """
    picture = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
    h, w = alive.shape
    boxes = [patch_box(row, column, h, w) for row, column in alive.nonzero().tolist()]
    clear = Image.new("L", picture.size, 0)
    for box in boxes:
        ImageDraw.Draw(clear).rectangle(box, fill=255)
    cell = Image.composite(picture, faint(picture), clear)
    if CELL // max(h, w) >= 5:  # in smaller patches a frame would hide what it frames
        for box in boxes:
            ImageDraw.Draw(cell).rectangle(box, outline=color)
    return cell


def patch_box(row: int, column: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of one of h x w patches in a cell, both ends included."""
    left, top = column * CELL // w, row * CELL // h
    next_left, next_top = (column + 1) * CELL // w, (row + 1) * CELL // h
    return left, top, next_left - 1, next_top - 1


def faint(picture: Image.Image) -> Image.Image:
    """In mid grey, unlike dark and light paper: 0 to 255 become 110 to 152."""
    shades = [110 + value // 6 for value in range(256)]
    return ImageOps.grayscale(picture).point(shades).convert("RGB")


def to_pillow(image: torch.Tensor) -> Image.Image:
    """(3, H, W) float in [0, 1] -> an RGB picture."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


# ------------------------------------------------------------------ text


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def fitting_font(text: str, width: int) -> ImageFont.FreeTypeFont:
    """The largest size, 14 to 7, in which the text takes at most `width` pixels; 7 if none does."""
    for size in range(14, 7, -1):
        if font(size).getlength(text) <= width:
            return font(size)
    return font(7)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, and inside a word only where it alone is
    wider.
    """
    lines = [""]
    for word in text.split():
        *pieces, rest = broken(word, width, font)
        lines += pieces
        longer = f"{lines[-1]} {rest}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(rest)
    return [line for line in lines if line] or [""]


def broken(word: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A word in pieces of at most `width` pixels, but at least a letter each; the last one may have
    room for more.
    """
    pieces = []
    while len(word) > 1 and font.getlength(word) > width:
        length = len(word)
        while length > 1 and font.getlength(word[:length]) > width:
            length -= 1
        pieces.append(word[:length])
        word = word[length:]
    return [*pieces, word]

"""Which patches survive: one figure a question, drawn with Pillow alone (matplotlib is no dependency).

On the left the picture and the texts; on the right a grid: a row for each stage, a column for each encoder.
Patches whose token is still there are clear and framed in the encoder's colour, the others are grey.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

# One for each encoder, in order: Okabe and Ito's, which people of all kinds of colour vision tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
TITLES = {
    "stage1": "Stage 1, encoding",
    "stage2": "Stage 2, fusion",
    "stage3": "Stage 3, decoding (last LLM layer)",
}
CELL, PICTURE, TITLE, MARGIN, GAP = 168, 312, 350, 20, 14  # pixels; TITLE: room for a row's title
INK, GREY = "#1a1a1a", "#666666"


def survivor_figure(
    image: torch.Tensor, texts: dict[str, str], kept: dict[str, dict[str, torch.Tensor]]
) -> Image.Image:
    """Draw a picture, what was asked and answered, and the patches that each stage left.

    Args:
        image (3, H, W) float: the picture in [0, 1], drawn as a square.
        texts: what stands under the picture, heading -> text, as {"question": ..., "METEOR": ...}.
        kept: stage name -> {encoder: (h, w) bool}, True where the patch's token is there: `Answer.kept`.
    """
    picture = to_pillow(image)
    rows, columns = len(kept), max(map(len, kept.values()))
    left = MARGIN + PICTURE + 2 * GAP  # where the grid starts
    height = 26 + 24 + CELL + GAP  # of a row: title, captions, cells
    blocks = [(heading, wrap(text, PICTURE, font(17))) for heading, text in texts.items()]
    text_height = sum(26 + 22 * len(lines) for _, lines in blocks)
    size = (
        left + max(columns * (CELL + GAP) - GAP, TITLE) + MARGIN,
        2 * MARGIN + max(rows * height - GAP, PICTURE + 2 * GAP + text_height + 34),
    )
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)

    figure.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    y = MARGIN + PICTURE + GAP
    for heading, lines in blocks:
        draw.text((MARGIN, y), heading, font=font(13), fill=GREY)
        for i, line in enumerate(lines):
            draw.text((MARGIN, y + 16 + 22 * i), line, font=font(17), fill=INK)
        y += 26 + 22 * len(lines)
    draw.text(
        (MARGIN, y + GAP), "clear: token kept    grey: token dropped", font=font(13), fill=GREY
    )

    for row, (stage, maps) in enumerate(kept.items()):
        y, total = MARGIN + row * height, sum(int(m.sum()) for m in maps.values())
        draw.text((left, y), f"{TITLES.get(stage, stage)}: {total} tokens", font=font(16), fill=INK)
        for column, (name, alive) in enumerate(maps.items()):
            x, color = left + column * (CELL + GAP), COLORS[column % len(COLORS)]
            draw.rectangle([x, y + 30, x + 11, y + 41], fill=color)
            caption = f"{name}: {int(alive.sum())} of {alive.numel()}"
            fits = next(
                s for s in range(14, 0, -1) if s == 7 or font(s).getlength(caption) <= CELL - 17
            )
            draw.text((x + 17, y + 36), caption, font=font(fits), fill=INK, anchor="lm")
            figure.paste(patch_map(picture, alive, color), (x, y + 50))
    return figure


def patch_map(picture: Image.Image, alive: torch.Tensor, color: str) -> Image.Image:
    """One cell, CELL x CELL: patches where alive (h, w) is True as they are and framed, the others grey."""
    picture = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
    h, w = alive.shape
    boxes = [
        [c * CELL // w, r * CELL // h, (c + 1) * CELL // w - 1, (r + 1) * CELL // h - 1]
        for r, c in alive.nonzero().tolist()
    ]
    mask = Image.new("L", picture.size, 0)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    faint = ImageOps.grayscale(picture).point(
        lambda v: 110 + v // 6
    )  # mid grey, unlike dark and light paper
    cell = Image.composite(picture, faint.convert("RGB"), mask)
    if CELL // max(h, w) >= 5:  # in smaller patches a frame would hide what it frames
        for box in boxes:
            ImageDraw.Draw(cell).rectangle(box, outline=color)
    return cell


def to_pillow(image: torch.Tensor) -> Image.Image:
    """(3, H, W) float in [0, 1] -> an RGB picture."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, and inside a word only where it alone is wider."""
    lines = [""]
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            fits = next(
                n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width
            )
            lines, word = lines + [word[:fits]], word[fits:]
        longer = f"{lines[-1]} {word}".strip()
        lines = lines[:-1] + [longer] if font.getlength(longer) <= width else lines + [word]
    return [line for line in lines if line] or [""]

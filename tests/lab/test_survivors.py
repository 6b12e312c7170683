"""Figures: pixels of kept and dropped patches against the picture, captions against the counts."""

import pytest
import torch
from PIL import Image, ImageDraw

from meteor_mini.lab.survivors import (
    CELL,
    COLORS,
    font,
    patch_map,
    survivor_figure,
    to_pillow,
    wrap,
)


@pytest.fixture
def image():
    return torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def written(monkeypatch):
    """Every text that is drawn."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def noted(self, xy, text, *args, **kwargs):
        texts.append(text)
        draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return texts


def test_to_pillow_is_exact():
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    drawn = to_pillow(pixels.float() / 255)
    assert drawn.size == (7, 5) and drawn.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()


@pytest.mark.parametrize("h, w", [(12, 12), (3, 4), (7, 5)])
def test_kept_patches_are_clear_and_framed_the_others_grey(image, h, w):
    alive = torch.rand(h, w, generator=torch.Generator().manual_seed(1)) < 0.4
    picture = to_pillow(image)
    cell = patch_map(picture, alive, COLORS[0])
    clear = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
    for row in range(h):
        for column in range(w):
            left, top = column * CELL // w, row * CELL // h
            box = (left + 1, top + 1, (column + 1) * CELL // w - 1, (row + 1) * CELL // h - 1)
            inside = cell.crop(box)
            if alive[row, column]:
                assert inside.tobytes() == clear.crop(box).tobytes()
                red, green, blue = cell.getpixel((left, top))
                assert f"#{red:02X}{green:02X}{blue:02X}" == COLORS[0]
            else:
                bands = inside.split()
                assert bands[0].tobytes() == bands[1].tobytes() == bands[2].tobytes()
                low, high = bands[0].getextrema()
                assert 110 <= low <= high <= 153


def test_small_patches_have_no_frame(image):
    picture = to_pillow(image)
    cell = patch_map(picture, torch.ones(48, 48, dtype=torch.bool), COLORS[0])
    assert cell.tobytes() == picture.resize((CELL, CELL), Image.Resampling.BICUBIC).tobytes()


def test_captions_carry_the_counts_and_texts(image, written):
    kept = {
        stage: {
            "clip": torch.arange(144).view(12, 12) < n,
            "pix2struct": torch.arange(20).view(4, 5) < 3,
        }
        for stage, n in {"stage1": 50, "stage2": 20, "stage3": 0}.items()
    }
    before = {stage: {name: m.clone() for name, m in maps.items()} for stage, maps in kept.items()}
    figure = survivor_figure(image, {"question": "is there a red star ?", "METEOR": "yes"}, kept)
    assert figure.mode == "RGB" and figure.width > figure.height > 500
    assert {
        "question",
        "is there a red star ?",
        "METEOR",
        "yes",
        "Stage 1, encoding: 53 tokens",
        "Stage 3, decoding (last LLM layer): 3 tokens",
    } < set(written)
    assert [text for text in written if text.startswith("clip")] == [
        f"clip: {n} of 144" for n in (50, 20, 0)
    ]
    assert written.count("pix2struct: 3 of 20") == 3
    assert all(torch.equal(before[s][n], kept[s][n]) for s in kept for n in kept[s])


@pytest.mark.parametrize("encoders", [1, 4, 8])
def test_any_number_of_encoders_and_long_texts_stay_inside(image, written, encoders):
    maps = {
        f"an encoder with a name {e}": torch.ones(6, 6, dtype=torch.bool) for e in range(encoders)
    }
    kept = {stage: maps for stage in ("stage1", "stage2", "stage3")}
    figure = survivor_figure(
        image, {"question": "word " * 200, "answer": "x" * 300, "nothing": ""}, kept
    )
    white = ((255, 255),) * 3
    bottom = figure.crop((0, figure.height - 10, figure.width, figure.height))
    right = figure.crop((figure.width - 10, 0, figure.width, figure.height))
    assert bottom.getextrema() == right.getextrema() == white


def test_wrap_loses_nothing_and_fits():
    small = font(17)
    for text in (
        "short",
        "many words that do not fit into one line",
        "a " + "w" * 90 + " b",
        "",
        "i",
    ):
        lines = wrap(text, 120, small)
        assert all(small.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("one two", 1000, small) == ["one two"] and len(wrap("W", 1, small)) == 1

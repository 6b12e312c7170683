"""Tiled clips: seeded, and their answers true of the frames that were drawn."""

import numpy as np
import pytest

from meteor_mini.toy import clips, questions
from meteor_mini.toy import world as g


def test_clips_are_seeded_and_as_large_as_pictures():
    for kind in clips.CLIPS:
        image, *text = clips.make_clip(5, kind)
        again, *same_text = clips.make_clip(5, kind)
        assert np.array_equal(image, again) and text == same_text
        assert image.shape == (g.SIZE, g.SIZE, 3) and image.dtype == np.uint8
        assert not np.array_equal(image, clips.make_clip(6, kind)[0])


def test_a_color_is_asked_for_that_some_frame_has_or_none():
    answers = set()
    for index in range(40):
        image, question, answer = clips.make_clip(index, "colors")
        words = questions.split_words(question)
        assert question == f"is there a {words[3]} {words[4]}?"
        color = np.array(g.COLORS[words[3]])
        seen = False
        for row in range(2):
            for column in range(3):
                middle = image[row * g.CELL + 24, column * g.CELL + 32].astype(int)
                seen |= np.abs(middle - color).max() <= 19
        assert answer == ("yes" if seen else "no")
        answers.add(answer)
        assert all(word in questions.WORDS for word in words)
    assert answers == {"yes", "no"}


def test_a_counter_shows_its_digits_one_a_frame(monkeypatch):
    printed, text = [], g.ImageDraw.ImageDraw.text

    def noted(self, xy, characters, **options):
        if characters.isdigit():
            printed.append((int(xy[1]) // g.CELL, int(xy[0]) // g.CELL, characters))
        return text(self, xy, characters, **options)

    monkeypatch.setattr(g.ImageDraw.ImageDraw, "text", noted)
    for index in range(20):
        printed.clear()
        _, question, answer = clips.make_clip(index, "counter")
        first = int(answer[0])
        assert question == "what number is printed in the picture?"
        assert [int(digit) for digit in answer] == list(range(first, first + 4))
        assert printed == [(*divmod(frame, 3), digit) for frame, digit in enumerate(answer)]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        clips.make_clip(0, "movie")

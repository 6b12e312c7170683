"""docs/faq.md: its snippets run in order, in one namespace; what they print is what they show.

A comment that has a line to itself is a line of output. Run: pytest tests/test_faq.py
"""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny_models import vlm

import stage1_encode
from stage3_decode import AdaptivePruner

PAGE = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
SNIPPET = re.compile(r"^```py\n(.*?)^```$", flags=re.S | re.M)


def test_snippets_run_in_order_and_print_what_they_show(capsys, monkeypatch):
    families = dict(stage1_encode.FAMILIES)  # a snippet adds one, which other tests must not see
    monkeypatch.setattr(stage1_encode, "FAMILIES", families)
    names = {}
    for number, snippet in enumerate(SNIPPET.findall(PAGE)):
        exec(compile(snippet, f"faq.md, snippet {number}", "exec"), names)
        shown = re.findall(r"^# (.*)$", snippet, flags=re.M)
        assert capsys.readouterr().out.splitlines() == shown, f"snippet {number}"


def test_every_answer_has_a_snippet_that_checks_it():
    _, *sections = re.split(r"^## ", PAGE, flags=re.M)
    for section in sections:
        (snippet,) = SNIPPET.findall(section)
        assert re.search(r"^( *assert|#) ", snippet, flags=re.M), section


VIDEO = 4  # the placeholder token's id
GRID = (3, 8, 4)  # frames, rows and columns of patches; 2 x 2 patches make a token
FRAME = [VIDEO] * 8


def video_of(name):
    """The prompt and the inputs of a family for one video of three frames."""
    if name == "llava-onevision":  # 2 x 2 tokens a frame, and the video's end
        return [*[VIDEO] * 13], dict(pixel_values_videos=torch.randn(1, 3, 3, 32, 32))
    patches = torch.randn(math.prod(GRID), 3 * 2 * 8 * 8)
    inputs = dict(pixel_values_videos=patches, video_grid_thw=torch.tensor([GRID]))
    if name == "qwen3-vl":  # a timestamp before each frame
        return [token for time in (60, 61, 62) for token in (time, 90, *FRAME, 91)], inputs
    return [90, *FRAME * 3, 91], inputs


@pytest.mark.parametrize("name", ["llava-onevision", "qwen2.5-vl", "qwen3-vl"])
def test_a_video_is_pruned_by_its_own_placeholders(name):
    model = vlm(name)[0]
    model.config.video_token_id = VIDEO
    torch.manual_seed(0)
    video, inputs = video_of(name)
    ids = torch.tensor([[1, 5, *video, 7, 8, 9]])
    visual = ids == VIDEO
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if name != "llava-onevision":
        inputs["mm_token_type_ids"] = 2 * visual.int()
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = model.generate(**inputs, **options)
    with AdaptivePruner(model, visual, lam=math.inf):
        assert torch.equal(model.generate(**inputs, **options), alone)
    with AdaptivePruner(model, visual, lam=2) as pruner:
        model.generate(**inputs, **options)
    assert 0 < pruner.counts[5] < visual.sum()

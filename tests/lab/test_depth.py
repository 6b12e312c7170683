"""What the two criteria say by depth: they must be those by which stage 1 decides."""

import pytest
import torch

from meteor_mini import load
from meteor_mini.lab.depth import criteria_by_block
from stage1_encode import EncoderPruner, highest


@pytest.fixture(scope="module")
def model():
    return load("glyph")


@pytest.mark.parametrize("name", ["clip", "eva", "pix2struct"])
@torch.no_grad()
def test_stage_1_keeps_what_the_criterion_says_in_the_block_where_it_prunes(model, name):
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    pixels = dict(zip(model.encoders, model.pixels(images)))[name]
    encoder = model.encoders[name]
    scores = criteria_by_block(encoder, pixels)
    assert len(scores["similarity"]) == len(scores["attention"]) == 6
    for criterion, sign in (("similarity", -1), ("attention", 1)):
        for b, block in enumerate((1, 3, 5)):
            keep = [None, None, None]
            keep[b] = 40
            with EncoderPruner(encoder, keep, (criterion,) * 3) as pruner:
                encoder(pixels)
            assert torch.equal(pruner.keep_idx, highest(sign * scores[criterion][block], 40))
    assert not any(module._forward_hooks for module in encoder.modules())

"""The encoders' losses against loops, and what the readers of a caption can know."""

import math

import numpy as np
import pytest
import torch

import stage1_encode
from meteor_mini.pictures import view_of
from meteor_mini.toy import schooling, world
from meteor_mini.toy.parts import ENCODERS
from meteor_mini.weights import build_encoder


def some_words(*shape):
    torch.manual_seed(0)
    words = [torch.randint(size, shape) for size in schooling.SLOT_SIZES]
    return torch.stack(words, dim=-1)


def pixels_of(name, batch=2):
    torch.manual_seed(1)
    encoder = build_encoder(name, ENCODERS[name])
    return encoder, view_of(encoder)(torch.rand(batch, 3, world.SIZE, world.SIZE))


def test_a_projector_passes_on_only_what_its_encoder_learned():
    for name, passed_on in schooling.TOLD_SLOTS.items():
        assert (passed_on <= schooling.LEARNED_SLOTS[name]).all()


@pytest.mark.parametrize("table, slots", [("SCHOOLING", "LEARNED_SLOTS"), ("TOLD", "TOLD_SLOTS")])
def test_an_encoder_has_its_slots_of_its_things_and_nothing_else(table, slots):
    for name, subjects in getattr(schooling, table).items():
        for thing in world.SLOTS["what"]:
            words = torch.ones(len(world.SLOTS), dtype=torch.int64)
            words[0] = 1 + world.SLOTS["what"].index(thing)
            found = schooling.select_words(words, getattr(schooling, slots)[name])
            expected = set()
            for things, names in subjects:
                if thing in things:
                    expected |= set(names.split())
            assert {slot for slot, word in zip(world.SLOTS, found) if word} == expected


@pytest.mark.parametrize("blank", [0.0, 0.3])
def test_word_loss_equals_a_loop_over_patches_and_slots(blank):
    words = some_words(2, 3)
    torch.manual_seed(2)
    scores, losses = torch.randn(2, 3, sum(schooling.SLOT_SIZES)), []
    for slot, size in enumerate(schooling.SLOT_SIZES):
        start, total, mass = sum(schooling.SLOT_SIZES[:slot]), 0.0, 0.0
        for b in range(2):
            for n in range(3):
                word = words[b, n, slot].item()
                row, weight = scores[b, n, start : start + size], 1.0 if word else blank
                total, mass = total - weight * row.log_softmax(0)[word].item(), mass + weight
        if words[..., slot].any():
            losses.append(total / mass)
    got = schooling.word_loss(scores, words, blank)
    assert got.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_captions_equal_a_loop_over_cells():
    words = some_words(2, world.GRID**2)
    got = schooling.caption_of(words)
    grid, starts = (
        words.view(2, 12, 12, -1),
        np.cumsum([0, *(len(w) for w in world.SLOTS.values())]),
    )
    expected = torch.zeros_like(got)
    for b in range(2):
        for y in range(12):
            for x in range(12):
                for slot, word in enumerate(grid[b, y, x].tolist()):
                    if word:
                        expected[b, y // 4 * 3 + x // 4, starts[slot] + word - 1] = 1
    assert torch.equal(got, expected)


def test_caption_loss_of_no_opinion_is_that_of_a_coin():
    words = some_words(2, world.GRID**2)
    scores = torch.zeros_like(schooling.caption_of(words)).flatten(1)
    assert schooling.caption_loss(scores, words).item() == pytest.approx(20 * math.log(2))


def test_coarse_looks_are_the_patch_in_four_by_four_pixels():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 96, 96)
    got = schooling.coarsen(images)[0, 13].view(3, 4, 4)  # row 1, column 1
    patch = images[0, :, 8:16, 8:16]
    expected = patch.view(3, 4, 2, 4, 2).mean(dim=(2, 4))
    torch.testing.assert_close(got, (expected - 0.5) / 0.25)


def random_patches(encoder, K):
    """A pruner that keeps K patches at random after the first block."""
    blocks = stage1_encode.EncoderPruner(encoder, [None]).blocks
    return schooling.RandomPatches(encoder, [K, *[None] * (len(blocks) - 1)])


def test_patch_dropout_keeps_patches_at_random():
    encoder, pixels = pixels_of("clip", batch=8)
    with random_patches(encoder, 10) as pruner, torch.no_grad():
        torch.manual_seed(0)
        encoder(pixels)
    assert pruner.keep_idx.shape == (8, 10)
    assert len({tuple(kept) for kept in pruner.keep_idx.tolist()}) == 8


IN_PARTS = [name for name in ENCODERS if name != "convnext"]  # that can be pruned inside


@pytest.mark.parametrize("name", IN_PARTS)
def test_patches_are_the_librarys_own_where_nothing_is_dropped(name):
    encoder, pixels = pixels_of(name)
    pruner = stage1_encode.EncoderPruner(encoder.eval(), [None])
    blank = torch.ones(2, world.GRID**2, dtype=torch.bool)
    with torch.no_grad():
        _, patches, kept = schooling.run_encoder(pruner, pixels, blank, None)
        expected, _ = stage1_encode.encode(encoder, pixels)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, torch.arange(144).expand(2, -1))


@pytest.mark.parametrize("name", IN_PARTS)
def test_gradients_reach_the_blocks_and_no_hook_stays(name):
    encoder, pixels = pixels_of(name)
    pruner = random_patches(encoder.train(), 40)
    blank = torch.ones(2, world.GRID**2, dtype=torch.bool)
    reader, patches, _ = schooling.run_encoder(pruner, pixels, blank, 4)
    (reader.sum() + (patches**2).sum()).backward()
    assert all(p.grad is not None for p in pruner.blocks.parameters())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in encoder.modules()]
    assert not any(after or before for after, before in hooks)


@pytest.mark.parametrize("name", ["clip", "pix2struct"])
def test_late_readers_forget_what_they_read_before(name):
    """At the late block the readers are as at the first, and the other patches as without that."""
    encoder, pixels = pixels_of(name)
    encoder.eval()
    pruner = stage1_encode.EncoderPruner(encoder, [None])
    blank = torch.zeros(2, world.GRID**2, dtype=torch.bool)
    blank[:, :20] = True
    at_first, at_late = [], []
    first = pruner.blocks[0].register_forward_pre_hook(lambda _, args: at_first.append(args[0]))
    late = pruner.blocks[4].register_forward_hook(lambda _, args, out: at_late.append(args[0]))
    with torch.no_grad():
        schooling.run_encoder(pruner, pixels, blank, 4)
        schooling.run_encoder(pruner, pixels, blank, None)
    first.remove()
    late.remove()
    readers, others = slice(0, pruner.prefix + 20), slice(pruner.prefix + 20, None)
    assert torch.equal(at_late[0][:, readers], at_first[0][:, readers])
    torch.testing.assert_close(at_late[0][:, others], at_late[1][:, others])
    assert not torch.allclose(at_late[0][:, readers], at_late[1][:, readers])

"""What the two criteria say by depth: they must be those by which stage 1 decides; and what they
keep of the asked patches, by hand.
"""

import numpy as np
import pytest
import torch

from meteor_mini import load
from meteor_mini.baselines import AttentionPruner
from meteor_mini.toy.evaluate import Example, batches, images_and_questions
from meteor_mini.toy.world import SIZE, SLOTS, Picture
from meteor_mini.lab import depth, markdown
from meteor_mini.lab.depth import criteria_by_block
from stage1_encode import EncoderPruner, highest, mean_similarity


@pytest.fixture(scope="module")
def model():
    return load("toy")


class SimilarityPruner(EncoderPruner):
    """Similarity to the mean alone decides, in every part."""

    def score(self, part, tokens, attention):
        return -mean_similarity(tokens)


@pytest.mark.parametrize("name", ["clip", "eva", "pix2struct"])
@torch.no_grad()
def test_stage_1_keeps_what_the_criterion_says_in_the_block_where_it_prunes(model, name):
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pixels = dict(zip(model.encoders, model.pixels(images)))[name]
    encoder = model.encoders[name]
    scores = criteria_by_block(encoder, pixels)
    assert len(scores["similarity"]) == len(scores["attention"]) == 6
    rules = {"similarity": (SimilarityPruner, -1), "attention": (AttentionPruner, 1)}
    for criterion, (rule, sign) in rules.items():
        for b, block in enumerate((1, 3, 5)):
            keep = [None, None, None]
            keep[b] = 40
            with rule(encoder, keep) as pruner:
                encoder(pixels)
            assert torch.equal(pruner.keep_idx, highest(sign * scores[criterion][block], 40))
    assert not any(module._forward_hooks for module in encoder.modules())


def example_with(asked_what, other_what="cross"):
    """An example whose first patches show some words, of which all but the last are asked."""
    words = np.zeros((144, len(SLOTS)), np.int64)
    for place, word in enumerate([*asked_what, other_what]):
        words[place, 0] = 1 + SLOTS["what"].index(word)
    asked = np.zeros(144, bool)
    asked[: len(asked_what)] = True
    picture = Picture(None, words, "scene", {})
    return Example("label", picture, "?", "!", asked)


def test_which_patches_count_for_an_encoder():
    example = example_with(["circle", "circle", "label", "label"])
    for name in ("clip", "eva", "pix2struct"):
        assert np.array_equal(depth.counted_patches(example, name, "asked"), example.asked)
    for name, expected in {"clip": [0, 1], "eva": [0, 1], "pix2struct": [0, 1, 2, 3]}.items():
        counted = depth.counted_patches(example, name, "asked and told")
        assert counted.nonzero()[0].tolist() == expected
    number = example_with(["number"])
    assert not depth.counted_patches(number, "clip", "asked and told").any()


def test_shares_kept_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.1, 0.2, 0.3, 0.4]])
    attention = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.1, 0.1, 0.1, 0.1]])
    assert depth.kept_by("similarity", similarity, 2).tolist() == [
        [False, True, False, True],
        [True, True, False, False],
    ]
    assert depth.kept_by("attention", attention, 2).tolist() == [
        [True, False, True, False],
        [True, True, False, False],  # ties go to the lower index
    ]
    counted = torch.tensor([[True, True, False, True], [False, False, False, False]])
    scores = {"similarity": [similarity], "attention": [attention]}
    shares = depth.kept_shares(scores, counted, 2)
    assert shares["similarity"][0][0] == pytest.approx(2 / 3)
    assert shares["attention"][0][0] == pytest.approx(1 / 3)
    assert np.isnan(shares["similarity"][0][1])


def test_the_thirds_are_stage_1s():
    assert list(depth.blocks_of("first third", 6)) == [0, 1]
    assert list(depth.blocks_of("last third", 6)) == [4, 5]
    assert list(depth.blocks_of("first third", 24)) == list(range(8))
    assert list(depth.blocks_of("last third", 24)) == list(range(16, 24))


def test_means_are_over_the_encoders_that_a_question_counts_for():
    nan = np.nan
    shares = [np.array([0.2, nan, nan]), np.array([0.4, 0.6, nan])]
    assert depth.mean_of_counted(shares) == pytest.approx([0.3, 0.6, nan], nan_ok=True)
    assert depth.percent(np.array([0.5, nan, 1.0])) == 75
    row = depth.compared(np.array([0.5, nan, 1.0]), np.array([0.5, nan, 0.5]))
    assert (row["questions"], row["similarity"], row["attention"]) == (2, 75, 50)
    assert row["difference"][0] == 25


@torch.no_grad()
def test_findings_by_loops(model):
    """Every share counted patch by patch, on twelve questions."""
    found = depth.findings(model, 12, "val")
    assert found.kept == 144 // 4 and len(found.family) == 12
    examples = next(batches("val", 12))
    images, _ = images_and_questions(examples)
    pixels = dict(zip(model.encoders, model.pixels(images)))
    names = ["clip", "eva", "pix2struct"]
    scores = {name: criteria_by_block(model.encoders[name], pixels[name]) for name in names}
    for b, example in enumerate(examples):
        asked = [place for place in range(144) if example.asked[place]]
        for third, blocks in {"first third": (0, 1), "last third": (4, 5)}.items():
            for criterion in depth.CRITERIA:
                shares = []
                for name in names:
                    for block in blocks:
                        score = scores[name][criterion][block][b].tolist()
                        sign = 1 if criterion == "similarity" else -1
                        order = sorted(range(144), key=lambda i, s=score: (sign * s[i], i))
                        kept = set(order[: found.kept])
                        shares.append(sum(i in kept for i in asked) / len(asked) if asked else 0)
                value = found.values[depth.share_label(criterion, third, "asked")][b]
                if asked:
                    assert value == pytest.approx(np.mean(shares), abs=1e-6)
                else:
                    assert np.isnan(value)
    mean = next(r for r in found.rows if r["encoder"] == depth.MEAN and r["patches"] == "asked")
    counted = found.values["similarity, first third, asked"]
    assert mean["similarity"] == pytest.approx(100 * np.nanmean(counted))
    assert mean["questions"] == sum(example.asked.any() for example in examples)
    text = "\n".join(
        markdown.depth_grids({"kept": found.kept, "shares": found.rows, "blocks": found.blocks})
    )
    assert "mean over encoders" in text and "block 5" in text

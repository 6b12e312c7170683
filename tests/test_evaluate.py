"""Accuracy and recall against counting by hand."""
import pytest
import torch

from meteor_mini import Budget, glyphworld, load
from meteor_mini.evaluate import GROUPS, accuracy, batches, recall, to_images


@pytest.fixture(scope="module")
def model():
    return load("glyph")


def test_families_come_in_turn_and_examples_do_not_depend_on_the_batch():
    small = [e for part in batches("val", 20, batch=3) for e in part]
    large = [e for part in batches("val", 20, batch=50) for e in part]
    assert [e[0] for e in small] == [list(glyphworld.FAMILIES)[i % 8] for i in range(20)]
    assert [e[2:] for e in small] == [e[2:] for e in large]


def test_accuracy_is_the_share_of_exact_answers(model):
    result = accuracy(model, model.budget, "val", samples=24)
    right = tokens = 0
    for family, picture, question, truth in next(batches("val", 24)):
        answer = model.answer(to_images([picture.image]), [question])[0]
        right, tokens = right + (answer.text == truth), tokens + answer.tokens["stage3"]
    assert result["accuracy"] == pytest.approx(100 * right / 24)
    assert result["average_tokens"] == pytest.approx(tokens / 24, rel=1e-4)
    assert set(result["families"]) == set(glyphworld.FAMILIES) and sum(result["right"]) == right


def test_unpruned_keeps_every_token(model):
    assert accuracy(model, Budget.none(), "val", samples=8)["average_tokens"] == 576


def test_recall_of_keep_all_is_everything_and_never_rises(model):
    everything = recall(model, Budget.none(), samples=16)
    assert all(v in (0, 100) for maps in everything.values() for groups in maps.values() for v in groups.values())
    table = recall(model, model.budget, samples=16)
    for name in model.encoders:
        for group in GROUPS:
            assert 100 >= table["stage1"][name][group] >= table["stage2"][name][group] >= table["stage3"][name][group] >= 0


def test_pictures_become_images_in_zero_to_one():
    images = to_images([glyphworld.make_picture(0).image])
    assert images.shape == (1, 3, 96, 96) and images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1

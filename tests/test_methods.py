"""methods.py: what a row's tokens are, what they cost, how its answers are compared."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_model

import stage1_encode
from meteor_mini import Budget, baselines, evaluate, methods
from meteor_mini.evaluate import difference, families_by_kind, mean
from meteor_mini.toy.questions import QUESTION_FAMILIES, example_batches, images_and_questions

KINDS = list(families_by_kind())

pytestmark = pytest.mark.usefixtures("one_word")


@pytest.fixture(scope="module")
def batch():
    (examples,) = example_batches("val", 2)
    return images_and_questions(examples)


def test_lambda_is_solved_for_an_average(untrained, monkeypatch):
    monkeypatch.setattr(methods, "LAMBDA_QUESTIONS", 4)
    encode = methods.stages(168, 80)
    lam = methods.solve_for_average(untrained, encode, 30, untrained.budget)
    examples = next(example_batches("val", 4, first=50_000))
    images, questions = images_and_questions(examples)
    pruner = methods.adaptive_pruner(untrained.budget, lam)
    answers = untrained.answer(encode(untrained, images), questions, Budget.keep_all(), pruner)
    assert np.mean([answer.tokens["stage3"] for answer in answers]) == pytest.approx(30, abs=0.2)


@torch.no_grad()
@pytest.mark.parametrize("fusion", [name for name in baselines.FUSIONS if name != "random"])
def test_a_row_fuses_what_stage_1_leaves(untrained, batch, fusion):
    images, _ = batch
    got = methods.stages(100, 40, fusion=fusion)(untrained, images).fused
    encoders, pixels = list(untrained.encoders.values()), untrained.pixels(images)
    features, kept = stage1_encode.encode_all(encoders, pixels, 100, untrained.ranks)
    want = untrained.fuse(features, kept, 40, baselines.FUSIONS[fusion]).fused
    assert torch.equal(got.keep_idx, want.keep_idx)
    torch.testing.assert_close(got.tokens, want.tokens)


def test_flops_count_a_row_whole_and_prumerges_encoders_once(untrained):
    names = list(untrained.encoders)
    stage1_encode.COUNTS.clear()  # as if it had seen none of the encoders
    full = methods.encoding_flops(untrained, methods.Row("", methods.stages()))
    assert methods.encoding_flops(untrained, methods.Row("", methods.stages())) == full
    half = methods.encoding_flops(untrained, methods.Row("", methods.stages(168)))
    assert 0.3 * full < half < 0.9 * full
    merged = methods.encoding_flops(untrained, methods.prumerge_row(names, 48))
    assert 0.8 * full < merged < 1.05 * full


def test_eagle_is_there_where_its_weights_are(untrained, batch, tmp_path, monkeypatch):
    assert methods.eagle_rows(untrained, "unpruned") == []
    fusion = baselines.channel_fusion(untrained)
    save_model(fusion, str(tmp_path / "eagle.safetensors"))
    monkeypatch.setattr(untrained, "folder", tmp_path)
    (row,) = methods.eagle_rows(untrained, "unpruned")
    with torch.no_grad():
        got = row.encode(untrained, batch[0]).fused.tokens
        want = baselines.encode_channels(untrained, fusion, batch[0]).fused.tokens
    torch.testing.assert_close(got, want)
    assert row.answer(untrained, *batch)[0].tokens["stage3"] == 144


def test_seeds_choose_differently_and_always_the_same(untrained, batch):
    row, chosen = methods.Row("", methods.stages(60, 30, fusion="random"), random=True), []

    def answer(model, images, questions):
        encoded = row.encode(model, images)
        chosen.append(encoded.fused.keep_idx)
        return model.answer(encoded, questions, Budget.keep_all())

    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    for seed in (7, 7, 8):
        evaluate.ask(untrained, answer, "val", 2, seed=seed)
    assert torch.equal(torch.rand(1), undisturbed)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_lines_are_of_the_questions_of_their_kind():
    family = list(QUESTION_FAMILIES) * 2
    answers = pd.DataFrame({"family": family, "right": [True] * 12 + [False] * 12})
    answers = answers.assign(tokens=np.arange(24.0), flops=np.arange(24.0) * 10)
    other = answers.assign(right=[name == "tag" for name in family])
    lines = {line["family"]: line for line in methods.compare_answers(answers, other)}
    assert list(lines) == KINDS
    assert lines["all"]["accuracy"] == 50 and lines["tag"]["difference"] == -50
    assert (lines["presence"]["tokens"], lines["presence"]["flops"]) == (6, 60)
    general = answers["family"].isin(families_by_kind()["General"])
    right = 100 * answers["right"][general]
    assert tuple(lines["General"][key] for key in ("accuracy", "low", "high")) == mean(right)
    gain = difference(right, 100 * other["right"][general])
    names = ("difference", "difference_low", "difference_high")
    assert tuple(lines["General"][key] for key in names) == gain

"""The findings against counting by hand: criteria by depth, who survives, CUR, heads; and each of
them from the measuring to the page.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from meteor_mini import Budget, findings, page
from meteor_mini.evaluate import ratio
from meteor_mini.toy.questions import (
    QUESTION_FAMILIES,
    example_batches,
    images_and_questions,
    to_images,
)
from meteor_mini.toy.world import make_picture

pytestmark = pytest.mark.usefixtures("one_word")


# ------------------------------------------------------------------------------------ who survives


@pytest.fixture(scope="module")
def answered(untrained):
    """Two questions of each family, answered once for the tests of this part."""
    examples = next(example_batches("test", 24))
    answers = untrained.answer(*images_and_questions(examples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(untrained), "answer", lambda *_: answers)
        return examples, answers, findings.measure(untrained, "figure1", 24)


def test_figure_1_counts_survivors_and_tokens(answered):
    examples, answers, measured = answered
    frame = measured.set_index(["criterion", "encoder", "kind"])
    tags = [answer for answer, e in zip(answers, examples) if e.family == "tag"]
    for stage in ("stage1", "stage2", "stage3"):
        count = np.mean([answer.survivors[stage]["eva"] for answer in tags])
        assert frame.loc[stage, "eva", "tag"]["value"] == pytest.approx(count)
    frame = measured.set_index(["criterion", "kind"])
    general = [QUESTION_FAMILIES[example.family].group == "General" for example in examples]
    late = np.array([np.mean(answer.layers[1:]) for answer in answers])
    assert [answer.layers[0] for answer in answers] == [80] * 24  # nothing is pruned before layer 1
    got = frame.loc["tokens per layer from the first pruned one on", "OCR & Chart / General"]
    want = ratio(late[~np.array(general)], late[general], paired=False)
    assert tuple(got[["value", "low", "high"]]) == pytest.approx(want)


def test_diversity_is_one_where_all_tokens_differ_and_low_where_all_are_alike():
    tokens = torch.stack([torch.eye(4), torch.ones(4, 4)])
    assert findings.nuclear_diversity(tokens).tolist() == pytest.approx([1, math.sqrt(4) / 4])


@torch.no_grad()
def test_similarity_is_the_cosine_to_own_tokens_and_to_those_of_others(untrained):
    frame = findings.measure(untrained, "similarity", 2).set_index(["criterion", "encoder"])
    images = to_images([make_picture(i, "val").image for i in range(2)])
    fused = untrained.encode(images, Budget.keep_all()).fused
    clip = [tokens[encoder == 0] for tokens, encoder in zip(fused.tokens, fused.encoder_id)]
    others = [tokens[encoder != 0] for tokens, encoder in zip(fused.tokens, fused.encoder_id)]
    within, nearest, across, nearest_across = [], [], [], []
    for own, theirs in zip(clip, others):
        for i, token in enumerate(own):
            to_own = F.cosine_similarity(token, torch.cat([own[:i], own[i + 1 :]]), dim=-1)
            within.append(to_own.mean())
            nearest.append(to_own.max())
            to_others = F.cosine_similarity(token, theirs, dim=-1)
            across.append(to_others.mean())
            nearest_across.append(to_others.max())
    for criterion, values in {
        "mean cosine within the encoder": within,
        "highest cosine within the encoder": nearest,
        "mean cosine to the others": across,
        "highest cosine to the others": nearest_across,
    }.items():
        expected = torch.stack(values).mean().item()
        assert frame.loc[(criterion, "clip"), "value"] == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------- what each encoder is worth


def test_redundancy_by_hand(untrained, monkeypatch):
    """A model that reads with Pix2Struct alone, and sees with CLIP and EVA, one of them enough."""

    def by_subset(model, subsets, examples):
        right = {}
        for subset in subsets:
            right[subset] = []
            for example in examples:
                reads = QUESTION_FAMILIES[example.family].group == "OCR & Chart"
                enough = "pix2struct" in subset if reads else bool(subset & {"clip", "eva"})
                right[subset].append(enough)
        return right

    monkeypatch.setattr(findings, "by_subset", by_subset)
    frame = findings.measure(untrained, "redundancy", 24).set_index(
        ["criterion", "encoder", "kind"]
    )
    assert frame.loc["accuracy", "clip+convnext+eva", "all"]["value"] == pytest.approx(100 * 5 / 12)
    cur = frame.loc["CUR"]["value"]
    assert cur["pix2struct", "OCR & Chart"] == 1 and cur["clip", "General"] == 0
    assert cur["pix2struct", "all"] == pytest.approx(7 / 12)
    line = frame.loc["CUR", "pix2struct", "all"]
    assert line["low"] < line["value"] < line["high"]
    lost = frame.loc["points lost without it", "pix2struct", "all"]
    assert lost["value"] == pytest.approx(100 * 7 / 12)
    assert lost["low"] == pytest.approx(100 * line["low"])  # of 100 %, the same
    gaps = frame.loc["information gap"]["value"].droplevel("encoder")
    assert gaps["OCR & Chart"] == 1 and gaps["General"] == 0
    assert len(frame.loc["accuracy"]) == 5 * (3 + 12 + 1)


@torch.no_grad()
def test_masked_encoders_give_zeros(untrained, monkeypatch):
    fused = []
    monkeypatch.setattr(type(untrained), "generate", lambda *_: (torch.zeros(1, 1).long(), None))
    monkeypatch.setattr(type(untrained), "fuse", lambda _, features, *more: fused.append(features))
    examples = next(example_batches("test", 1))
    names = list(untrained.encoders)
    subsets = [frozenset(names), *(frozenset(names) - {name} for name in names)]
    right = findings.by_subset(untrained, subsets, examples)
    assert right == {subset: [False] for subset in subsets}
    for subset, features in zip(subsets, fused):
        for name, x in zip(untrained.encoders, features):
            assert (x.abs().sum() > 0) == (name in subset)


# ----------------------------------------------------------------------- from measuring to the page


@pytest.mark.parametrize("name", findings.FINDINGS)
def test_every_finding_comes_to_the_page(untrained, answered, name, tmp_path, monkeypatch):
    def by_subset(model, subsets, examples):
        return {subset: [len(subset) > 1] * len(examples) for subset in subsets}

    monkeypatch.setattr(findings, "by_subset", by_subset)  # the model itself takes long
    frame = answered[-1] if name == "figure1" else findings.measure(untrained, name, 3)
    assert list(frame.columns) == findings.FIELDS and set(frame["finding"]) == {name}
    assert not frame.duplicated(["encoder", "layer", "criterion", "kind"]).any()
    page.save(tmp_path, name, frame)
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"## {page.title_of(name)}" in text and (tmp_path / f"{name}.png").exists()
    drawn = set(page.FIGURES[name][0]) - {"accuracy, EAGLE-style"}  # this model has no such fusion
    assert drawn <= set(frame["criterion"])


def test_lines_that_fill_the_same_fields_are_one_table():
    lines = [
        ("VAV", "", "", 0),
        ("VAV", "", "", 1),
        ("CUR", "eva", "all", ""),
        ("CUR", "eva", "tag", ""),
    ]
    frame = pd.DataFrame(lines, columns=["criterion", "encoder", "kind", "layer"]).replace("", None)
    frame = frame.assign(value=[1.0, 2.0, 3.0, 4.0], low=[math.nan, 1.5, 2.0, 3.0], high=5.0)
    by_layer, by_kind = page.finding_tables(frame)
    assert by_layer.columns.tolist() == [0, 1] and by_layer.loc["VAV"].tolist() == [
        "1",
        "2 [1.5, 5]",
    ]
    assert by_kind.loc["eva", "CUR"].to_dict() == {"all": "3 [2, 5]"}  # without single families


# ------------------------------------------------------------------ heads that look at the picture


@torch.no_grad()
def test_attention_of_heads_is_the_librarys(untrained):
    frame = findings.measure(untrained, "heads", 3)
    (examples,) = findings.example_batches("test", 3)
    images, questions = images_and_questions(examples)
    encoded = untrained.encode(images)
    embeds, mask, visual = untrained.prompt(encoded, questions)
    decoder = untrained.decoder
    decoder.set_attn_implementation("eager")
    layers = decoder(
        inputs_embeds=embeds, attention_mask=mask, output_attentions=True
    ).attentions  # (B, H, S, S) each
    decoder.set_attn_implementation("sdpa")

    values = torch.zeros(len(layers), 3, decoder.config.num_attention_heads)
    for i, weights in enumerate(layers):
        for b in range(3):
            end = int(visual[b].nonzero().max()) + 1
            values[i, b] = weights[b, :, end:, visual[b]].sum(dim=-1).mean(dim=-1)
    of_heads = frame[frame["kind"].isna()].set_index(["criterion", "layer"])["value"]
    for i in range(len(layers) - 1):
        mean_of_heads = values[i].mean(dim=0)
        assert of_heads["lowest head", i] == pytest.approx(mean_of_heads.min().item(), rel=1e-4)
        assert of_heads["highest head", i] == pytest.approx(mean_of_heads.max().item(), rel=1e-4)
    top = frame[frame["kind"] == "all"].set_index("layer")["value"]
    for i, value in top.items():
        expected = values[i].topk(untrained.budget.k, dim=-1).values.sum(dim=-1).mean().item()
        assert value == pytest.approx(expected, rel=1e-4)

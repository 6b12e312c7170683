"""The two losses on attention against loops, and the attention against eager attention."""

import numpy as np
import pytest
import torch

from meteor_mini.budgets import Budget
from meteor_mini.finetune import answer_loss, pack
from meteor_mini.toy import attention_losses as al
from meteor_mini.toy import questions, schooling, train, world
from meteor_mini.toy.dialogues import make_dialogue


@pytest.fixture(scope="module")
def model():
    return train.build_model(layers=2)


@torch.no_grad()
def test_recorded_attention_is_that_of_eager_attention(model):
    torch.manual_seed(0)
    visual, P = torch.randn(2, 3, model.decoder.config.hidden_size), len(model.before_ids)
    dialogues = [[("is there", "yes")], [("red", "42")]]  # five tokens each, with <ans> and <eos>
    expected = answer_loss(model, visual, dialogues)["loss"]
    with al.record_attention(model, K=3) as attention:
        loss = answer_loss(model, visual, dialogues)["loss"]
    assert model.decoder.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loss, expected)
    embeds = pack(model, visual, dialogues)[0]
    model.decoder.set_attn_implementation("eager")
    try:
        weights = model.decoder.model(inputs_embeds=embeds, output_attentions=True).attentions
    finally:
        model.decoder.set_attn_implementation("sdpa")
    assert len(attention) == len(weights) == model.decoder.config.num_hidden_layers
    for got, weight in zip(attention, weights):  # (B, H, T, K); (B, H, S, S)
        torch.testing.assert_close(got, weight[:, :, P + 3 :, P : P + 3])


def test_both_losses_equal_loops():
    torch.manual_seed(0)
    B, H, T, K = 2, 2, 5, 4
    attention = [torch.rand(B, H, T, K) / K for _ in range(8)]
    question_of_token = torch.tensor([[1, 1, 0, 2, 0], [1, 0, 0, 0, 0]])
    picture, question = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1])
    tokens = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    looking, aside = [], []
    for layer, weights in enumerate(attention):
        for b in range(B):
            for h in range(H):
                looking += weights[b, h].sum(dim=-1).tolist()
        if layer not in al.TAUGHT_LAYERS:
            continue
        for b, n, shown in zip(picture, question, tokens):
            on_target = on_picture = 0.0
            for h in range(H):
                for t in range(T):
                    if question_of_token[b, t] == n:
                        on_picture += weights[b, h, t].sum().item()
                        on_target += weights[b, h, t][shown].sum().item()
            aside.append(-np.log(on_target / on_picture + 1e-3))
    targets = al.Targets(picture, question, tokens)
    got = al.aside_loss(attention, targets, question_of_token)
    assert got.item() == pytest.approx(np.mean(aside), rel=1e-5)
    assert al.looking_loss(attention).item() == pytest.approx(np.mean(looking), rel=1e-5)
    nothing = al.Targets(picture[:0], question[:0], tokens[:0])
    assert al.aside_loss(attention, nothing, question_of_token).item() == 0


def test_targets_show_the_object_and_are_of_encoders_that_know_what_is_needed(model):
    pictures = [world.make_picture(i) for i in range(6)]
    rng = np.random.default_rng(0)
    asked = [make_dialogue(picture, rng) for picture in pictures]
    images = questions.to_images([picture.image for picture in pictures])
    model.config["ranks"] = [[1.0] * len(model.encoders)] * 3
    encoded = model.encode(images, Budget(stage1=200, stage2=60))
    expected = []
    for b, of_picture in enumerate(asked):
        after_stage1 = []  # the encoder and the patch of each token
        for name, idx in zip(schooling.TOLD, encoded.stage1_idx):
            after_stage1 += [(name, patch) for patch in idx[b].tolist()]
        in_llm = [after_stage1[i] for i in encoded.fused.keep_idx[b].tolist()]
        for number, question in enumerate(of_picture, 1):
            for thing in question.about:
                shown = questions.asked_patches(pictures[b], question._replace(about=[thing]))
                tokens = []
                for name, patch in in_llm:
                    words = torch.from_numpy(pictures[b].patch_words[patch])
                    passed_on = schooling.select_words(words, schooling.TOLD_SLOTS[name]).tolist()
                    needed = [s for s, slot in enumerate(world.SLOTS) if slot in thing and s > 0]
                    knows = any(passed_on) and all(passed_on[s] for s in needed)
                    tokens.append(bool(shown[patch] and knows))
                if any(tokens):
                    expected.append((b, number, tokens))
    found = al.find_targets(encoded, pictures, asked)
    got = zip(found.picture.tolist(), found.question.tolist(), found.tokens.tolist())
    assert len(expected) > 6 and list(got) == expected


@pytest.mark.parametrize(
    "thing, names",
    [
        ({"what": "star"}, ["clip", "convnext", "eva", "pix2struct"]),
        ({"what": "star", "color": None}, ["clip"]),
        ({"what": "star", "pattern": None}, ["convnext"]),
        ({"what": "bar", "extreme": "tallest", "color": None}, ["eva"]),
        ({"what": "label", "row": "top", "column": "left"}, ["pix2struct"]),
    ],
)
def test_encoders_that_know_what_is_asked(thing, names):
    know = dict(zip(schooling.TOLD, al.encoders_that_know(thing)))
    assert [name for name in know if know[name]] == names


def test_tokens_of_questions_have_their_number_and_those_of_answers_none(model):
    dialogues = [[("is there", "yes"), ("red", "42")], [("red", "1")]]
    expected = [[1, 1, 1, 0, 0, 2, 2, 0, 0, 0], [1, 1, 0, 0] + [0] * 6]  # with <ans>
    assert al.number_questions(model, dialogues).tolist() == expected

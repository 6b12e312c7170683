"""Accuracy and recall against counting by hand."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from meteor_mini import Budget, load
from meteor_mini.toy import questions, world
from meteor_mini.toy.evaluate import (
    PATCHES,
    accuracy,
    batches,
    difference,
    encoding_flops,
    images_and_questions,
    interval,
    make_example,
    measure,
    patch_groups,
    prefill_flops,
    ratio,
    recall,
    to_images,
    utilization,
    with_interval,
)
from stage1_encode import encode


@pytest.fixture(scope="module")
def model():
    return load("toy")


def test_families_come_in_turn_and_examples_do_not_depend_on_the_batch():
    families = list(questions.FAMILIES)
    small = [e for part in batches("val", 20, batch=3) for e in part]
    large = [e for part in batches("val", 20, batch=50) for e in part]
    assert [e.family for e in small] == [families[i % len(families)] for i in range(20)]
    for one, same in zip(small, large):
        assert (one.question, one.answer) == (same.question, same.answer)
        assert np.array_equal(one.asked, same.asked)


def test_an_example_is_a_question_with_its_picture_and_its_asked_patches():
    example = make_example(3, "val", "tag")
    picture, question = questions.example(3, "val", "tag")
    assert np.array_equal(example.picture.image, picture.image)
    assert (example.family, example.question, example.answer) == ("tag", *question[:2])
    assert np.array_equal(example.asked, questions.asked_patches(picture, question))
    images, texts = images_and_questions([example])
    assert torch.equal(images, to_images([picture.image])) and texts == [question.text]


def test_accuracy_is_the_share_of_exact_answers(model):
    result = accuracy(model, model.budget, "val", samples=12)
    right = tokens = 0
    for example in next(batches("val", 12)):
        answer = model.answer(*images_and_questions([example]))[0]
        right += answer.text == example.answer
        tokens += answer.tokens["stage3"]
    assert result["accuracy"] == pytest.approx(100 * right / 12)
    assert result["average_tokens"] == pytest.approx(tokens / 12, rel=1e-4)
    assert set(result["families"]) == set(questions.FAMILIES) and sum(result["right"]) == right


def test_flops_of_a_question_are_of_its_whole_prompt(model):
    (example,) = next(batches("val", 1))
    (record,) = measure(model, Budget(stage1=60, stage2=24), [example])
    encoded = model.encode(images_and_questions([example])[0], Budget(stage1=60, stage2=24))
    embeds, _, visual_mask = model.prompt(encoded, [example.question])
    text = embeds.shape[1] - int(visual_mask.sum())
    layers = [24] * model.decoder.config.num_hidden_layers
    assert record.flops == prefill_flops(model.decoder.config, layers, text)


def test_unpruned_keeps_every_token(model):
    assert accuracy(model, Budget.none(), "val", samples=8)["average_tokens"] == 576


def test_recall_of_keep_all_is_everything_and_never_rises(model):
    everything = recall(model, Budget.none(), samples=16)
    for encoders in everything.values():
        for groups in encoders.values():
            assert all(share in (0, 100) for share in groups.values())
    table = recall(model, model.budget, samples=16)
    for name in model.encoders:
        for group in PATCHES:
            one, two, three = (table[f"stage{i}"][name][group] for i in (1, 2, 3))
            assert 100 >= one >= two >= three >= 0


def test_recall_in_any_encoder_is_the_union(model):
    table = recall(model, Budget(stage1=60), samples=16)["stage1"]
    left = total = 0
    for examples in batches("val", 16):
        answers = model.answer(*images_and_questions(examples), Budget(stage1=60))
        for example, answer in zip(examples, answers):
            m = answer.kept["stage1"]
            union = m["clip"] | m["convnext"] | m["eva"] | m["pix2struct"]
            bare = torch.from_numpy(example.picture.patch_words[:, 0] == 0).view(12, 12)
            left, total = left + int((bare & union).sum()), total + int(bare.sum())
    assert table["any"]["background"] == pytest.approx(100 * left / total)


def test_each_patch_is_in_one_group():
    found = set()
    for example in next(batches("val", 24)):
        words = example.picture.patch_words[:, 0]
        groups = patch_groups(example.picture)
        assert list(groups) == list(PATCHES)
        assert (torch.stack([*groups.values()]).sum(dim=0) == 1).all()
        printed = [1 + world.SLOTS["what"].index(word) for word in ("label", "number", "cell")]
        assert groups["print"].tolist() == np.isin(words, printed).tolist()
        assert groups["background"].tolist() == (words == 0).tolist()
        found |= set(words.tolist())
    assert found == set(range(len(world.SLOTS["what"]) + 1))  # all words of the slot were there


def test_pictures_become_images_in_zero_to_one():
    images = to_images([world.make_picture(0).image])
    assert images.shape == (1, 3, world.SIZE, world.SIZE) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("grouped", [8, 2])
def test_the_flops_formula_agrees_with_torchs_counter(grouped):
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=grouped,
        vocab_size=64,
    )
    llama = LlamaModel(config)
    plain = sdpa_kernel(SDPBackend.MATH)  # whose products every torch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        llama(inputs_embeds=torch.randn(1, 300, 256), use_cache=False)
    assert prefill_flops(config, [250] * 4, 50) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_the_flops_formula_gives_the_papers_rows():
    vicuna = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    full = prefill_flops(vicuna, [2880] * 32, 30)  # 30: a short question
    fastv, pyramid = [2880] * 2 + [1440] * 30, [2880] * 8 + [1440] * 8 + [720] * 8 + [360] * 8
    assert round(100 * prefill_flops(vicuna, fastv, 30) / full) == 51
    assert round(100 * prefill_flops(vicuna, pyramid, 30) / full) == 46


def test_flops_of_a_vit_are_all_counted_though_clip_has_an_operator_of_its_own(model):
    v = model.encoders["clip"]
    n, d = 1 + v.grid_size[0] * v.grid_size[1], v.conv1.out_channels
    m = v.transformer.resblocks[0].mlp[0].out_features
    blocks = len(v.transformer.resblocks) * 2 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    embed = 2 * (n - 1) * d * v.conv1.weight[0].numel()
    head = 2 * v.proj.numel()  # of CLS alone, in the library's own forward
    flops = encoding_flops(model, lambda m, x: encode(v, m.views["clip"](x)))
    assert flops == blocks + embed + head
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_of_encoding_fall_with_the_budget(model):
    full = encoding_flops(model, lambda m, x: m.encode(x, Budget.none()))
    pruned = encoding_flops(model, lambda m, x: m.encode(x, model.budget))
    assert 0.3 * full < pruned < full
    clip = encoding_flops(model, lambda m, x: m.encoders["clip"](m.views["clip"](x)))
    assert clip < full / 2


def test_interval_and_difference_by_hand():
    assert interval([True] * 50) == (100, 100) and interval([False] * 50) == (0, 0)
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.8
    low, high = interval(right)
    spread = 196 * np.sqrt(right.mean() * (1 - right.mean()) / 400)  # the normal approximation
    assert low == pytest.approx(100 * right.mean() - spread, abs=0.7)
    assert high == pytest.approx(100 * right.mean() + spread, abs=0.7)
    mean, low, high = difference([True, True, False, True], [True, False, False, False])
    assert mean == 50 and low <= 50 <= high
    assert difference(right, right) == (0, 0, 0)


def test_ratio_by_hand():
    value, low, high = ratio([2, 2, 2], [1, 1], paired=False)
    assert (value, low, high) == (2, 2, 2)
    rng = np.random.default_rng(0)
    b = rng.uniform(1, 9, 200)
    paired, unpaired = ratio(3 * b, b, paired=True), ratio(3 * b, b, paired=False)
    assert paired == pytest.approx((3, 3, 3)) and unpaired[0] == pytest.approx(3)
    assert 2.5 < unpaired[1] < 3 < unpaired[2] < 3.6
    assert all(np.isnan(ratio([1, 1], [0, 0], paired=True)))


def test_with_interval_is_an_accuracy_and_its_interval():
    right = [True, True, False, True]
    assert with_interval(right) == (75, *interval(right))


def test_utilization_by_hand():
    everyone = frozenset("abc")
    accuracies = {everyone: 80, frozenset("bc"): 20, frozenset("ac"): 80, frozenset("ab"): 88}
    assert utilization(accuracies, list("abc")) == {"a": 0.75, "b": 0, "c": pytest.approx(-0.1)}

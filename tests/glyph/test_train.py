"""The training's losses against loops.

And one tiny run of every stage end to end (slow), stopped and resumed.
"""

import math

import numpy as np
import pytest
import torch

from meteor_mini import load
from meteor_mini.finetune import pack
from meteor_mini.glyph import evaluate, train, world
from meteor_mini.lab import fusions, tables, train_fusions
from meteor_mini.weights import build_encoder


@pytest.fixture(scope="module")
def model():
    return load("glyph")


def test_the_schedule_warms_up_and_falls():
    rates = [train.schedule(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and abs(rates[999] - 0.02) < 1e-3
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))


def test_word_loss_equals_a_loop_over_patches_and_slots():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, sum(train.SLOT_SIZES), dtype=torch.float64)
    words = torch.stack([torch.randint(size, (2, 3)) for size in train.SLOT_SIZES], -1)
    weights, expected = list(range(1, 1 + len(train.SLOT_SIZES))), 0.0
    for slot, size in enumerate(train.SLOT_SIZES):
        start, total, mass = sum(train.SLOT_SIZES[:slot]), 0.0, 0.0
        for b in range(2):
            for n in range(3):
                word = words[b, n, slot].item()
                weight = 1.0 if word else train.BACKGROUND_WEIGHT
                row = scores[b, n, start : start + size]
                total, mass = total - weight * (row[word] - row.logsumexp(0)).item(), mass + weight
        expected += weights[slot] * total / mass
    got = train.word_loss(scores.float(), words, weights)
    assert got.item() == pytest.approx(expected / sum(weights), rel=1e-5)


@torch.no_grad()
def test_align_loss_equals_a_loop_over_patches(model):
    torch.manual_seed(0)
    projected = torch.randn(2, 3, 128)
    words = torch.zeros(2, 3, len(world.SLOTS), dtype=torch.long)  # background
    words[0, 0, 0], words[0, 0, 1] = 2, 3  # but one patch with two words
    words[1, 2, 2] = 8  # and one with a digit
    table, total, mass = train.slot_ids(model), 0.0, 0.0
    for b in range(2):
        for n in range(3):
            x = projected[b, n]
            length = (x.pow(2).mean() + model.decoder.config.rms_norm_eps).sqrt()
            h = x / length * model.decoder.model.norm.weight
            logp = (model.decoder.get_input_embeddings().weight @ h).log_softmax(0)
            there = [table[s][w].item() for s, w in enumerate(words[b, n].tolist()) if w]
            weight = 1.0 if there else train.BACKGROUND_WEIGHT
            total -= weight * np.mean(
                [logp[i].item() for i in there or [model.tokenizer.pad_token_id]]
            )
            mass += weight
    got = train.align_loss(model, projected, words, table)
    assert got.item() == pytest.approx(total / mass, rel=1e-5)


def test_slot_ids_are_the_words_of_the_tokenizer(model):
    for ids, words in zip(train.slot_ids(model), world.SLOTS.values()):
        assert model.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<pad>", *words]


def test_packed_positions_and_mask_by_hand(model):
    visual = torch.zeros(1, 2, 128)
    embeds, mask, position, labels = pack(model, visual, [[("is there", "yes"), ("red", "4 2")]])
    # <bos> v v | is there <ans> yes <eos> | red <ans> 4 2 <eos>
    assert position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7]]
    spoken = [
        model.tokenizer.convert_ids_to_tokens([i])[0] if i != -100 else ""
        for i in labels[0].tolist()
    ]
    assert spoken == [""] * 6 + ["yes", "<eos>"] + [""] * 2 + ["4", "2", "<eos>"]
    seen = mask[0, 0].int().tolist()
    assert seen[7] == [1] * 8 + [0] * 5 and seen[8] == [1, 1, 1] + [0] * 5 + [1] + [0] * 4
    assert seen[12] == [1, 1, 1] + [0] * 5 + [1] * 5


def test_dialogues_are_true_and_short():
    rng = np.random.default_rng(0)
    for index in range(20):
        picture = world.make_picture(index)
        pairs = train.dialogue(picture, rng)
        assert 1 <= len(pairs) <= 9 and all(q and a for q, a in pairs)
        assert len({q for q, _ in pairs}) == len(pairs)


def test_background_is_weighted_down():
    scores = torch.zeros(1, 10, sum(train.SLOT_SIZES))
    words = torch.zeros(1, 10, len(train.SLOT_SIZES), dtype=torch.long)
    got = train.word_loss(scores, words, [1] * len(train.SLOT_SIZES))
    expected = np.mean([math.log(size) for size in train.SLOT_SIZES])
    assert got.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_all_tokens_are_the_librarys_own(model):
    images = evaluate.to_images([world.make_picture(i).image for i in range(2)])
    clip = model.encoders["clip"]
    x = clip.ln_post(clip.transformer(clip._embeds(model.views["clip"](images))))
    whole, patches = train.all_tokens(clip, images)
    torch.testing.assert_close(whole, x[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, x[:, 1:], atol=1e-5, rtol=1e-5)
    eva = model.encoders["eva"]
    x = eva.forward_features(model.views["eva"](images))
    whole, patches = train.all_tokens(eva, images)
    assert torch.equal(whole, x[:, 0]) and torch.equal(patches, x[:, 1:])
    x = model.encoders["pix2struct"](model.views["pix2struct"](images)).last_hidden_state
    whole, patches = train.all_tokens(model.encoders["pix2struct"], images)
    assert torch.equal(whole, x.mean(dim=1)) and torch.equal(patches, x)
    x = model.encoders["convnext"].forward_features(model.views["convnext"](images))
    whole, patches = train.all_tokens(model.encoders["convnext"], images)
    assert torch.equal(whole, x.flatten(2).mT.mean(dim=1)) and patches.shape == (2, 144, 96)


@pytest.mark.parametrize("name", train.ENCODERS)
def test_gradients_reach_the_blocks_through_all_tokens_and_no_hook_stays(name):
    encoder = build_encoder(name, train.ENCODERS[name]).train()
    whole, patches = train.all_tokens(encoder, torch.rand(1, 3, 96, 96))
    (whole.sum() + (patches**2).sum()).backward()
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(grads) > 20 and any(grad.abs().max() > 0 for grad in grads)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_a_batch_without_masking_is_untouched_and_a_masked_encoder_is_zero():
    features = [torch.randn(2, 3, 4) for _ in range(4)]
    masked = 0
    for seed in range(200):
        out = train.mask_encoders(features, np.random.default_rng(seed))
        untouched = [torch.equal(x, y) for x, y in zip(features, out)]
        assert all(same or y.abs().max() == 0 for same, y in zip(untouched, out))
        masked += not all(untouched)
    assert 5 <= masked <= 30  # 8 % of batches, less those in which all are seen


def run(module, monkeypatch, work, out, *options):
    monkeypatch.setattr("sys.argv", ["train", "--work", str(work), "--out", str(out), *options])
    module.main()


@pytest.mark.slow  # about two minutes: every stage of both trainings, and calibration
def test_every_stage_runs_resumes_and_leaves_a_model_that_loads(monkeypatch, tmp_path):
    steps = {name: 2 for name in train.STEPS}
    for name, value in {"POOL": 128, "FEATURE_CHUNKS": 4, "STEPS": steps}.items():
        monkeypatch.setattr(train, name, value)
    run(train, monkeypatch, tmp_path / "work", tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.config["ranks"] and model.config["lambda_table"]
    assert model.budget.stage1 == train.BUDGET["stage1"]

    once = (tmp_path / "work" / "answer.safetensors").read_bytes()
    for name in ("answer.safetensors", "answer.resume.safetensors"):
        (tmp_path / "work" / name).unlink()
    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, _, **options: schedule(step, 2, **options))
    monkeypatch.setattr(train, "STEPS", steps | {"answer": 1})  # stopped after one step
    run(train, monkeypatch, tmp_path / "work", tmp_path / "model", "--stage", "answer")
    monkeypatch.setattr(train, "STEPS", steps)
    run(train, monkeypatch, tmp_path / "work", tmp_path / "model", "--stage", "answer")
    assert (tmp_path / "work" / "answer.safetensors").read_bytes() == once

    monkeypatch.setattr(train_fusions, "CHUNKS", 2)
    monkeypatch.setattr(train_fusions, "STEPS", {"align": 2, "answer": 4})
    file = tmp_path / "model" / fusions.FILE
    run(train_fusions, monkeypatch, tmp_path / "work", file)
    rows = tables.table2(load(tmp_path / "model"))
    (row,) = [row for row in rows if row.label.startswith("Resampler")]
    assert evaluate.accuracy(model, row.method, "val", 8)["average_tokens"] == 144

"""The training's losses against loops, and one tiny run of every stage end to end (slow), stopped and resumed."""

import math

import numpy as np
import pytest
import torch

from meteor_mini import evaluate, glyphworld, load, tables, train, train_baselines


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
    projected, words = (
        torch.randn(2, 3, 128),
        torch.zeros(2, 3, len(glyphworld.SLOTS), dtype=torch.long),
    )
    words[0, 0, 0], words[0, 0, 1], words[1, 2, 2] = (
        2,
        3,
        8,
    )  # a red something, a digit, four background patches
    table, total, mass = train.slot_ids(model), 0.0, 0.0
    for b in range(2):
        for n in range(3):
            x = projected[b, n]
            h = (
                x
                / (x.pow(2).mean() + model.decoder.config.rms_norm_eps).sqrt()
                * model.decoder.model.norm.weight
            )
            logp = (model.decoder.get_input_embeddings().weight @ h).log_softmax(0)
            there = [table[s][w].item() for s, w in enumerate(words[b, n].tolist()) if w]
            weight = 1.0 if there else train.BACKGROUND_WEIGHT
            total -= weight * np.mean(
                [logp[i].item() for i in there or [model.tokenizer.pad_token_id]]
            )
            mass += weight
    assert train.align_loss(model, projected, words, table).item() == pytest.approx(
        total / mass, rel=1e-5
    )


def test_slot_ids_are_the_words_of_the_tokenizer(model):
    for ids, words in zip(train.slot_ids(model), glyphworld.SLOTS.values()):
        assert model.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<pad>", *words]


def test_packed_positions_and_mask_by_hand(model):
    visual = torch.zeros(1, 2, 128)
    embeds, mask, position, labels = model.pack(visual, [[("is there", "yes"), ("red", "4 2")]])
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
        picture = glyphworld.make_picture(index)
        pairs = train.dialogue(picture, rng)
        assert 1 <= len(pairs) <= 9 and all(q and a for q, a in pairs)
        assert len({q for q, _ in pairs}) == len(pairs)


def test_background_is_weighted_down():
    scores = torch.zeros(1, 10, sum(train.SLOT_SIZES))
    words = torch.zeros(1, 10, len(train.SLOT_SIZES), dtype=torch.long)
    assert train.word_loss(scores, words, [1] * len(train.SLOT_SIZES)).item() == pytest.approx(
        np.mean([math.log(size) for size in train.SLOT_SIZES]), rel=1e-5
    )


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
    assert (
        model.config["ranks"]
        and model.config["lambda_table"]
        and model.budget.stage1 == train.BUDGET["stage1"]
    )

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

    monkeypatch.setattr(train_baselines, "CHUNKS", 2)
    monkeypatch.setattr(train_baselines, "STEPS", {"align": 2, "answer": 4})
    run(
        train_baselines,
        monkeypatch,
        tmp_path / "work",
        tmp_path / "model" / "baselines.safetensors",
    )
    rows = [
        row for row in tables.table2(load(tmp_path / "model")) if row.label.startswith("Resampler")
    ]
    assert (
        len(rows) == 1
        and evaluate.accuracy(model, rows[0].method, "val", 8)["average_tokens"] == 144
    )

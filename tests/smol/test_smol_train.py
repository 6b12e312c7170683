"""smol/train.py: how projectors begin, what a few steps move, that only the answers teach."""

import csv
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from meteor_mini import budgets, load
from meteor_mini.evaluate import accuracy
from meteor_mini.finetune import pack_dialogue
from meteor_mini.smol import build, train
from meteor_mini.toy import questions, world
from meteor_mini.toy.dialogues import ask_in_keywords
from meteor_mini.toy.pool import Pool, draw_pool

PICTURES = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    draw_pool(folder, PICTURES)
    return folder


@pytest.fixture(scope="module")
def encoded(work):
    """What the encoders, which are the toy's, make of the pictures, and the words of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "FITTED", PICTURES)
        return train.encode_pictures(load("toy"), Pool(work))


@pytest.fixture
def pool(work, encoded, monkeypatch):
    monkeypatch.setattr(train, "FITTED", PICTURES)
    monkeypatch.setattr(train, "encode_pictures", lambda model, pool: encoded)
    return Pool(work)


@torch.no_grad()
def test_projectors_begin_by_saying_the_words_of_a_patch(pool, encoded):
    model, eagle = build.build_smol()
    train.start_projectors(model, eagle, pool)
    features, words = encoded
    said = [project(x) for project, x in zip(model.projectors.values(), features)]
    words = [*words, torch.stack(words).amax(dim=0)]
    said.append(eagle([x.unflatten(0, (PICTURES, -1)) for x in features]).flatten(0, 1))
    for tokens, of_patches in zip(said, words):
        kinds, kind = of_patches[of_patches.any(dim=1)].unique(dim=0, return_inverse=True)
        centers = F.normalize(train.embed_words(model, kinds), dim=-1)
        nearest = (F.normalize(tokens[of_patches.any(dim=1)], dim=-1) @ centers.T).argmax(dim=1)
        assert (nearest == kind).float().mean() > 0.5  # of many


@torch.no_grad()
def test_what_a_perfect_encoder_would_say_is_the_scaled_sum_of_embeddings(pool):
    model, _ = build.build_smol()
    embeddings = model.decoder.get_input_embeddings().weight
    words = torch.zeros(2, len(world.SLOTS), dtype=torch.int64)
    words[0, 0] = 1 + world.SLOTS["what"].index("star")
    words[0, 1] = 1 + world.SLOTS["color"].index("red")
    star, red = model.tokenizer.convert_tokens_to_ids(["star", "red"])
    expected = torch.stack([(embeddings[star] + embeddings[red]) / 2**0.5, embeddings.mean(dim=0)])
    torch.testing.assert_close(train.embed_words(model, words), expected)


def test_kinds_of_picture_are_drawn_by_their_shares():
    pictures = [SimpleNamespace(kind=kind) for kind in ["scene"] * 6 + ["table"] * 3 + ["chart"]]
    rows = train.draw_rows(pictures, np.random.default_rng(0), 10_000)
    counts = np.bincount(rows, minlength=10) / 10_000
    assert counts[:6].sum() == pytest.approx(train.KINDS["scene"], abs=0.02)
    assert counts[6:9].sum() == pytest.approx(train.KINDS["table"], abs=0.02)
    assert counts[9] == pytest.approx(train.KINDS["chart"], abs=0.02)


def test_much_is_asked_about_a_picture_and_nothing_twice(pool):
    for number in range(6):
        picture, rng = pool.pictures[number], np.random.default_rng(number)
        texts = [question.text for question in train.ask_much(picture, rng)]
        keywords = {question.text for question in ask_in_keywords(picture, rng)}
        assert len(set(texts)) == len(texts) and texts[0] == questions.DESCRIBE
        assert keywords & set(texts)  # in keywords
        assert set(texts[1:]) - keywords  # and in sentences


@pytest.mark.parametrize("block", [0, 1])
def test_the_pictures_of_a_block_are_dealt_out_once_and_by_length(pool, block, monkeypatch):
    monkeypatch.setattr(train, "BLOCK", 4)
    model, _ = build.build_smol()
    steps = [train.draw_dialogues(model, pool, 4 * block + place) for place in range(4)]
    drawn = train.draw_rows(pool.pictures, np.random.default_rng(block), 4 * train.PICTURES)
    assert sorted(np.concatenate([rows for rows, _ in steps])) == sorted(drawn)
    spans = []
    for _, dialogues in steps:
        lengths = [len(pack_dialogue(model, dialogue, 0)["ids"]) for dialogue in dialogues]
        spans.append((min(lengths), max(lengths)))
    spans.sort()
    assert all(longest <= shortest for (_, longest), (shortest, _) in zip(spans, spans[1:]))


def test_a_few_steps_move_lora_and_projectors_and_nothing_else(pool, work, tmp_path, monkeypatch):
    built = []

    def build_and_remember():
        built.append(build.build_smol())
        return built[-1]

    monkeypatch.setattr(train, "build_smol", build_and_remember)
    monkeypatch.setattr(train, "PICTURES", 2)
    monkeypatch.setattr(train, "set_budget", lambda model: None)  # it has its own test
    train.train(work, tmp_path / "out", steps=4)

    ((model, eagle),), (before, eagle_before) = built, build.build_smol()
    moved, still = set(), set()
    then = dict(before.named_parameters()) | dict(eagle_before.named_parameters("eagle"))
    now = dict(model.named_parameters()) | dict(eagle.named_parameters("eagle"))
    for name, parameter in now.items():
        (still if torch.equal(parameter, then[name]) else moved).add(name)
    trained = {n for n in now if "lora_" in n or n.startswith(("projectors.", "eagle."))}
    assert moved == trained
    assert {name.split(".")[0] for name in still} == {"encoders", "decoder"}

    written = load_file(tmp_path / "out" / "adapter.safetensors")
    assert written.keys() == {n.removeprefix("decoder.") for n in trained if "lora_" in n}
    with (work / "curve.csv").open() as file:
        rows = list(csv.reader(file))
    assert [int(row[0]) for row in rows] == list(range(4))
    assert [row[1] for row in rows] == ["meteor", "eagle"] * 2


def test_a_trained_model_gets_a_budget_and_the_lambda_that_keeps_it(monkeypatch):
    monkeypatch.setattr(budgets, "LAMBDAS", [0.0, 128.0, 256.0])
    monkeypatch.setattr(budgets, "K_SHARES", (0.2, 0.25))
    examples = partial(train.example_batches, samples=16)
    monkeypatch.setattr(
        train, "example_batches", lambda split, _, first: examples(split, first=first)
    )
    ranks = load("toy").config["ranks"]
    monkeypatch.setattr(budgets, "measure_ranks", lambda *_: ranks)  # it has its own tests
    of_toy = replace(train.BUDGET, stage3=40, layers=(1, 3, 5))  # it has 8
    monkeypatch.setattr(train, "BUDGET", of_toy)
    model = load("toy")
    model.config["budget"] = model.config["lambda_table"] = None
    train.set_budget(model)
    assert model.budget == of_toy
    result = accuracy(model, model.budget, "val", 16, first=50_000)  # those of lambda
    assert result["average_tokens"] == pytest.approx(40, rel=0.1)

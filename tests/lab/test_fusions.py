"""The learned fusions: which patches meet in which token, by hand; what is stored and loaded."""

import copy

import pytest
import torch
from meteor_mini.toy.evaluate import images_and_questions, make_example

import stage1_encode
from meteor_mini import load
from meteor_mini.lab import fusions as room
from meteor_mini.toy.questions import FAMILIES


@pytest.fixture(scope="module")
def model():
    return load("toy")


@pytest.fixture(scope="module")
def batch():
    return images_and_questions([make_example(5, "val", family) for family in FAMILIES])


@torch.no_grad()
def test_learned_fusions_see_each_cell_of_each_encoder(model, batch):
    """The shapes, and by hand: which patches meet in one token."""
    torch.manual_seed(0)
    fusions = room.new_fusions(model).eval()
    encoders = list(model.encoders.values())
    features, _ = stage1_encode.encode_all(encoders, model.pixels(batch[0]), None)
    assert [x.shape for x in features] == [(12, 144, 96)] * 4
    for name, fusion in fusions.items():
        assert fusion(features).shape == (12, 144, model.decoder.config.hidden_size), name
    cell = torch.cat([x[3, 50] for x in features])  # EAGLE: one cell, all channels
    eagle = fusions["EAGLE-style"]
    torch.testing.assert_close(eagle(features)[3, 50], eagle.project(cell))
    x = features[1][3].view(12, 12, -1)  # PixShuffle: rows 4-5, columns 6-7 of the second encoder
    four = torch.cat([x[4, 6], x[4, 7], x[5, 6], x[5, 7]])
    token = fusions["PixShuffle"](features)[3, 36 + 2 * 6 + 3]
    expected = fusions["PixShuffle"].projectors[1](four)
    torch.testing.assert_close(token, expected, atol=1e-5, rtol=1e-5)
    projected = model.projectors["eva"](features[2][3])  # MLP: one encoder, channel by channel
    channels = [fusions["MLP"].mix[2](projected[:, d]) for d in range(128)]
    mixed = torch.stack(channels, dim=1)  # (36, 128)
    torch.testing.assert_close(fusions["MLP"](features)[3, 72:108], mixed, atol=1e-5, rtol=1e-5)


def test_learned_fusions_come_back_with_their_own_llama(model, batch, tmp_path):
    torch.manual_seed(1)
    other, file = copy.deepcopy(model), tmp_path / "fusions.safetensors"
    for p in other.decoder.parameters():
        p.data += 0.02 * torch.randn_like(p)
    fusions = room.new_fusions(other)
    room.save_learned(other, fusions, file)
    again = room.load_learned(model, file)
    assert list(again) == list(room.LEARNED)
    for name, fusion in fusions.items():
        other.decoder.half().float(), fusion.half().float()  # as they were stored
        expected = room.learned(other, fusion).answer(None, *batch)
        answers = again[name].answer(None, *batch)
        assert [a.text for a in answers] == [a.text for a in expected]
        assert answers[0].layers == [144] * 8
    others = room.learned(model, fusion).answer(None, *batch)
    assert [a.text for a in answers] != [a.text for a in others]


def test_learned_fusions_of_other_encoders_or_of_a_damaged_file_are_refused(model, tmp_path):
    file, other = tmp_path / "fusions.safetensors", copy.deepcopy(model)
    other.encoders["clip"].ln_post.weight.data[0] += 0.5
    room.save_learned(other, room.new_fusions(other), file)
    with pytest.raises(ValueError, match="trained on other encoders than the model's"):
        room.load_learned(model, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a safetensors file, or is cut short"):
        room.load_learned(model, file)

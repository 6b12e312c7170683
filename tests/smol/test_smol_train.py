"""smol/train.py: what ten steps move, and that nothing but the answers teaches it."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from meteor_mini.smol import build, train
from meteor_mini.toy.pool import draw_pool


def test_ten_steps_move_lora_and_projectors_and_nothing_else(tmp_path, monkeypatch):
    built = []

    def build_and_remember():
        built.append(build.build_smol())
        return built[-1]

    monkeypatch.setattr(train, "build_smol", build_and_remember)
    monkeypatch.setattr(train, "PICTURES", 2)
    draw_pool(tmp_path, 4)
    train.train(tmp_path, tmp_path / "out", steps=10)

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
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.reader(file))
    assert [int(row[0]) for row in rows] == list(range(10))
    assert [row[1] for row in rows] == ["meteor", "eagle"] * 5


def test_no_loss_but_the_answers_is_in_the_training():
    folder = Path(train.__file__).parent
    text = "".join((folder / name).read_text() for name in ("build.py", "train.py"))
    for word in ("attention_loss", "aside_loss", "looking_loss", "align_loss", "asked_patches"):
        assert word not in text

"""smol/build.py: what is written and read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteor_mini import Budget, load
from meteor_mini.smol import build
from meteor_mini.smol.build import fetch_smollm2
from meteor_mini.toy.questions import example_batches, images_and_questions


@pytest.fixture
def pictures():
    (examples,) = example_batches("val", 3)
    return images_and_questions(examples)


def test_what_is_written_answers_the_same_when_it_is_read(tmp_path, pictures):
    model, eagle = build.build_smol()
    for name, parameter in model.decoder.named_parameters():
        if "lora_B" in name:  # zeros at first
            torch.nn.init.normal_(parameter, std=0.05)
    build.write_smol(model, eagle, tmp_path)
    read = build.load_smol(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter.safetensors",
        "config.json",
        "eagle.safetensors",
        "projectors.safetensors",
    }
    encoded = model.encode(pictures[0], Budget(stage2=40))
    embeds, mask, _ = model.prompt(encoded, pictures[1])
    encoded = read.encode(pictures[0], Budget(stage2=40))
    embeds_read, mask_read, _ = read.prompt(encoded, pictures[1])
    with torch.no_grad():
        logits = model.decoder.eval()(inputs_embeds=embeds, attention_mask=mask).logits
        again = read.decoder(inputs_embeds=embeds_read, attention_mask=mask_read).logits
    torch.testing.assert_close(again, logits, atol=5e-3, rtol=1e-2)  # written in half precision
    base, _ = build.fetch_smollm2()
    with torch.no_grad():
        without = base(inputs_embeds=embeds, attention_mask=mask).logits
    assert not torch.allclose(without, logits, atol=5e-3, rtol=1e-2)


def test_an_adapter_whose_weights_have_other_names_is_refused(tmp_path):
    """Read without them, the model would be SmolLM2, untrained."""
    model, eagle = build.build_smol()
    build.write_smol(model, eagle, tmp_path)
    lora = load_file(tmp_path / build.ADAPTER)
    renamed = {name.replace("lora_A", "lora_a"): value for name, value in lora.items()}
    save_file(renamed, tmp_path / build.ADAPTER)
    with pytest.raises(ValueError, match="does not fit this release of peft: .*lora_a"):
        build.load_smol(tmp_path)


def test_a_folder_without_a_trained_smol_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no trained smol: docs/smol.md"):
        build.load_smol(tmp_path)


def test_without_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"smol needs the package peft: pip install"):
        load("smol")


def test_where_smollm2_is_missing_the_page_that_brings_it_is_named(tmp_path, monkeypatch):
    def fetch(name, load_it):
        raise ValueError(f"{name} could not be fetched from the hub")

    monkeypatch.setattr(build, "fetch", fetch)
    monkeypatch.setattr(build, "REAL_PARTS", tmp_path)
    with pytest.raises(ValueError, match="SmolLM2.* could not be fetched.*docs/real_parts.md"):
        fetch_smollm2()  # the real one, imported before the fixture stands in for it

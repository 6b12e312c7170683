"""smol/build.py: how the projectors begin, and what is written and read."""

import pytest
import torch
import torch.nn.functional as F

from meteor_mini import Budget, load
from meteor_mini.baselines import encode_channels
from meteor_mini.smol import build
from meteor_mini.toy.questions import example_batches, images_and_questions


@pytest.fixture
def pictures():
    (examples,) = example_batches("val", 3)
    return images_and_questions(examples)


@torch.no_grad()
def test_words_of_the_toy_become_words_of_the_llama():
    model, _ = build.build_smol()
    toy = load("toy")
    M = build.map_words(toy, model)
    embeddings = model.decoder.get_input_embeddings().weight
    colors = ["red", "green", "blue", "yellow"]
    source = toy.decoder.get_input_embeddings().weight[toy.tokenizer.convert_tokens_to_ids(colors)]
    target = embeddings[model.tokenizer.convert_tokens_to_ids(colors)]
    cosines = F.normalize(source @ M.T, dim=-1) @ F.normalize(target, dim=-1).T
    assert cosines.argmax(dim=1).tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_projectors_begin_as_the_toys_with_the_map_behind(pictures):
    model, _ = build.build_smol()
    toy = load("toy")
    M = build.map_words(toy, model)
    tokens = model.encode(pictures[0], Budget.none()).fused.tokens
    of_toy = toy.encode(pictures[0], Budget.none()).fused.tokens
    torch.testing.assert_close(tokens, of_toy @ M.T, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cell_of_eagles_begins_as_half_the_sum_of_what_the_encoders_say_of_it(pictures):
    model, eagle = build.build_smol()
    tokens = encode_channels(model, eagle, pictures[0]).fused.tokens  # (B, 144, D)
    separate = model.encode(pictures[0], Budget.none()).fused.tokens  # (B, 4 * 144, D)
    nothing = model.decoder.get_input_embeddings().weight.mean(dim=0)
    said = separate.unflatten(1, (4, -1)) - nothing  # of each cell by each encoder
    torch.testing.assert_close(tokens, nothing + said.sum(dim=1) / 2, atol=1e-5, rtol=1e-4)


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


def test_a_folder_without_a_trained_smol_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no trained smol: docs/smol.md"):
        build.load_smol(tmp_path)

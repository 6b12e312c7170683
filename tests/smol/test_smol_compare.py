"""smol/compare.py: every method leaves the same number of tokens, and the best setting is taken."""

import json

import pandas as pd
import pytest
import torch

from meteor_mini import Meteor, load
from meteor_mini.baselines import channel_fusion
from meteor_mini.evaluate import accuracy
from meteor_mini.smol import compare
from meteor_mini.tables import Row, grid_cells, measure_rows, stages


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The toy's encoders, and a random Llama as deep as SmolLM2."""
    from safetensors.torch import save_model

    toy = load("toy")
    decoder = {
        "vocab_size": len(toy.tokenizer),
        "hidden_size": 18,
        "intermediate_size": 16,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
    }
    config = toy.config | {"decoder": decoder, "lambda_table": None, "budget": None}
    torch.manual_seed(0)
    model = Meteor(config, toy.tokenizer, dict(toy.encoders.items())).eval()
    model.decoder.generation_config.max_new_tokens = 1
    model.folder = tmp_path_factory.mktemp("smol")
    save_model(channel_fusion(model), str(model.folder / "eagle.safetensors"))
    return model


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(compare, "LAMBDA_QUESTIONS", 2)


@pytest.mark.parametrize("name", compare.METHODS)
def test_every_method_leaves_the_average_within_one_percent(model, name):
    wanted = round(compare.SEARCH_AT * grid_cells(model))
    adaptive = compare.METHODS[name][1] is compare.STAGE_3
    first = 50_000 if adaptive else 0  # the questions on which lambda is solved
    for setting in compare.settings_of(name)[:1]:
        row = compare.build_row(model, name, compare.SEARCH_AT, setting)
        tokens = accuracy(model, row.answer, "val", 2, first=first)["average_tokens"]
        assert abs(tokens - wanted) <= 0.01 * wanted


def test_every_grid_has_at_most_twelve_settings():
    assert max(len(compare.settings_of(name)) for name in compare.METHODS) == 12


def test_the_setting_of_most_right_answers_is_taken_and_parts_have_meteors():
    settings = compare.settings_of("METEOR")
    searched = pd.DataFrame(
        {
            "method": ["METEOR"] * 3,
            "setting": [json.dumps(setting) for setting in settings[:3]],
            "accuracy": [50.0, None, 60.0],
        }
    )
    assert compare.best_setting(searched, "METEOR") == json.loads(json.dumps(settings[2]))
    assert compare.best_setting(searched, "stages 1+3") == json.loads(json.dumps(settings[2]))


def test_hard_questions_are_those_that_the_easy_row_gets_wrong(model):
    rows = [Row("easy", stages(16)), Row("other", stages(8), against="easy")]
    frame = measure_rows(model, "methods", rows, 4, [0], easy="easy")
    hard = frame[frame["family"] == "hard"].set_index("method")
    overall = frame[frame["family"] == "all"].set_index("method")
    wrong = 4 - round(4 * overall.loc["easy", "accuracy"] / 100)
    assert hard.loc["other", "questions"] == wrong
    assert hard.loc["easy", "accuracy"] == 0

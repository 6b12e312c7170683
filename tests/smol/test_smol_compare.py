"""smol/compare.py: every method leaves the same number of tokens, and the best setting is taken."""

import json

import pandas as pd
import pytest
import torch

from meteor_mini import Meteor, load, page
from meteor_mini.baselines import channel_fusion
from meteor_mini.evaluate import ask
from meteor_mini.methods import grid_cells
from meteor_mini.smol import compare

pytestmark = pytest.mark.usefixtures("one_word")


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
    model.folder = tmp_path_factory.mktemp("smol")
    save_model(channel_fusion(model), str(model.folder / "eagle.safetensors"))
    return model


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("meteor_mini.methods.LAMBDA_QUESTIONS", 2)


@pytest.mark.parametrize("name", compare.METHODS)
def test_every_method_leaves_the_average_within_one_percent(model, name):
    share = 0.6 if name == "stage 3" else compare.SEARCH_AT  # it reaches no other
    wanted = round(share * grid_cells(model))
    settings = compare.settings_of(name) or compare.settings_of("METEOR")  # of its parts
    setting = json.loads(json.dumps(settings[0]))  # as it is read from search.csv
    row = compare.build_row(model, name, share, setting)
    lambda_is_solved = "k" in setting
    first = 50_000 if lambda_is_solved else 0  # the questions on which it is solved
    tokens = ask(model, row.answer, "val", 2, first)["tokens"].mean()
    assert abs(tokens - wanted) <= 0.01 * wanted


def test_stage_3_alone_is_left_out_where_it_cannot_reach_the_average(model):
    setting = compare.settings_of("METEOR")[0]
    with pytest.raises(ValueError, match="77 of the average come from the layers before"):
        compare.build_row(model, "stage 3", 0.5, setting)


@pytest.mark.parametrize("name", compare.WITH_RATIO[1:])
def test_what_stands_in_place_of_stage_3_has_a_ratio_of_its_own(model, name, monkeypatch):
    left = []
    monkeypatch.setattr(compare, "stages", lambda stage1, stage2: left.append((stage1, stage2)))
    setting = compare.settings_of(name)[0]
    compare.build_row(model, name, 0.25, setting)
    compare.build_row(model, name, 0.25, setting | {"ratio": 3.0})
    (_, K), (stage1, same) = left
    assert stage1 == 3 * K == 3 * same and left[0][0] == round(compare.PAPER_RATIO * K)


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
    with_ratio = json.dumps(settings[2] | {"ratio": 3.0})
    searched.loc[3] = "METEOR", with_ratio, 70.0
    assert compare.best_setting(searched, "METEOR") == json.loads(with_ratio)
    assert compare.best_setting(searched, "stages 1+3") == json.loads(json.dumps(settings[2]))


def graded(share: float, method: str, right: list[bool], seed: int = 0) -> pd.DataFrame:
    """Answers to four questions, as answers.csv has them."""
    families = ["color", "color", "label", "value"]
    columns = {"share": share, "method": method, "seed": seed, "tokens": 36.0, "flops": 1.0}
    return pd.DataFrame({"family": families, "right": right}).assign(**columns)


@pytest.fixture
def methods():
    answers = [
        graded(4.0, "unpruned", [True, True, True, True]),
        graded(4.0, "EAGLE", [True, True, True, True]),
        graded(0.25, "METEOR", [True, True, True, False]),
        graded(0.25, "smaller picture", [True, False, False, False]),
    ]
    times = pd.DataFrame({"share": [4.0, 0.25, 0.25], "method": ["EAGLE", "EAGLE", "METEOR"]})
    times = times.assign(ms=[3.0, 3.0, 7.0], speed_up=[5.0, 6.0, 2.0])
    return compare.summarise(pd.concat(answers, ignore_index=True), times)


def test_meteor_is_compared_with_the_unpruned_model_and_others_with_meteor(methods):
    overall = methods[methods["family"] == "all"].set_index(["method", "share"])
    assert overall.loc[("METEOR", 0.25), "difference"] == -25  # of unpruned
    assert overall.loc[("smaller picture", 0.25), "difference"] == -50  # of METEOR
    assert overall.loc[("EAGLE", 4.0), "difference"] == 0  # of unpruned
    assert overall.loc[("EAGLE", 0.25), "difference"] == 25  # of METEOR
    assert pd.isna(overall.loc[("unpruned", 4.0), "difference"])
    speed_up = overall["speed_up"]
    assert (speed_up["METEOR", 0.25], speed_up["EAGLE", 0.25], speed_up["EAGLE", 4.0]) == (2, 6, 5)


def test_hard_questions_are_those_that_the_smaller_picture_gets_wrong(methods):
    hard = methods[methods["family"] == "hard"].set_index("method")
    assert (hard["questions"] == 3).all() and set(hard.index) >= {"EAGLE", "METEOR"}
    assert hard.loc["METEOR", "accuracy"] == pytest.approx(200 / 3)
    assert hard.loc["smaller picture", "accuracy"] == 0


def test_a_comparison_that_was_stopped_goes_on(model, tmp_path, monkeypatch, capsys):
    asked = []

    def ask(model, row, samples, seed=0, split="test", first=0):
        asked.append(({0: split, samples: "fresh"}[first], row.method, seed))
        right = [row.method != "random"] * samples
        return pd.DataFrame({"family": "color", "right": right, "tokens": 36.0, "flops": 1.0})

    some = ("METEOR", "stages 1+3", "random", "smaller picture")
    settings_of = compare.settings_of
    for name, value in {
        "ask": ask,
        "METHODS": {name: compare.METHODS[name] for name in some},
        "OTHER_RATIOS": [3.0],
        "WITH_RATIO": ("METEOR",),
        "SECONDS": 0,
        "SEEDS": [0, 1],
        "SEARCH_AT": 0.25,
        "SHARES": (0.25,),
        "TIMED": 1,
        "settings_of": lambda name: settings_of(name)[:1],
    }.items():
        monkeypatch.setattr(compare, name, value)
    solved_on = []  # the split of each lambda
    monkeypatch.setattr(
        "meteor_mini.methods.solve_for_average", lambda *args: solved_on.append(args[-1]) or 30.0
    )
    monkeypatch.setattr(page, "write", lambda folder: (folder / "README.md").write_text("a page"))
    monkeypatch.setattr(Meteor, "from_pretrained", lambda name: model)
    command = ["compare", "--out", str(tmp_path), "--search", "1", "--samples", "2"]
    monkeypatch.setattr("sys.argv", command)

    compare.main()
    tried = pd.read_csv(tmp_path / "search.csv").groupby("method")["setting"].apply(list)
    first, other_ratio = map(json.loads, tried["METEOR"])
    assert other_ratio == first | {"ratio": 3.0} and "stages 1+3" not in tried
    assert sum(split == "val" for split, *_ in asked) == tried.map(len).sum()
    cases = [(method, seed) for split, method, seed in asked if split == "test"]
    assert cases == [
        ("unpruned", 0),
        ("EAGLE-style, 144", 0),
        ("METEOR", 0),
        ("stages 1+3", 0),
        ("random", 0),
        ("random", 1),
        ("smaller picture", 0),
    ]
    assert [(method, seed) for split, method, seed in asked if split == "fresh"] == cases
    assert solved_on == ["val", "val", "test", "test"]  # METEOR's two settings; it and stages 1+3
    answers = pd.read_csv(tmp_path / "answers.csv")
    for file in ("methods.csv", "fresh_methods.csv"):
        methods = pd.read_csv(tmp_path / file)
        assert set(methods["method"]) == {method for method, _ in cases}
        assert (methods["speed_up"] > 0).all()

    (tmp_path / "times.csv").unlink()  # stopped before it had measured the last share's times
    last = answers[answers["method"] != "smaller picture"]
    last.to_csv(tmp_path / "answers.csv", index=False)
    asked.clear()
    compare.main()
    assert asked == [("test", "smaller picture", 0)]
    assert len(pd.read_csv(tmp_path / "answers.csv")) == len(answers)
    assert "a page" in capsys.readouterr().out

"""The command line: what it prints, and wrong input: one sentence on stderr, exit code 2."""

import importlib
import json
import sys
from functools import partialmethod

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from meteor_mini import Budget, budget_for, cli
from meteor_mini.pictures import load_picture
from meteor_mini.toy import questions

EXAMPLE = questions.make_example(0, "val", "color")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(EXAMPLE.picture.image).save(path)
    return path


@pytest.fixture
def ask(folder, picture, monkeypatch):
    """With answers of one token: an untrained model does not stop."""
    one_word = partialmethod(cli.Meteor.generate, max_new_tokens=1)
    monkeypatch.setattr(cli.Meteor, "generate", one_word)
    return ["ask", str(picture), EXAMPLE.question, "--model", str(folder)]


# ------------------------------------------------------------------ what is printed


def test_ask_prints_the_models_answer_and_its_counts(ask, untrained, picture, capsys):
    assert cli.main(ask) == 0
    answer = untrained.answer(load_picture(picture), [EXAMPLE.question])[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (answer.text or "(nothing)")
    assert lines[1].startswith("  tokens 576 -> 168 -> 80 -> ")
    for line, (name, count) in zip(lines[2:], [*answer.survivors["stage1"].items()][:1]):
        assert f"{name} {count}" in line


@pytest.mark.parametrize("options", [[], ["--tokens", "60"], ["--keep-all"]])
def test_ask_json_has_the_counts_of_the_budget(ask, untrained, capsys, options):
    budget = untrained.budget
    if "--tokens" in options:
        budget = budget_for(untrained, 60)
    if "--keep-all" in options:
        budget = Budget(stage1=576, stage2=576)
    assert cli.main([*ask, "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["question", "answer", "tokens", "survivors"]
    assert result["tokens"]["stage1"] == budget.stage1
    assert result["tokens"]["stage2"] == budget.stage2
    assert sum(result["survivors"]["stage2"].values()) == budget.stage2


def test_ask_draws_the_survivors(ask, tmp_path):
    plot = tmp_path / "plot.png"
    assert cli.main([*ask, "--plot", str(plot)]) == 0
    with Image.open(plot) as image:
        assert image.width > 1000


def test_eval_prints_accuracy_by_family(capsys):
    assert cli.main(["eval", "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert all(family in printed for family in [*questions.QUESTION_FAMILIES][:4])
    unpruned, meteor = printed.splitlines()[-1].split()[-2:]  # tokens: a column for each budget
    assert float(unpruned) == 576 and float(meteor) < 80


# ------------------------------------------------------------------ wrong input


def assert_refused(argv, capsys, *words):
    """Exit code 2, one line on stderr with all the words, nothing on stdout."""
    code = cli.main(argv)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, ""), printed
    assert printed.err.startswith("meteor-mini: ") and printed.err.count("\n") == 1, printed
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["demo | ask | eval"]),
        (["ask", "PICTURE", "what", "color"], ["unrecognized arguments: color"]),
        (["ask", "none.png", "why?"], ["none.png does not exist"]),
        (["ask", "PICTURE", "why?", "--plot", "PICTURE"], ["would overwrite"]),
        (["demo", "--model", "nosuch"], ["'nosuch'", "toy"]),
        (["demo", "--model", "nobody/nothing"], ["nobody/nothing could not be fetched"]),
        (["eval", "--out", "somewhere"], ["--out must come with --table"]),
        (["eval", "--table", "1", "--out", "somewhere"], ["--out must come with --model smol"]),
        (["calibrate", "none"], ["none must be a directory with pictures"]),
    ],
)
def test_wrong_arguments_are_refused(argv, words, picture, capsys):
    assert_refused([str(picture) if a == "PICTURE" else a for a in argv], capsys, *words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({2: "  "}, ["question", "empty"]),
        ({2: "is there a zebra?"}, ["zebra", "circle"]),
        ({5: "--tokens", 6: "3"}, ["4 to 576", "got 3"]),
    ],
)
def test_what_the_model_does_not_take_is_refused(ask, capsys, change, words):
    argv = dict(enumerate(ask)) | change
    assert_refused([*argv.values()], capsys, *words)


def test_an_empty_and_a_truncated_picture_are_refused(ask, picture, capsys):
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    assert_refused(ask, capsys, "picture.png cannot be decoded")
    picture.write_bytes(b"")
    assert_refused(ask, capsys, "picture.png is an empty file")


def test_damaged_model_directories_are_refused(ask, folder, tmp_path, untrained, capsys):
    untrained.save_pretrained(tmp_path / "copy")
    ask[-1] = str(tmp_path / "copy")
    weights_file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(weights_file)
    save_file(weights | {"decoder.model.norm.weight": torch.zeros(7)}, weights_file)
    assert_refused(ask, capsys, "does not fit", "decoder.model.norm.weight")
    weights_file.write_bytes(b"version https://git-lfs.github.com")
    assert_refused(ask, capsys, "does not fit")
    weights_file.unlink()
    assert_refused(ask, capsys, "has no model.safetensors")


def test_errors_of_programming_are_not_swallowed(ask, monkeypatch):
    def fail(*_):
        raise AttributeError("a fault in the program")

    monkeypatch.setattr(cli.Meteor, "from_pretrained", fail)
    with pytest.raises(AttributeError):
        cli.main(ask)


def test_asking_a_vision_language_model_imports_nothing_of_the_toy(monkeypatch):
    def are_loaded(*packages):
        return [name for name in sys.modules if name.startswith(packages)]

    for name in are_loaded("meteor_mini", "matplotlib"):
        monkeypatch.delitem(sys.modules, name)  # until the end of the test
    importlib.import_module("meteor_mini.cli")
    importlib.import_module("meteor_mini.vlm")
    imported = are_loaded("meteor_mini.toy", "matplotlib")
    for name in are_loaded("meteor_mini", "matplotlib"):
        del sys.modules[name]
    assert imported == []


def test_the_trained_model_answers_most_families(tmp_path, monkeypatch, capsys):
    toy, right = cli.Meteor.from_pretrained("toy"), 0
    monkeypatch.setattr(cli.Meteor, "from_pretrained", lambda *_: toy)  # loaded once
    for number, family in enumerate(questions.QUESTION_FAMILIES):
        example = questions.make_example(number, "val", family)
        Image.fromarray(example.picture.image).save(tmp_path / "picture.png")
        assert cli.main(["ask", str(tmp_path / "picture.png"), example.question]) == 0
        right += capsys.readouterr().out.splitlines()[0] == example.answer
    assert right >= 9


@pytest.mark.parametrize(
    "argv, words",
    [
        (["eval", "--samples", "0"], "--samples must be 1 or more, got 0"),
        (["bench", "--device", "cuda"], "torch finds no GPU here"),
        (["train", "--data", "x", "--out", "y", "--set", "bf16"], "--set must be NAME=VALUE"),
    ],
)
def test_options_that_cannot_be_are_refused(argv, words, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(argv, capsys, words)

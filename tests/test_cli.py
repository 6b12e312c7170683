"""The command line on an untrained model of the embedded one's classes: output, files, and every
wrong input.

`main(argv)` runs in this process; one test runs `python -m meteor_mini.cli`. What needs trained
weights is skipped until `meteor_mini/toy/checkpoint` is there.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import meteor_mini
from meteor_mini import CHECKPOINTS, Budget, budget_for, cli
from meteor_mini.toy import evaluate, questions, world
from meteor_mini.toy.parts import ENCODERS
from meteor_mini.lab import demo

FAMILIES = list(questions.FAMILIES)
QUESTION = "Is there a red circle?"


@pytest.fixture
def picture(tmp_path):
    """A GlyphWorld picture as a file, alone in a directory of its own."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "picture.png"
    Image.fromarray(world.make_picture(0).image).save(path)
    return path


# ------------------------------------------------------------------ ask


def test_ask_prints_what_the_model_answers(folder, untrained, picture, capsys):
    assert cli.main(["ask", str(picture), QUESTION, "--model", str(folder)]) == 0
    answer = untrained.answer(cli.load_picture(picture), [QUESTION])[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (answer.text or "(nothing)")
    assert lines[1].startswith(
        f"  tokens 576 -> 168 -> 80 -> {demo.short(answer.tokens['stage3'])} "
    )
    assert [line.strip() for line in lines[2:]] == demo.survivor_lines(answer)


@pytest.mark.parametrize(
    "options, tokens",
    [
        ([], (168, 80)),
        (["--tokens", "60"], None),
        (["--tokens", "576"], (576, 576)),
        (["--keep-all"], (576, 576)),
    ],
)
def test_ask_json_and_budgets(folder, untrained, picture, capsys, options, tokens):
    of_60 = budget_for(untrained, 60)
    tokens = tokens or (of_60.stage1, of_60.stage2)
    assert (
        cli.main(["ask", str(picture), QUESTION, "--model", str(folder), "--json", *options]) == 0
    )
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err == "" and list(result) == ["question", "answer", "tokens", "survivors"]
    assert (result["tokens"]["stage1"], result["tokens"]["stage2"]) == tokens
    assert [sum(result["survivors"][stage].values()) for stage in ("stage1", "stage2")] == list(
        tokens
    )
    assert list(result["survivors"]["stage3"]) == list(ENCODERS)
    assert result["tokens"]["stage3"] <= result["tokens"]["stage2"]
    assert (result["tokens"]["stage3"] == 576) == (tokens == (576, 576))


def test_ask_draws_a_png(folder, picture, tmp_path, capsys):
    plot = tmp_path / "plot.PNG"
    assert (
        cli.main(["ask", str(picture), QUESTION, "--model", str(folder), "--plot", str(plot)]) == 0
    )
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > 1000


# ------------------------------------------------------------------ eval


def test_eval_writes_both_rows(folder, untrained, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = [
        "eval",
        "--samples",
        "12",
        "--split",
        "val",
        "--json",
        str(path),
        "--model",
        str(folder),
    ]
    assert cli.main(argv) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert list(result) == ["rows"] and [row["method"] for row in result["rows"]] == [
        "unpruned",
        "meteor",
    ]
    for row, budget in zip(result["rows"], (Budget.none(), untrained.budget)):
        assert list(row) == ["method", "average_tokens", "grid_cells", "accuracy", "families"]
        want = evaluate.accuracy(untrained, budget, "val", 12)
        assert row["grid_cells"] == 144 and list(row["families"]) == FAMILIES
        assert all(row[key] == want[key] for key in ("average_tokens", "accuracy", "families"))
    assert result["rows"][0]["average_tokens"] == 576 > result["rows"][1]["average_tokens"]
    for name in [*FAMILIES, "accuracy", "average tokens"]:
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+$", printed, re.M)


def test_eval_prints_a_table(folder, tmp_path, capsys):
    path = tmp_path / "table.json"
    assert (
        cli.main(
            ["eval", "--model", str(folder), "--table", "1", "--samples", "12", "--json", str(path)]
        )
        == 0
    )
    printed, rows = capsys.readouterr().out, json.loads(path.read_text())["1"]["rows"]
    assert "Table 1" in printed and "rank_reverse, 168" in printed and "paper: Avg" in printed
    assert [row["average_tokens"] for row in rows] == [168] * 3


# ------------------------------------------------------------------ wrong input


def refused(argv, capsys, *words):
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
        (["dance"], ["dance"]),
        (["demo", "--frobnicate"], ["--frobnicate"]),
        (["ask", "PICTURE"], ["QUESTION"]),
        (
            ["ask", "PICTURE", "what", "color", "is", "it"],
            ["the question must stand in quotes", '"what color is it"'],
        ),
        (
            ["ask", "PICTURE", "what", "--tokens", "20", "is", "it"],
            ['in quotes, as one argument: "what is it"'],
        ),
        (
            ["ask", "PICTURE", "what", "is", "--frobnicate"],
            ["unrecognized arguments: is --frobnicate (see meteor-mini ask --help)"],
        ),
        (["ask", "PICTURE", "yes", "--tokens", "3", "--keep-all"], ["--keep-all", "--tokens"]),
        (["ask", "PICTURE", "yes", "--tokens", "10**9"], ["--tokens", "10**9"]),
        (["ask", "none.png", "yes"], ["none.png does not exist"]),
        (["ask", "PICTURE", "yes", "--plot", "none/plot.png"], ["none", "does not exist"]),
        (["ask", "PICTURE", "yes", "--plot", "."], ["it is a directory"]),
        (["ask", "PICTURE", "yes", "--plot", "plot.gif"], [".png"]),
        (["ask", "PICTURE", "yes", "--plot", "PICTURE"], ["overwrite"]),
        (["demo", "--out", "none/demo"], ["none", "does not exist"]),
        (["demo", "--out", "file"], ["file", "not a directory"]),
        (["demo", "--model", "nosuch"], ["'nosuch'", "toy"]),
        (["demo", "--model", "./no/such/model"], ["'./no/such/model'"]),
        (["demo", "--model", "in/picture.png"], ["'in/picture.png'", "hub id (owner/name)"]),
        (
            ["demo", "--model", "nobody/nothing"],
            ["nobody/nothing"],
        ),  # the tests run with the hub switched off
        (["demo", "--model", "."], ["config.json"]),
        (["eval", "--samples", "0"], ["--samples", "1 or more"]),
        (["eval", "--samples", "-5"], ["--samples", "1 or more"]),
        (["eval", "--samples", "many"], ["--samples", "many"]),
        (["eval", "--split", "train"], ["--split", "train"]),
        (["eval", "--json", "none/out.json"], ["none", "does not exist"]),
        (["eval", "--json", "."], ["it is a directory"]),
        (["eval", "--table", "9"], ["--table", "redundancy"]),
        (["eval", "--table", "all", "--split", "val"], ["--split", "--table"]),
    ],
)
def test_refused_before_a_model_is_there(argv, words, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    refused([str(picture) if a == "PICTURE" else a for a in argv], capsys, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options, words",
    [
        ([""], ["question", "empty"]),
        (["   "], ["question", "empty"]),
        (["is there a zebra or a Yak ?"], ["zebra", "Yak", "circle", "tallest"]),
        ([QUESTION, "--tokens", "0"], ["4 to 576", "got 0\n"]),
        ([QUESTION, "--tokens", "-3"], ["4 to 576", "got -3\n"]),
        ([QUESTION, "--tokens", "1000000000"], ["4 to 576", "1000000000"]),
        ([QUESTION, "--tokens", "nan"], ["4 to 576", "nan"]),
    ],
)
def test_refused_by_the_model(options, words, folder, picture, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    refused(
        ["ask", str(picture), *options, "--model", str(folder), "--plot", str(plot)], capsys, *words
    )
    assert not plot.exists()


def broken(folder, tmp_path, damage):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


def wrong_shape(copy):
    weights = load_file(copy / "model.safetensors")
    weights["decoder.model.norm.weight"] = torch.zeros(7)
    save_file(weights, copy / "model.safetensors")


def changed_config(change):
    def damage(copy):
        config = json.loads((copy / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (changed_config(lambda config: config["lambda_table"].update(K=[])), ["lambda_table"]),
        (
            changed_config(lambda config: config["decoder"].update(hidden_size=7)),
            ["config.json", "hidden size (7)"],
        ),
        (lambda copy: (copy / "model.safetensors").unlink(), ["broken", "model.safetensors"]),
        (lambda copy: (copy / "config.json").unlink(), ["broken", "config.json"]),
        (wrong_shape, ["model.safetensors", "decoder.model.norm.weight"]),
        (
            lambda copy: (copy / "model.safetensors").write_bytes(
                b"version https://git-lfs.github.com"
            ),
            [],
        ),
        (lambda copy: (copy / "config.json").write_text("{}"), ["config.json"]),
        (lambda copy: (copy / "config.json").write_text("not json"), []),
    ],
    ids=[
        "empty lambda table",
        "sizes",
        "no weights",
        "no config",
        "wrong shape",
        "no safetensors",
        "empty config",
        "no json",
    ],
)
def test_refused_model_directories(damage, words, folder, picture, tmp_path, capsys):
    refused(
        ["ask", str(picture), QUESTION, "--model", str(broken(folder, tmp_path, damage))],
        capsys,
        *words,
    )


def test_a_preset_without_its_checkpoint(picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CHECKPOINTS, "toy", tmp_path / "checkpoint")
    refused(["ask", str(picture), QUESTION], capsys, "'toy'", "python -m meteor_mini.toy.train")


def test_errors_of_programming_are_not_swallowed(picture, monkeypatch):
    def fault(name):
        raise AttributeError("a fault in the program")

    monkeypatch.setattr(cli, "load_model", fault)
    with pytest.raises(AttributeError):
        cli.main(["ask", str(picture), QUESTION])


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ask", "--help"])
    assert stop.value.code == 0 and "--tokens" in capsys.readouterr().out


def test_version_is_one_line_with_what_a_report_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    line = (
        f"meteor-mini {meteor_mini.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    assert stop.value.code == 0 and capsys.readouterr().out == line


def test_python_m_meteor_mini_cli(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    command = [sys.executable, "-m", "meteor_mini.cli", "ask", str(tmp_path / "text.png"), QUESTION]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.endswith("text.png is in no picture format that Pillow can read\n")
    assert run.stderr.startswith("meteor-mini: picture ") and run.stderr.count("\n") == 1


# ------------------------------------------------------------------ the trained model


@pytest.mark.skipif(
    not (CHECKPOINTS["toy"] / "model.safetensors").exists(), reason="no trained checkpoint"
)
def test_the_trained_model_answers_most_families(tmp_path, capsys):
    right = 0
    for number, family in enumerate(FAMILIES):
        example = evaluate.make_example(number, "test", family)
        Image.fromarray(example.picture.image).save(tmp_path / "picture.png")
        assert cli.main(["ask", str(tmp_path / "picture.png"), example.question]) == 0
        right += capsys.readouterr().out.splitlines()[0] == example.answer
    assert right >= 9

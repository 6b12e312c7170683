"""The command line on an untrained model of the embedded one's classes: output, files, and every
wrong input.

`main(argv)` runs in this process; one test runs `python -m meteor_mini`. What needs trained weights
is skipped until `meteor_mini/checkpoint` is there.
"""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from meteor_mini.presets import GLYPH_DECODER, GLYPH_ENCODERS
from PIL import Image
from safetensors.torch import load_file, save_file

import meteor_mini
import stage3_decode
from meteor_mini import CHECKPOINTS, Answer, Budget, Meteor, cli, evaluate, glyphworld, report

FAMILIES = list(glyphworld.FAMILIES)
QUESTION = "Is there a red circle?"
TABLE = {
    "K": [8, 80, 576],
    "lam": [0, 5, 20, 200],  # about what `calibrate` measures on such a model
    "average": [[2, 7, 8, 8], [11, 29, 80, 80], [73, 91, 156, 576]],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A directory with an untrained model."""
    torch.manual_seed(0)
    model = Meteor(
        {
            "encoders": {name: [name, options] for name, options in GLYPH_ENCODERS.items()},
            "decoder": GLYPH_DECODER,
            "words": glyphworld.WORDS,
            "ranks": [[60, 50, 70, 80]] * 3,
            "lambda_table": TABLE,
            "budget": dict(stage1=168, stage2=80, stage3=34),
        }
    )
    path = tmp_path_factory.mktemp("models") / "untrained"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model(folder):
    return Meteor.from_pretrained(folder)


@pytest.fixture
def picture(tmp_path):
    """A GlyphWorld picture as a file, alone in a directory of its own."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "picture.png"
    Image.fromarray(glyphworld.make_picture(0).image).save(path)
    return path


# ------------------------------------------------------------------ demo


@pytest.fixture(scope="session")
def demo(folder, tmp_path_factory):
    """(exit code, stdout, stderr, directory) of one demo."""
    out, printed, errors = tmp_path_factory.mktemp("demo") / "new", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "RUNS", 1)
            code = cli.main(["demo", "--model", str(folder), "--out", str(out)])
    return code, printed.getvalue(), errors.getvalue(), out


def test_demo_writes_a_figure_and_the_bare_picture_for_each_family(demo):
    code, _, errors, out = demo
    assert (code, errors) == (0, "")
    assert sorted(p.name for p in out.glob("*.png")) == sorted(f"{f}.png" for f in FAMILIES)
    for number, family in enumerate(FAMILIES):
        assert Image.open(out / f"{family}.png").width > 1000
        drawn = glyphworld.example(number, "test", family)[0].image
        assert np.array_equal(np.asarray(Image.open(out / "pictures" / f"{family}.png")), drawn)


def test_demo_prints_question_answers_tokens_survivors_and_times(demo, model):
    blocks = demo[1].split("\n\n")[1:-1]
    assert len(blocks) == len(FAMILIES)
    for number, (family, block) in list(enumerate(zip(FAMILIES, blocks)))[::3]:
        picture, question, truth = glyphworld.example(number, "test", family)
        images = evaluate.to_images([picture.image])
        assert block.splitlines()[0] == f"{family}: {question}  (true answer: {truth})"
        for line, name in zip(block.splitlines()[1:3], ("unpruned", "METEOR")):
            budget = model.budget if name == "METEOR" else Budget.none()
            answer = model.answer(images, [question], budget)[0]
            stages = "576 -> 168 -> 80" if name == "METEOR" else "576 -> 576 -> 576"
            tokens = f"{stages} -> {cli.short(answer.tokens['stage3'])}"
            assert re.fullmatch(
                rf"  {name} +{re.escape(answer.text or '(nothing)')} +tokens {tokens} +"
                r"prefill +\d+ ms, answer +\d+ ms",
                line,
            ), line
        for line, total in zip(block.splitlines()[3:5], (168, 80)):
            assert sum(int(n) for n in re.findall(r"(\d+)(?:,|$)", line)) == total, line


def test_demo_ends_with_the_measured_saving(demo):
    found = re.fullmatch(r"tokens ([+-]\d+) %, prefill time ([+-]\d+) %", demo[1].splitlines()[-1])
    rounding = {r"-> ([\d.]+) +prefill": 0.6, r"prefill +(\d+) ms": 2.5}
    for percent, (pattern, tolerance) in zip(found.groups(), rounding.items()):
        before, after = (
            [float(v) for v in re.findall(rf"  {name} .*{pattern}", demo[1])]
            for name in ("unpruned", "METEOR")
        )
        assert len(before) == len(after) == len(FAMILIES)
        assert float(percent) == pytest.approx(100 * sum(after) / sum(before) - 100, abs=tolerance)
    assert int(found[1]) < -90


def test_the_saving_is_of_sums_over_all_questions(model, monkeypatch, capsys):
    first = {
        "unpruned": {"tokens": 600, "prefill": 30, "right": True},
        "METEOR": {"tokens": 100, "prefill": 60, "right": False},
    }
    other = {name: {"tokens": 100, "prefill": 10, "right": True} for name in first}
    monkeypatch.setattr(cli, "load_model", lambda name: model)
    monkeypatch.setattr(
        cli, "demo_question", lambda m, budgets, index, *_: other if index else first
    )
    assert cli.main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "tokens -38 %, prefill time +30 %"  # 800 / 1300, 130 / 100
    assert "unpruned 8 of 8, METEOR 7 of 8" in lines[-2]


def test_the_figure_shows_the_last_answer_and_what_all_said(monkeypatch):
    answers = {
        name: Answer(name + "!", {"stage3": tokens}, [], {}, {"stage1": name})
        for name, tokens in {"unpruned": 576, "METEOR": 34.06}.items()
    }
    monkeypatch.setattr(cli, "survivor_figure", lambda *args: args)
    image, texts, kept = cli.figure(torch.zeros(1, 3, 8, 8), {"question": "?"}, answers)
    assert image.shape == (3, 8, 8) and kept == {"stage1": "METEOR"}
    assert texts == {
        "question": "?",
        "unpruned, 576 tokens per LLM layer": "unpruned!",
        "METEOR, 34.1 tokens per LLM layer": "METEOR!",
    }


def test_the_budgets_are_timed_in_turns_and_the_median_counts(model, monkeypatch):
    took, calls = (
        [1, 2, 3, 4] + [5, 6, 7, 8] + [100, 0, 100, 0],
        [],
    )  # seconds, of three rounds of four runs
    clock = iter([t for seconds in took for t in (0, seconds)])
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(model, "encode_no_grad", lambda images, budget: f"encoded by {budget}")
    monkeypatch.setattr(model, "generate", lambda *args, **extra: calls.append((*args, extra)))
    times = cli.timings(model, None, "?", {"a": 1, "b": 2})
    first = {"max_new_tokens": 1}
    assert calls[:4] == [
        (f"encoded by {b}", ["?"], b, extra) for extra in (first, {}) for b in (1, 2)
    ]
    assert times == {"a": {"prefill": 5000, "answer": 7000}, "b": {"prefill": 2000, "answer": 4000}}


# ------------------------------------------------------------------ ask


def test_ask_prints_what_the_model_answers(folder, model, picture, capsys):
    assert cli.main(["ask", str(picture), QUESTION, "--model", str(folder)]) == 0
    answer = model.answer(cli.load_picture(picture), [QUESTION])[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (answer.text or "(nothing)")
    assert lines[1].startswith(
        f"  tokens 576 -> 168 -> 80 -> {cli.short(answer.tokens['stage3'])} "
    )
    assert [line.strip() for line in lines[2:]] == cli.survivor_lines(answer)


@pytest.mark.parametrize(
    "options, tokens",
    [
        ([], (168, 80)),
        (["--tokens", "60"], None),
        (["--tokens", "576"], (576, 576)),
        (["--keep-all"], (576, 576)),
    ],
)
def test_ask_json_and_budgets(folder, model, picture, capsys, options, tokens):
    tokens = tokens or (model.budget_for(60).stage1, model.budget_for(60).stage2)
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
    assert list(result["survivors"]["stage3"]) == list(GLYPH_ENCODERS)
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


def test_eval_writes_both_rows(folder, model, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["eval", "--samples", "8", "--split", "val", "--json", str(path), "--model", str(folder)]
    assert cli.main(argv) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert list(result) == ["rows"] and [row["method"] for row in result["rows"]] == [
        "unpruned",
        "meteor",
    ]
    for row, budget in zip(result["rows"], (Budget.none(), model.budget)):
        assert list(row) == ["method", "average_tokens", "grid_cells", "accuracy", "families"]
        want = evaluate.accuracy(model, budget, "val", 8)
        assert row["grid_cells"] == 144 and list(row["families"]) == FAMILIES
        assert all(row[key] == want[key] for key in ("average_tokens", "accuracy", "families"))
    assert result["rows"][0]["average_tokens"] == 576 > result["rows"][1]["average_tokens"]
    for name in [*FAMILIES, "accuracy", "average tokens"]:
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+$", printed, re.M)


@pytest.mark.parametrize("options", [[], ["--table", "1"]], ids=["rows", "table"])
def test_eval_refuses_what_stage_3_cannot_serve_before_it_asks_anything(
    options, folder, tmp_path, capsys, monkeypatch
):
    counted = []
    monkeypatch.setattr(evaluate, "accuracy", lambda *args: counted.append(args))
    monkeypatch.setattr(report, "report", lambda *args: counted.append(args))
    monkeypatch.setattr(
        stage3_decode, "LAYER_ARGUMENTS", ("hidden_states", "attention_mask", "rotary_tables")
    )
    refused(
        ["eval", "--model", str(folder), *options],
        capsys,
        "has no 'rotary_tables', which stage 3 needs",
    )
    assert not counted


def test_eval_prints_a_table(folder, tmp_path, capsys):
    path = tmp_path / "table.json"
    assert (
        cli.main(
            ["eval", "--model", str(folder), "--table", "1", "--samples", "8", "--json", str(path)]
        )
        == 0
    )
    printed, rows = capsys.readouterr().out, json.loads(path.read_text())["1"]["rows"]
    assert "Table 1" in printed and "rank_reverse, 84" in printed and "paper: Avg" in printed
    assert [row["average_tokens"] for row in rows] == [168] * 3 + [84] * 3


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
        (["demo", "--model", "nosuch"], ["'nosuch'", "glyph"]),
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
    monkeypatch.setitem(CHECKPOINTS, "glyph", tmp_path / "checkpoint")
    refused(["ask", str(picture), QUESTION], capsys, "'glyph'", "python -m meteor_mini.train")


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
    line = f"meteor-mini {meteor_mini.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    assert stop.value.code == 0 and capsys.readouterr().out == line


def test_python_m_meteor_mini(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    command = [sys.executable, "-m", "meteor_mini", "ask", str(tmp_path / "text.png"), QUESTION]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.endswith("text.png is in no picture format that Pillow can read\n")
    assert run.stderr.startswith("meteor-mini: picture ") and run.stderr.count("\n") == 1


# ------------------------------------------------------------------ the trained model


@pytest.mark.skipif(
    not (CHECKPOINTS["glyph"] / "model.safetensors").exists(), reason="no trained checkpoint"
)
def test_the_trained_model_answers_most_families(tmp_path, capsys):
    right = 0
    for number, family in enumerate(FAMILIES):
        picture, question, truth = glyphworld.example(number, "test", family)
        Image.fromarray(picture.image).save(tmp_path / "picture.png")
        assert cli.main(["ask", str(tmp_path / "picture.png"), question]) == 0
        right += capsys.readouterr().out.splitlines()[0] == truth
    assert right >= 6

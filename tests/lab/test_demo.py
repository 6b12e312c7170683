"""`meteor-mini demo` on an untrained model of the embedded classes: what it prints and draws."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from meteor_mini import Answer, Budget, cli
from meteor_mini.toy.evaluate import images_and_questions, make_example
from meteor_mini.toy.questions import FAMILIES as GROUP_OF_FAMILY
from meteor_mini.lab import demo

FAMILIES = list(GROUP_OF_FAMILY)


@pytest.fixture(scope="module")
def shown(folder, tmp_path_factory):
    """(exit code, stdout, stderr, directory) of one demo."""
    out, printed, errors = tmp_path_factory.mktemp("demo") / "new", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "RUNS", 1)
            code = cli.main(["demo", "--model", str(folder), "--out", str(out)])
    return code, printed.getvalue(), errors.getvalue(), out


def test_demo_writes_a_figure_and_the_bare_picture_for_each_family(shown):
    code, _, errors, out = shown
    assert (code, errors) == (0, "")
    assert sorted(p.name for p in out.glob("*.png")) == sorted(f"{f}.png" for f in FAMILIES)
    for number, family in enumerate(FAMILIES):
        assert Image.open(out / f"{family}.png").width > 1000
        drawn = make_example(demo.FIRST + number, "test", family).picture.image
        assert np.array_equal(np.asarray(Image.open(out / "pictures" / f"{family}.png")), drawn)


def test_demo_prints_question_answers_tokens_survivors_and_times(shown, untrained):
    blocks = shown[1].split("\n\n")[1:-1]
    assert len(blocks) == len(FAMILIES)
    for number, (family, block) in list(enumerate(zip(FAMILIES, blocks)))[::3]:
        example = make_example(demo.FIRST + number, "test", family)
        images, questions = images_and_questions([example])
        head = f"{family}: {example.question}  (true answer: {example.answer})"
        assert block.splitlines()[0] == head
        for line, name in zip(block.splitlines()[1:3], ("unpruned", "METEOR")):
            budget = untrained.budget if name == "METEOR" else Budget.none()
            answer = untrained.answer(images, questions, budget)[0]
            stages = "576 -> 168 -> 80" if name == "METEOR" else "576 -> 576 -> 576"
            tokens = f"{stages} -> {demo.short(answer.tokens['stage3'])}"
            assert re.fullmatch(
                rf"  {name} +{re.escape(answer.text or '(nothing)')} +tokens {tokens} +"
                r"prefill +\d+ ms, answer +\d+ ms",
                line,
            ), line
        for line, total in zip(block.splitlines()[3:5], (168, 80)):
            assert sum(int(n) for n in re.findall(r"(\d+)(?:,|$)", line)) == total, line


def test_demo_ends_with_the_measured_saving(shown):
    found = re.fullmatch(r"tokens ([+-]\d+) %, prefill time ([+-]\d+) %", shown[1].splitlines()[-1])
    rounding = {r"-> ([\d.]+) +prefill": 0.6, r"prefill +(\d+) ms": 2.5}
    for percent, (pattern, tolerance) in zip(found.groups(), rounding.items()):
        before, after = (
            [float(v) for v in re.findall(rf"  {name} .*{pattern}", shown[1])]
            for name in ("unpruned", "METEOR")
        )
        assert len(before) == len(after) == len(FAMILIES)
        assert float(percent) == pytest.approx(100 * sum(after) / sum(before) - 100, abs=tolerance)
    assert int(found[1]) < -90


def test_the_saving_is_of_sums_over_all_questions(untrained, monkeypatch, capsys):
    first = {
        "unpruned": {"tokens": 600, "prefill": 30, "right": True},
        "METEOR": {"tokens": 100, "prefill": 60, "right": False},
    }
    other = {name: {"tokens": 100, "prefill": 10, "right": True} for name in first}
    monkeypatch.setattr(cli, "load_model", lambda name: untrained)
    monkeypatch.setattr(
        demo, "demo_question", lambda m, budgets, index, *_: other if index else first
    )
    assert cli.main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "tokens -29 %, prefill time +21 %"  # 1200 / 1700, 170 / 140
    assert "unpruned 12 of 12, METEOR 11 of 12" in lines[-2]


def test_the_figure_shows_the_last_answer_and_what_all_said(monkeypatch):
    answers = {
        name: Answer(name + "!", {"stage3": tokens}, [], {}, {"stage1": name})
        for name, tokens in {"unpruned": 576, "METEOR": 34.06}.items()
    }
    monkeypatch.setattr(demo, "survivor_figure", lambda *args: args)
    image, texts, kept = demo.figure(torch.zeros(1, 3, 8, 8), {"question": "?"}, answers)
    assert image.shape == (3, 8, 8) and kept == {"stage1": "METEOR"}
    assert texts == {
        "question": "?",
        "unpruned, 576 tokens per LLM layer": "unpruned!",
        "METEOR, 34.1 tokens per LLM layer": "METEOR!",
    }


def test_the_budgets_are_timed_in_turns_and_the_median_counts(untrained, monkeypatch):
    calls = []
    took = [1, 2, 3, 4] + [5, 6, 7, 8] + [100, 0, 100, 0]  # seconds, of three rounds of four runs
    clock = iter([t for seconds in took for t in (0, seconds)])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(untrained, "encode", lambda images, budget: f"encoded by {budget}")
    monkeypatch.setattr(untrained, "generate", lambda *args, **extra: calls.append((*args, extra)))
    times = demo.timings(untrained, None, "?", {"a": 1, "b": 2})
    first = {"max_new_tokens": 1}
    assert calls[:4] == [
        (f"encoded by {b}", ["?"], b, extra) for extra in (first, {}) for b in (1, 2)
    ]
    assert times == {"a": {"prefill": 5000, "answer": 7000}, "b": {"prefill": 2000, "answer": 4000}}

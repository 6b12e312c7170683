"""demo.py on an untrained model: what it prints and writes. Run: pytest tests/test_demo.py"""

import re

import numpy as np
import pytest
from PIL import Image

from meteor_mini import Budget
from meteor_mini import demo as demo_file
from meteor_mini.toy.questions import images_and_questions, make_example

QUESTION_FAMILIES = ["color", "cell"]


@pytest.fixture(scope="module")
def printed_and_out(untrained, one_word, tmp_path_factory):
    """What the demo of two families, with answers of one word, prints, and where it writes."""
    out = tmp_path_factory.mktemp("demo") / "new"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_file, "RUNS", 1)
        patch.setattr(demo_file, "QUESTION_FAMILIES", QUESTION_FAMILIES)
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        demo_file.demo(untrained, out)
    return "\n".join(lines), out


def test_counts_and_answers_are_those_of_the_model(printed_and_out, untrained):
    blocks = printed_and_out[0].split("\n\n")[1:-1]
    assert len(blocks) == len(QUESTION_FAMILIES)
    for number, (family, block) in enumerate(zip(QUESTION_FAMILIES, blocks)):
        example = make_example(demo_file.FIRST + number, "test", family)
        head, *lines = block.splitlines()
        assert head == f"{family}: {example.question}  (true answer: {example.answer})"
        budgets = {"unpruned": Budget.keep_all(), "METEOR": untrained.budget}
        for line, (name, budget) in zip(lines, budgets.items()):
            answer = untrained.answer(*images_and_questions([example]), budget)[0]
            start = f"  {name:8}  {answer.text or '(nothing)':8}  tokens "
            assert line.startswith(start + demo_file.token_line(answer))
        assert [line.strip() for line in lines[2:]] == demo_file.survivor_lines(answer)


def test_ends_with_the_change_over_all_questions(printed_and_out):
    text, _ = printed_and_out
    for percent, pattern in zip(
        re.fullmatch(r"tokens (.+) %, prefill time (.+) %", text.splitlines()[-1]).groups(),
        (r"  {} .*-> ([\d.]+) +prefill", r"  {} .*prefill +(\d+) ms"),
    ):
        unpruned, meteor = (
            sum(map(float, re.findall(pattern.format(name), text)))
            for name in ("unpruned", "METEOR")
        )
        assert float(percent) == pytest.approx(100 * meteor / unpruned - 100, abs=3)


def test_writes_a_figure_and_the_bare_picture_of_each_family(printed_and_out):
    _, out = printed_and_out
    for number, family in enumerate(QUESTION_FAMILIES):
        assert Image.open(out / f"{family}.png").width > 1000
        picture = make_example(demo_file.FIRST + number, "test", family).picture.image
        assert np.array_equal(Image.open(out / "pictures" / f"{family}.png"), picture)


def test_the_clock_runs_from_the_picture_on(monkeypatch):
    clock = [0.0]

    class Model:
        def encode(self, *_):
            clock[0] += 3

        def generate(self, *_, **options):
            clock[0] += 1 if options else 2

    monkeypatch.setattr(demo_file.time, "perf_counter", lambda: clock[0])
    times = demo_file.measure_times(Model(), None, None, {"METEOR": None})
    assert times == {"METEOR": {"prefill": 4000, "answer": 5000}}


def test_right_answers_are_counted_for_each(untrained, monkeypatch, tmp_path, capsys):
    example = make_example(demo_file.FIRST, "test", "color")
    monkeypatch.setattr(demo_file, "QUESTION_FAMILIES", ["color"])
    monkeypatch.setattr(demo_file, "RUNS", 1)
    answer = type(untrained).answer

    def right_if_pruned(model, images, questions, budget):
        (one,) = answer(model, images, questions, budget)
        one.text = "?" if budget == Budget.keep_all() else example.answer
        return [one]

    monkeypatch.setattr(type(untrained), "answer", right_if_pruned)
    demo_file.demo(untrained, tmp_path)
    assert "unpruned 0 of 1, METEOR 1 of 1" in capsys.readouterr().out

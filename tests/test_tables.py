"""The tables' rows on the untrained model: the counts that they promise; what is measured of them,
by hand; the CSV files and the page.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from meteor_mini import Budget, methods, page, tables
from meteor_mini.evaluate import families_by_kind
from meteor_mini.findings import FINDINGS
from meteor_mini.methods import Row, stages
from meteor_mini.toy.questions import example_batches, images_and_questions

KINDS = list(families_by_kind())


pytestmark = pytest.mark.usefixtures("one_word")


@pytest.fixture(scope="module")
def rows(untrained):
    """All rows, their lambdas not solved: that takes long, and has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (tables, methods):
            patch.setattr(module, "solve_for_average", lambda *_: 2.0)
        return {name: build(untrained) for name, build in tables.TABLES.items()}


@pytest.fixture(scope="module")
def batch():
    (examples,) = example_batches("val", 2)
    return images_and_questions(examples)


def numbers_in(method):
    words = method.replace("-", " ").replace(",", " ").split()
    return [int(word) for word in words if word.isdigit()]


# ------------------------------------------------------------------------ counts that make averages


@pytest.mark.parametrize("average", [34, 40, 55])
def test_fixed_counts_are_the_nearest_whole_ones_that_make_an_average(untrained, average):
    counts = tables.fixed_counts(untrained, average)
    assert list(counts) == tables.own_layers(untrained) == [1, 3, 5]
    spans = [2, 2, 3]  # layers with each count
    total = untrained.budget.stage2 + sum(n * K for n, K in zip(spans, counts.values()))
    assert abs(total / 8 - average) <= 2 / 8
    proportion = np.array(list(counts.values())) / sum(counts.values())
    assert np.allclose(proportion, np.array([390, 172, 78]) / 640, atol=0.03)


def test_averages_stand_to_each_other_as_the_papers_above_what_stage_3_cannot_reach(untrained):
    assert tables.tokens_before_stage3(untrained) == 80 * 1 / 8
    assert tables.average_like(untrained, 242, 34) == 34
    assert tables.average_like(untrained, 72, 34) == 10
    assert tables.average_like(untrained, (72 + 242) / 2, 34) == 22


# ------------------------------------------------------------------------------------- the rows


def test_methods_are_unique_and_compare_with_a_row_above(rows):
    for table in rows.values():
        above = []
        for row in table:
            assert row.method not in above and (row.against is None or row.against in above)
            above.append(row.method)


@torch.no_grad()
def test_tables_1_2_and_6_make_as_many_visual_tokens_as_they_say(untrained, rows, batch):
    for name in ("1", "2", "6"):
        for row in rows[name]:
            if numbers_in(row.method) and row.pruner is None:
                tokens = row.encode(untrained, batch[0]).fused.tokens
                assert tokens.shape[1] == numbers_in(row.method)[-1], row.method


@torch.no_grad()
def test_shares_follow_their_strategy(untrained, rows, batch):
    ranks = untrained.ranks[-1]
    low, high = int(ranks.argmin()), int(ranks.argmax())
    for row in rows["1"]:
        kept = [idx.shape[1] for idx in row.encode(untrained, batch[0]).stage1_idx]
        more = kept[high] - kept[low]
        strategy = row.method.split(",")[0]
        expected = {"rank": more > 1, "average": abs(more) <= 1, "rank_reverse": more < -1}
        assert expected[strategy], (row.method, kept)


def test_pruned_rows_keep_the_average_that_their_table_promises(untrained, rows, batch):
    def tokens(row):
        return row.answer(untrained, *batch)[0].tokens["stage3"]

    own = untrained.budget
    tight = (own.stage2 / 8 + own.stage3) / 2
    for row in rows["3"]:
        if row.method.startswith("fixed"):
            assert tokens(row) == pytest.approx(tight, abs=0.5), row.method
    for row in rows["7"][1:3]:
        assert tokens(row) == pytest.approx(0.45 * 144, abs=0.6), row.method


# ------------------------------------------------------------------------------- what is measured


SMALL = [
    Row("clip", stages(20, encoders=("clip",))),
    Row("random", stages(60, 30, fusion="random"), None, "clip", "below", True),
]


@pytest.fixture(scope="module")
def small(untrained):
    """A table of two rows, one of them random, on two questions of each family, of which a row
    answers those right whose first visual token has a positive first channel.
    """

    def answer(row, model, images, questions):
        with torch.no_grad():
            encoded = row.encode(model, images)
        answers = untrained.answer(encoded, questions, Budget.keep_all())
        truths = {example.question: example.answer for example in next(example_batches("test", 24))}
        for token, question, one in zip(encoded.fused.tokens, questions, answers):
            one.text = truths[question] if token[0, 0] > 0 else "?"
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables.TABLES, "1", lambda model: SMALL)
        patch.setattr(Row, "answer", answer)
        yield tables.measure(untrained, ["1"], 24, seeds=[3, 4])


def test_a_row_for_each_method_seed_and_family(small):
    assert list(small.columns) == tables.FIELDS
    found = list(zip(small["method"], small["seed"], small["family"]))
    expected = [("clip", 3, kind) for kind in KINDS]
    expected += [("random", seed, kind) for seed in (3, 4) for kind in KINDS]
    assert found == expected
    first = small.iloc[:2].to_dict("records")
    assert [line["questions"] for line in first] == [24, 10] and first[0]["tokens"] == 20
    assert small[small["method"] == "clip"]["difference"].isna().all()
    assert small[small["method"] == "random"]["difference"].notna().all()


@pytest.mark.parametrize(
    "paper, intervals, verdict",
    [
        ("above", [(1, 3)], "above: shown"),
        ("above", [(-3, -1)], "above: reversed"),
        ("below", [(-3, -1)], "below: shown"),
        ("below", [(1, 3)], "below: reversed"),
        ("below", [(-3, 0)], "below: not shown"),
        ("below", [(-3, -1), (-2, 1)], "below: not shown"),  # one of two seeds alone
        (None, [(1, 3)], ""),
    ],
)
def test_a_ranking_of_the_paper_is_shown_where_every_interval_is_on_its_side(
    paper, intervals, verdict
):
    lines = pd.DataFrame(intervals, columns=["difference_low", "difference_high"])
    lines = lines.assign(paper=paper, family="OCR & Chart")
    assert page.paper_ranking(lines) == verdict


# ------------------------------------------------------------------------- CSV files and the page


def test_the_page_is_written_from_the_csv_files_alone(small, tmp_path):
    page.save(tmp_path, "1", small)
    (tmp_path / "1.png").unlink()
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "![Table 1: how encoders share the budget](1.png)" in text
    assert (tmp_path / "1.png").exists()
    first, random = text.split("```")[1].splitlines()[2:4]
    stored = page.read(tmp_path, "1")
    clip = stored.iloc[0]
    assert f"{clip['accuracy']:.1f} [{clip['low']:.1f}, {clip['high']:.1f}]" in first
    seeds = stored[(stored["method"] == "random") & (stored["family"] == "all")]
    gain = seeds["difference"]
    assert f"{gain.mean():+.1f} [{gain.min():+.1f}, {gain.max():+.1f}]" in random


def test_the_csv_file_holds_what_was_measured(small, tmp_path):
    page.save(tmp_path, "1", small)
    got = page.read(tmp_path, "1")
    pd.testing.assert_frame_equal(got, small, rtol=1e-4, check_dtype=False)
    assert page.read(tmp_path, "3") is None and page.read(tmp_path, "ranks") is None


def test_a_report_that_was_stopped_goes_on(untrained, small, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(model, names, samples, seeds=None):
        asked.extend(names)
        if names == ["3"] and asked.count("3") == 1:
            raise KeyboardInterrupt
        return small.assign(table=names[0])

    monkeypatch.setattr(tables, "measure", measure)
    monkeypatch.setattr(page, "draw", lambda folder, name: None)
    with pytest.raises(KeyboardInterrupt):
        tables.report(untrained, ["2", "3", "1"], 24, tmp_path)
    assert page.read(tmp_path, "2") is not None and page.read(tmp_path, "3") is None
    tables.report(untrained, ["3", "1"], 24, tmp_path)
    assert asked == ["2", "3", "3", "1"]
    assert list(pd.read_csv(tmp_path / "tables.csv", dtype=str)["table"].unique()) == [
        "1",
        "2",
        "3",
    ]
    assert "## Table 3" in capsys.readouterr().out
    for file in tmp_path.iterdir():
        file.unlink()
    tables.report(untrained, ["2"], 24)  # nothing is written
    assert asked[-1] == "2" and not list(tmp_path.iterdir())


def test_every_table_and_finding_has_its_text():
    assert set(tables.TABLES) | set(FINDINGS) <= page.placeholders(page.TEXT)
    assert set(page.FIGURES) == set(FINDINGS)

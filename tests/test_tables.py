"""The tables' rows on the untrained model: the counts that they promise; what is measured of them,
by hand; the CSV files and the page.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_model

import stage1_encode
from meteor_mini import Budget, baselines, page, tables
from meteor_mini.evaluate import difference, families_by_kind, mean
from meteor_mini.findings import FINDINGS
from meteor_mini.toy.questions import QUESTION_FAMILIES, example_batches, images_and_questions

KINDS = list(families_by_kind())


pytestmark = pytest.mark.usefixtures("one_word")


@pytest.fixture(scope="module")
def rows(untrained):
    """All rows, their lambdas not solved: that takes long, and has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "solve_on_validation", lambda *_: 2.0)
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


def test_lambda_is_solved_for_an_average(untrained, monkeypatch):
    def few(split, samples, first):
        assert (split, samples) == ("val", 96)
        return example_batches(split, 4, first=first)

    monkeypatch.setattr(tables, "example_batches", few)
    encode = tables.stages(168, 80)
    lam = tables.solve_on_validation(untrained, encode, 30, untrained.budget)
    examples = next(example_batches("val", 4, first=50_000))
    images, questions = images_and_questions(examples)
    pruner = tables.adaptive_pruner(untrained.budget, lam)
    answers = untrained.answer(encode(untrained, images), questions, Budget.keep_all(), pruner)
    assert np.mean([answer.tokens["stage3"] for answer in answers]) == pytest.approx(30, abs=0.2)


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


@torch.no_grad()
def test_rows_share_stage_1_and_nothing_else(untrained, batch):
    images, _ = batch
    for fusion, want in baselines.FUSIONS.items():
        if fusion == "random":
            continue
        shared = tables.stages(100, 40, fusion=fusion)(untrained, images).fused
        encoders, pixels = list(untrained.encoders.values()), untrained.pixels(images)
        features, kept = stage1_encode.encode_all(encoders, pixels, 100, untrained.ranks)
        alone = untrained.fuse(features, kept, 40, want).fused
        assert torch.equal(shared.keep_idx, alone.keep_idx)
        torch.testing.assert_close(shared.tokens, alone.tokens)
    hits = tables.stage1_features.cache_info().hits
    tables.stages(100, 30)(untrained, images)
    assert tables.stage1_features.cache_info().hits == hits + 1
    others = images.flip(0)  # not the same pictures
    tokens = tables.stages(100)(untrained, others).fused.tokens
    want = untrained.encode(others, Budget(stage1=100)).fused.tokens
    torch.testing.assert_close(tokens, want)


def test_flops_count_a_row_whole_and_prumerges_encoders_once(untrained):
    names = list(untrained.encoders)
    stage1_encode.COUNTS.clear()  # as if it had seen none of the encoders
    full = tables.encoding_flops(untrained, tables.Row("", tables.stages()))
    assert tables.encoding_flops(untrained, tables.Row("", tables.stages())) == full  # not shared
    half = tables.encoding_flops(untrained, tables.Row("", tables.stages(168)))
    assert 0.3 * full < half < 0.9 * full
    merged = tables.encoding_flops(untrained, tables.prumerge_row(names, 48))
    assert 0.8 * full < merged < 1.05 * full


def test_eagle_is_there_where_its_weights_are(untrained, batch, tmp_path, monkeypatch):
    assert tables.eagle_rows(untrained, "unpruned") == []
    fusion = baselines.channel_fusion(untrained)
    save_model(fusion, str(tmp_path / "eagle.safetensors"))
    monkeypatch.setattr(untrained, "folder", tmp_path)
    (row,) = tables.eagle_rows(untrained, "unpruned")
    with torch.no_grad():
        got = row.encode(untrained, batch[0]).fused.tokens
        want = baselines.encode_channels(untrained, fusion, batch[0]).fused.tokens
    torch.testing.assert_close(got, want)
    assert row.answer(untrained, *batch)[0].tokens["stage3"] == 144


# ------------------------------------------------------------------------------- what is measured


SMALL = [
    tables.Row("clip", tables.stages(20, encoders=("clip",))),
    tables.Row("random", tables.stages(60, 30, fusion="random"), None, "clip", "below", True),
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
        patch.setattr(tables.Row, "answer", answer)
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


def test_seeds_choose_differently_and_always_the_same(small, untrained, batch):
    by_seed = [small[(small["seed"] == seed) & (small["method"] == "random")] for seed in (3, 4)]
    assert list(by_seed[0]["accuracy"]) != list(by_seed[1]["accuracy"])
    assert list(by_seed[0]["tokens"]) == list(by_seed[1]["tokens"])
    row, chosen = SMALL[1], []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        chosen.append(row.encode(untrained, batch[0]).fused.keep_idx)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_lines_are_of_the_questions_of_their_kind():
    family = list(QUESTION_FAMILIES) * 2
    answers = pd.DataFrame({"family": family, "right": [True] * 12 + [False] * 12})
    answers = answers.assign(tokens=np.arange(24.0), flops=np.arange(24.0) * 10)
    other = answers.assign(right=[name == "tag" for name in family])
    lines = {line["family"]: line for line in tables.compare(answers, other, encoding=5)}
    assert list(lines) == KINDS
    assert lines["all"]["accuracy"] == 50 and lines["tag"]["difference"] == -50
    assert (lines["presence"]["tokens"], lines["presence"]["flops"]) == (6, 65)
    general = answers["family"].isin(families_by_kind()["General"])
    right = 100 * answers["right"][general]
    assert tuple(lines["General"][key] for key in ("accuracy", "low", "high")) == mean(right)
    gain = difference(right, 100 * other["right"][general])
    names = ("difference", "difference_low", "difference_high")
    assert tuple(lines["General"][key] for key in names) == gain


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
    assert set(page.TEXTS) == set(tables.TABLES) | set(FINDINGS)
    assert set(page.FIGURES) == set(FINDINGS)

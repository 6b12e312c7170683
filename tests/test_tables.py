"""The tables' arithmetic against cases by hand, and every table end to end on a handful of questions."""
import json
import math

import pytest
import torch

from meteor_mini import Budget, load, report, tables


@pytest.fixture(scope="module")
def model():
    return load("glyph")


def test_fastv_makes_the_wanted_average():
    for K, average, layer, L in ((576, 297, 1, 32), (110, 33, 1, 8), (2880, 1500, 2, 32)):
        keep = tables.fastv_count(K, average, layer, L)
        assert abs((K * layer + keep * (L - layer)) / L - average) <= 0.5
    assert tables.fastv_count(576, 297, 1, 32) == 288  # the paper's row


def test_pyramid_counts_make_the_wanted_average_in_geometric_steps():
    assert tables.pyramid_counts(64, (64 + 32 + 16 + 8) / 4) == [32, 16, 8]
    for K, average in ((110, 33), (576, 288), (144, 100)):
        assert abs((K + sum(tables.pyramid_counts(K, average))) / 4 - average) <= 0.5


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert tables.divergence(p, q).tolist() == pytest.approx(expected)
    assert tables.divergence(p, p).tolist() == pytest.approx([0, 0])


@torch.no_grad()
def test_last_attention_equals_the_librarys_own_weights(model):
    questions = ["is there a red circle ?", "describe the picture ."]
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    encoded = model.encode(images, Budget(stage1=40, stage2=20))
    got = tables.last_attention(model, encoded, questions)
    embeds, attention_mask, visual_mask = model.prompt(encoded, questions)
    model.decoder.set_attn_implementation("eager")
    try:
        weights = model.decoder(inputs_embeds=embeds, attention_mask=attention_mask, output_attentions=True).attentions[-1]
    finally:
        model.decoder.set_attn_implementation("sdpa")
    for b in range(2):
        places = visual_mask[b].nonzero()[:, 0]
        expected = weights[b][:, places[-1] + 1:, places].mean(dim=(0, 1))  # heads, text after the picture
        torch.testing.assert_close(got[b], expected / expected.sum(), atol=1e-5, rtol=1e-4)


def test_every_row_compares_with_a_row_above_it(model):
    for build in tables.TABLES.values():
        seen = []
        for row in build(model):
            assert row.label not in seen and (row.against is None or row.against in seen), row.label
            seen.append(row.label)


def test_rows_of_table_3_have_the_same_average(model):
    rows = {row.label: row for row in tables.table3(model)}
    cache = {}
    results = report.measure_rows(model, [r for label, r in rows.items() if label.startswith("fixed")], 8, cache)
    for result in results:
        assert abs(result["average_tokens"] - model.budget.stage3) <= 0.6, result["label"]


def test_lambda_for_solves_the_wanted_average(model):
    budget = Budget(stage1=model.budget.stage1, stage2=model.budget.stage2)
    lams = [tables.lambda_for(model, lambda m, x: m.encode(x, budget), average, 5) for average in (25, 40)]
    assert 0 < lams[0] < lams[1]


def test_the_information_gap_and_full_subset_agree_with_the_accuracies(model):
    result = tables.redundancy(model, 8)
    assert len(result["subsets"]) == 15 and len(result["kl"]) == 4 and all(v >= 0 for v in result["kl"].values())
    assert all(-10 < v <= 1 or math.isnan(v) for cur in result["cur"].values() for v in cur.values())
    full = result["subsets"]["clip+convnext+eva+pix2struct"]["all"]
    for e, cur in result["cur"]["all"].items():
        rest = "+".join(n for n in model.encoders if n != e)
        assert cur == pytest.approx((full - result["subsets"][rest]["all"]) / full)
    assert result["ig"]["all"] == pytest.approx(max(result["cur"]["all"].values()) - min(result["cur"]["all"].values()))


def test_the_report_is_written_and_gives_the_same_numbers_again(model, tmp_path, capsys):
    first = report.report(model, ["2", "figure1", "video"], 8, tmp_path)
    again = report.report(model, ["2", "figure1", "video"], 8, None)
    assert json.dumps(first, default=float) == json.dumps(again, default=float)
    text = (tmp_path / "README.md").read_text()
    assert all(report.TITLES[name] in text for name in ("2", "figure1", "video")) and "paper: DocVQA" in text
    assert json.loads((tmp_path / "tables.json").read_text()).keys() == {"2", "figure1", "video"}
    assert report.TITLES["2"] in capsys.readouterr().out

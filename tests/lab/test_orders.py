"""The paper's orders: which rows each compares, and what an interval says, by hand."""

import numpy as np
import pytest

from meteor_mini import Budget, load
from meteor_mini.toy.evaluate import difference
from meteor_mini.toy.questions import FAMILIES
from meteor_mini.lab import depth, markdown, tables
from meteor_mini.lab import orders as room
from meteor_mini.lab.orders import Measured, compare, find_row, verdict

FAMILY = np.array([name for name in FAMILIES for _ in range(10)])
IS_OCR = np.array([FAMILIES[name] == "OCR & Chart" for name in FAMILY])


@pytest.fixture(scope="module")
def model():
    return load("toy")


@pytest.fixture(scope="module")
def rows(model):
    """Tables of the orders, with an EAGLE-style row, their lambdas not solved."""

    def fusion_rows(model, names, against, paper=None):
        cells = tables.grid_cells(model)
        return [tables.Row(f"{name}, {cells}", Budget.none(), None, against) for name in names]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "lambda_for", lambda *_: 2.0)
        patch.setattr(tables, "fusion_rows", fusion_rows)
        return {name: tables.TABLES[name](model) for name in room.TABLES_OF_ORDERS}


def labels(model, order):
    numbers = tables.label_numbers(model)
    return [label.format_map(numbers) for label in (order.row, order.other)]


def test_there_are_the_issues_fourteen():
    assert len(room.ORDERS) == 14 and len({order.claim for order in room.ORDERS}) == 14
    not_below = [n for n, order in enumerate(room.ORDERS, 1) if order.rule == room.NOT_BELOW]
    assert not_below == [5, 10, 12]
    assert [n for n, o in enumerate(room.ORDERS, 1) if o.questions == "OCR & Chart"] == [4, 8]
    assert [n for n, o in enumerate(room.ORDERS, 1) if o.table == "depth"] == [13, 14]


def test_each_order_finds_two_rows(model, rows):
    for order in room.ORDERS:
        if order.table == "depth":
            continue
        found = [find_row(rows[order.table], label) for label in labels(model, order)]
        assert None not in found and found[0] is not found[1], order


def test_the_papers_numbers_stand_beside_the_rows_that_are_compared(model, rows):
    """And agree with the orders, in the first of their columns that tells them apart."""
    for number, order in enumerate(room.ORDERS, start=1):
        if order.table in ("depth", "main") or number in (5, 12):
            continue
        row, other = (find_row(rows[order.table], label) for label in labels(model, order))
        assert row.paper.keys() == other.paper.keys() and row.paper
        # in the paper, separate pruning is better on POPE, the others on all columns
        assert list(row.paper.values())[-1] > list(other.paper.values())[-1], order


def test_rows_that_are_compared_have_the_same_number_of_tokens_at_the_start(model, rows):
    by_label = {row.label: row for row in rows["1"] + rows["2"]}
    for order in room.ORDERS:
        if order.table in ("1", "2") and "EAGLE" not in order.other:
            counts = [label.split(", ")[1] for label in labels(model, order)]
            assert counts[0] == counts[1] and set(labels(model, order)) <= set(by_label)


def test_orders_of_depth_name_what_is_measured():
    known = {
        depth.share_label(criterion, third, definition)
        for criterion in depth.CRITERIA
        for third in depth.THIRDS
        for definition in depth.DEFINITIONS
    }
    first, last = (order for order in room.ORDERS if order.table == "depth")
    assert {first.row, first.other, last.row, last.other} <= known
    assert first.row.startswith("similarity, first") and last.row.startswith("attention, last")


def test_a_row_is_found_by_its_label_or_its_beginning():
    made = [tables.Row(label, None, None) for label in ("adaptive, 34", "adaptive, 34, layer 1")]
    assert find_row(made, "adaptive, 34") is made[0]
    assert find_row(made, "adaptive, 34,") is made[1]
    assert find_row(made, "fixed") is None
    with pytest.raises(ValueError, match="label must name one row, got 'adaptive'"):
        find_row(made, "adaptive")


@pytest.mark.parametrize(
    "rule, low, high, said",
    [
        ("above", 0.1, 3, "yes"),
        ("above", 0, 3, "not shown"),  # it holds 0
        ("above", -3, 0, "not shown"),
        ("above", -3, -0.1, "reverse"),
        ("not below", -1, 2, "yes"),
        ("not below", -0.5, -0.1, "yes"),
        ("not below", -1.1, 5, "not shown"),
        ("not below", -5, -1, "not shown"),
        ("not below", -5, -1.1, "reverse"),
    ],
)
def test_what_an_interval_says(rule, low, high, said):
    assert verdict(rule, low, high) == said


def side(label, right, tokens=34.0):
    return Measured(label, np.asarray(right, dtype=float), FAMILY, tokens)


def test_a_comparison_is_of_its_own_questions_and_paired():
    rng = np.random.default_rng(0)
    better = rng.random(120) < 0.8
    worse = better & ~(IS_OCR & (rng.random(120) < 0.3))
    everything = room.Order("claim", "1", "", "")
    entry = compare(everything, side("a", better), side("b", worse, 33.5))
    mean, low, high = difference(better, worse)
    assert entry == {
        "order": "claim",
        "questions": "all",
        "difference": mean,
        "interval": [low, high],
        "verdict": "yes",
        "rows": ["a", "b"],
        "tokens": [34.0, 33.5],
        "asked": 120,
    }
    ocr = compare(everything._replace(questions="OCR & Chart"), side("a", better), side("b", worse))
    assert ocr["difference"] == difference(better[IS_OCR], worse[IS_OCR])[0] > mean
    assert ocr["asked"] == IS_OCR.sum()
    general = compare(everything._replace(questions="General"), side("a", better), side("b", worse))
    assert general["difference"] == 0 and general["verdict"] == "not shown"
    turned = compare(everything, side("b", worse), side("a", better))
    assert turned["verdict"] == "reverse" and turned["difference"] == -mean


def test_questions_that_do_not_count_are_left_out():
    order = room.Order("claim", "depth", "", "")
    shares, others = np.full(120, 0.75), np.full(120, 0.5)
    shares[::2] = others[::2] = np.nan
    entry = compare(order, side("a", shares, None), side("b", others, None))
    assert entry["difference"] == 25 and entry["interval"] == [25, 25] and entry["tokens"] is None
    assert entry["asked"] == 60


def test_what_was_not_measured_is_not_shown():
    entry = compare(room.ORDERS[4], side("a", IS_OCR), None)
    assert entry["verdict"] == "not shown" and entry["difference"] is entry["interval"] is None
    assert list(room.without_rows([entry])[0]) == [
        "order",
        "questions",
        "difference",
        "interval",
        "verdict",
    ]


def test_the_page_tells_each_order_and_why_it_does_not_show(monkeypatch):
    none = np.zeros(120)
    entries = []
    for order in room.ORDERS:
        entries.append(compare(order, side("row", IS_OCR), side("other", none)))
    entries[2] = compare(room.ORDERS[2], side("row", none), side("other", none))
    entries[4] = compare(room.ORDERS[4], None, None)
    monkeypatch.setitem(markdown.WHY, 3, "the control tells")
    monkeypatch.setitem(markdown.WHY, 1, "never printed")
    text = markdown.section("orders", {"orders": entries})
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 14
    assert lines[0].startswith("| 1 | rank-based allocation above average | above | all (120) |")
    assert "| row - other | 34.0 / 34.0 | +58.3 [" in lines[0]
    assert lines[0].endswith("] | **yes** |")
    assert lines[2].endswith("| +0.0 [0.0, 0.0] | not shown |")
    assert "not measured" in lines[4]
    assert "- 3: the control tells" in text and "never printed" not in text

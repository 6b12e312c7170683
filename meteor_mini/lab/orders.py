"""The orders that the paper finds, as data, and what the embedded model shows of each.

An order compares two things that were measured on the same questions: two rows of a table, at equal
averages of tokens, or what two criteria keep. A row is the one beside which the paper's number
stands: rank-based and average allocation, say, at the paper's share of tokens after stage 1.
"""

from typing import NamedTuple

import numpy as np

from ..toy.evaluate import difference
from .tables import Row, question_groups

ABOVE, NOT_BELOW = "above", "not below"  # see `verdict`
BELOW = -1.0  # points: who is this far below another or less, is not below
YES, NOT_SHOWN, REVERSE = "yes", "not shown", "reverse"


class Order(NamedTuple):
    """One order of the paper.

    claim: in words, short enough for a table; table: of `tables.TABLES`, or "depth"; row, other:
    labels of the rows that are compared, row minus other, where {} hold names of
    `tables.label_numbers`; in "depth" they are labels of `depth.share_label`; questions: "all", or
    one of `tables.GROUPS`; rule: of `verdict`; times: how many times the
    tables' questions are asked, more than once where two rows seldom differ.
    """

    claim: str
    table: str
    row: str
    other: str
    questions: str = "all"
    rule: str = ABOVE
    times: int = 1


OCR = "OCR & Chart"
ORDERS = [
    Order(
        "rank-based allocation above average",
        "1",
        "rank, {paper_stage1}",
        "average, {paper_stage1}",
    ),
    Order(
        "average allocation above reversed",
        "1",
        "average, {paper_stage1}",
        "rank_reverse, {paper_stage1}",
    ),
    Order(
        "collaborative pruning above random",
        "2",
        "collaborative, {proportion}",
        "random, {proportion}",
    ),
    Order(
        "collaborative pruning above separate",
        "2",
        "collaborative, {proportion}",
        "separate, {proportion}",
        OCR,
        times=4,
    ),
    Order(
        "post-projection fusion not below EAGLE-style, at equal tokens",
        "2",
        "collaborative, {cells}",
        "EAGLE-style, {cells}",
        rule=NOT_BELOW,
    ),
    Order(
        "the top heads above all heads, at one early layer",
        "3",
        "fixed, layer 1, {k} head(s)",
        "fixed, layer 1, all heads",
        times=2,
    ),
    Order(
        "three pruned layers above one, at equal averages",
        "3",
        "fixed, {pruned} layers, {k} head(s)",
        "fixed, layer 1, {k} head(s)",
    ),
    Order(
        "adaptive counts above fixed ones",
        "3",
        "adaptive, {tight}",
        "fixed, {pruned} layers, {k} head(s)",
        OCR,
        times=2,
    ),
    Order("METEOR above FastV, at its average", "main", "METEOR, {average}", "stages 1+2, FastV"),
    Order(
        "METEOR not below PyramidDrop, at its average",
        "main",
        "METEOR, {average}",
        "stages 1+2, PyramidDrop",
        rule=NOT_BELOW,
    ),
    Order(
        "METEOR above PruMerge++, at its average",
        "main",
        "METEOR, {average}",
        "PruMerge++-style, {average}",
    ),
    Order(
        "stage 1 not below PruMerge++, on a single encoder",
        "6",
        "stage 1, {few}",
        "PruMerge++-style, {few}",
        rule=NOT_BELOW,
        times=8,
    ),
    Order(
        "in the first third of the blocks, similarity to the mean above attention (Finding 1)",
        "depth",
        "similarity, first third, asked",
        "attention, first third, asked",
    ),
    Order(
        "in the last third of the blocks, attention above similarity to the mean (Finding 2)",
        "depth",
        "attention, last third, asked",
        "similarity, last third, asked",
    ),
]
TABLES_OF_ORDERS = tuple(dict.fromkeys(order.table for order in ORDERS if order.table != "depth"))


class Measured(NamedTuple):
    """One of the two things that an order compares.

    label; values (n,) bool or float in 0..1: of each question, nan where it does not count; family
    (n,) str; tokens: mean visual tokens per LLM layer, None where nothing is asked of an LLM.
    """

    label: str
    values: np.ndarray
    family: np.ndarray
    tokens: float | None


def find_row(rows: list[Row], label: str) -> Row | None:
    """The row of this label, or the one whose label begins so; None where there is none.

    Raises: ValueError where several labels begin so, and none is the label itself.
    """
    found = [row for row in rows if row.label == label]
    if not found:
        found = [row for row in rows if row.label.startswith(label)]
    if len(found) > 1:
        raise ValueError(f"label must name one row, got {label!r} for {[r.label for r in found]}")
    return found[0] if found else None


def verdict(rule: str, low: float, high: float) -> str:
    """What the 95 % interval of a difference, in points, says of an order.

    "above": yes where the whole interval is above 0, reverse where all of it is below.
    "not below": yes where its lower end is -1 or more, reverse where all of it is below -1.
    """
    if rule == ABOVE:
        holds, is_reversed = low > 0, high < 0
    else:
        holds, is_reversed = low >= BELOW, high < BELOW
    if holds:
        return YES
    return REVERSE if is_reversed else NOT_SHOWN


def compare(order: Order, row: Measured | None, other: Measured | None) -> dict:
    """One entry of results/orders.json, with "rows", "tokens" and "asked", the number of questions,
    for the report besides.

    Where one of the two was not measured (a model without learned fusions), difference and interval
    are None, and nothing is shown.
    """
    entry = {"order": order.claim, "questions": order.questions}
    if row is None or other is None:
        nothing = {"difference": None, "interval": None, "verdict": NOT_SHOWN}
        return entry | nothing | {"rows": None, "tokens": None, "asked": 0}
    counts = question_groups(row.family)[order.questions] & ~np.isnan(row.values)
    mean, low, high = difference(row.values[counts], other.values[counts])
    return entry | {
        "difference": mean,
        "interval": [low, high],
        "verdict": verdict(order.rule, low, high),
        "rows": [row.label, other.label],
        "tokens": None if row.tokens is None else [row.tokens, other.tokens],
        "asked": int(counts.sum()),
    }


def without_rows(entries: list[dict]) -> list[dict]:
    """What is written into orders.json."""
    keys = ("order", "questions", "difference", "interval", "verdict")
    return [{key: entry[key] for key in keys} for entry in entries]

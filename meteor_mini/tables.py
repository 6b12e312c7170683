"""The paper's Tables 1 to 3 and 6 to 8: each a list of `methods.Row`.

    frame = measure(model, ["3", "7"], samples=240, seeds=[0, 1, 2])
    report(model, ["3"], 240, Path("results"))     # also writes the CSV, the figure and the page

All rows of a table answer the same questions of the test split, and each is compared with a row
above it, question by question.

Change here: TABLES, and the functions above it.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import stage1_encode
from stage3_decode import default_layers

from . import baselines, findings, page
from .methods import (
    SEEDS,
    Row,
    adaptive_pruner,
    ask,
    compare_answers,
    eagle_rows,
    fastv_row,
    grid_cells,
    prumerge_row,
    pruner_for_average,
    pyramid_row,
    solve_for_average,
    stages,
)
from .model import Meteor

# -------------------------------------------------------------------- counts that make an average


def own_layers(model: Meteor) -> list[int]:
    """The LLM layers in which the model's own stage 3 prunes."""
    return list(model.budget.layers or default_layers(model.decoder.config.num_hidden_layers))


def fixed_counts(model: Meteor, average: float) -> dict[int, int]:
    """{layer: tokens left} at the model's own layers, that make an average; to each other they are
    as the paper's 390, 172 and 78, up to rounding.
    """
    layers, L = own_layers(model), model.decoder.config.num_hidden_layers
    paper = np.array([390, 172, 78])[: len(layers)]  # to be scaled to the wanted average
    layers_with_each = np.diff([*layers, L])
    wanted = average * L - model.budget.stage2 * layers[0]  # from the first pruned layer on
    exact = paper * wanted / (paper @ layers_with_each)
    # of whole numbers next to these, those that come closest to the average
    whole = itertools.product(*[(math.floor(count), math.ceil(count)) for count in exact])
    closest = min(whole, key=lambda counts: abs(counts @ layers_with_each - wanted))
    return {layer: max(1, count) for layer, count in zip(layers, closest)}


def average_like(model: Meteor, tokens: float, average: float) -> int:
    """The average that is to `average` as the paper's `tokens` are to its 242.

    Of each average only what stage 3 decides is compared. The rest, which it cannot go below, comes
    from the layers in front of the first pruned one: in the paper 576 tokens in 4 of 32 layers.
    """
    before = tokens_before_stage3(model)
    paper_before = 576 * 4 / 32
    share = (tokens - paper_before) / (242 - paper_before)
    return round(before + share * (average - before))


def tokens_before_stage3(model: Meteor) -> float:
    """The part of an average that comes from the layers in front of the first pruned one."""
    return model.budget.stage2 * own_layers(model)[0] / model.decoder.config.num_hidden_layers


# --------------------------------------------------------------------------------------- the tables


def table1(model: Meteor) -> list[Row]:
    """How encoders share the paper's share of all tokens; all strategies have the same totals at
    the inner points.
    """
    total = round(model.num_tokens * 1193 / 4096)  # of four encoders with 1024 tokens each
    available = [view.num_tokens for view in model.views.values()]
    alike = [total / len(available)] * len(available)
    encoders = enumerate(model.encoders.values())
    inside = [l for l, encoder in encoders if stage1_encode.can_prune_inside(encoder)]
    totals = tuple(stage1_encode.geometric_totals(total, alike, available, inside, 3))
    rows = []
    for strategy in baselines.STRATEGIES:
        others = {} if strategy == "rank" else {"against": f"rank, {total}", "paper": "below"}
        rows.append(Row(f"{strategy}, {total}", stages(totals, shares=strategy), **others))
    return rows


def table2(model: Meteor) -> list[Row]:
    """What fusion drops.

    Three budgets: the paper's proportion, a third of stage 1's (where strategies part), and that of
    EAGLE's fusion.
    """
    total, cells = model.budget.stage1, grid_cells(model)
    rows = [Row(f"post-projection fusion, {total}", stages(total))]
    for K in (round(total * 576 / 1193), total // 3):
        for fusion in ("collaborative", "separate", "greedy", "random"):
            against = None if fusion == "collaborative" else f"collaborative, {K}"
            paper = "below" if fusion in ("separate", "random") else None
            encode, random = stages(total, K, fusion=fusion), fusion == "random"
            rows.append(Row(f"{fusion}, {K}", encode, None, against, paper, random))
    mine = f"collaborative, {cells}"
    eagle = [replace(row, paper="below") for row in eagle_rows(model, mine)]
    return [*rows, Row(mine, stages(total, cells)), *eagle]


def table3(model: Meteor) -> list[Row]:
    """Fixed and adaptive counts, from what the model's own stages 1 and 2 leave to an average half
    way between the model's own and the least that stage 3 can reach.
    """
    own, k, layers = model.budget, model.budget.k, len(own_layers(model))
    encode = stages(own.stage1, own.stage2)
    average = round((tokens_before_stage3(model) + own.stage3) / 2)
    L = model.decoder.config.num_hidden_layers
    at_one = {1: baselines.fastv_count(own.stage2, average, 1, L)}
    at_all = fixed_counts(model, average)
    early = replace(own, layers=[1])
    every_head, top, several = (
        "fixed, layer 1, all heads",
        f"fixed, layer 1, top {k} heads",
        f"fixed, {layers} layers, top {k} heads",
    )
    rows = [
        Row("upper bound", encode),
        Row(every_head, encode, baselines.fixed(at_one, None)),
        Row(top, encode, baselines.fixed(at_one, k), every_head, "above"),
        # not in the paper: adaptive counts where tokens still matter
        Row(
            f"adaptive, {average}, layer 1",
            encode,
            pruner_for_average(model, encode, average, early),
            top,
        ),
        Row(several, encode, baselines.fixed(at_all, k), top, "above"),
    ]
    like_the_papers = [average_like(model, tokens, average) for tokens in (312, 242, 162)]
    for n in dict.fromkeys(like_the_papers):  # each once
        stage3 = pruner_for_average(model, encode, n, own)
        paper = "above" if n == average else None  # at equal tokens
        rows.append(Row(f"adaptive, {n}", encode, stage3, several, paper))
    return rows


def table6(model: Meteor) -> list[Row]:
    """A single encoder, stages 1 and 3."""
    name, N = "pix2struct", grid_cells(model)  # which reads: the paper's is of TextVQA
    few = round(0.27 * N)
    fewer = round(0.45 * few)
    inside = stages(few, encoders=(name,))
    # not in the paper: is it the choice, or that tokens are gone before the encoder is at its end?
    at_the_end = stages((N, N, few), encoders=(name,))
    merged, merged_more = prumerge_row([name], few), prumerge_row([name], fewer)
    stage3 = pruner_for_average(model, inside, fewer, model.budget)
    return [
        Row(f"{name} alone", stages(encoders=(name,))),
        merged,
        Row(f"stage 1, {few}", inside, None, merged.method, "above"),
        Row(f"stage 1 at the output only, {few}", at_the_end, None, merged.method),
        merged_more,
        Row(f"stages 1 and 3, {fewer}", inside, stage3, merged_more.method),
    ]


def table7(model: Meteor) -> list[Row]:
    """A single encoder, stage 3 and rivals in the same layers."""
    name = "pix2struct"
    N, encode = model.views[name].num_tokens, stages(encoders=(name,))
    average = round(0.45 * N)
    layers = own_layers(model)
    fastv = fastv_row(model, encode, N, average, layers[0])
    pyramid = pyramid_row(model, encode, N, average, layers)
    pyramid = replace(pyramid, against=fastv.method, paper="above")
    stage3 = pruner_for_average(model, encode, average, model.budget)
    return [
        Row(f"{name} alone", encode),
        fastv,
        pyramid,
        Row(f"stage 3, {average}", encode, stage3, fastv.method, "above"),
    ]


def table8(model: Meteor) -> list[Row]:
    """Heads and lambda; besides the paper's k the model's own."""
    own, k = model.budget, model.budget.k
    encode = stages(own.stage1, own.stage2)
    lams = {}
    for heads in dict.fromkeys([k, 3, 5, 7]):  # each once, the model's own first
        budget = replace(own, k=heads)
        lams[heads] = solve_for_average(model, encode, own.stage3, budget)
    cases = [(heads, lam, None) for heads, lam in lams.items()]
    cases += [(k, 65 / 50 * lams[k], "above"), (k, 25 / 50 * lams[k], "below")]  # paper's lambdas
    rows = []
    for heads, lam, paper in cases:
        against = rows[0].method if rows else None
        pruner = adaptive_pruner(replace(own, k=heads), lam)
        rows.append(Row(f"k = {heads}, lambda = {lam:.1f}", encode, pruner, against, paper))
    return rows


TABLES = {
    "1": table1,
    "2": table2,
    "3": table3,
    "6": table6,
    "7": table7,
    "8": table8,
}


# --------------------------------------------------------------------------------- what is measured


def measure(
    model: Meteor, names: Iterable[str], samples: int, seeds: Iterable[int] = SEEDS[:3]
) -> pd.DataFrame:
    """Measure tables of `TABLES` on `samples` questions of the test split.

    Returns: a row for each (table, method, seed, family), a family being one of
        `evaluate.families_by_kind`. tokens: mean visual tokens per LLM layer; flops: mean FLOPs of
        encoders, projectors and the LLM's prefill, for one question; the other columns as in
        `methods.compare_answers`, difference to the method in `against`.
    """
    check_model(model)
    first, *others = seeds
    records = []
    for table in names:
        asked = {}  # method -> its answers, with the first seed
        for row in TABLES[table](model):
            asked[row.method] = ask(model, row, samples, first)
            runs = {first: asked[row.method]}
            if row.random:
                runs |= {seed: ask(model, row, samples, seed) for seed in others}
            head = {"table": table, "method": row.method, "against": row.against}
            for seed, answers in runs.items():
                for line in compare_answers(answers, asked.get(row.against)):
                    records.append(head | {"paper": row.paper, "seed": seed} | line)
    return pd.DataFrame(records).reindex(columns=FIELDS)


FIELDS = (
    "table method against paper seed family questions tokens flops accuracy low high "
    "difference difference_low difference_high"
).split()


def check_model(model: Meteor) -> None:
    if model.ranks is None or model.budget.stage3 is None:
        raise ValueError("model must be calibrated, and have a budget for each stage")


# --------------------------------------------------------------------------------------- the report


def report(
    model: Meteor,
    names: list[str],
    samples: int,
    folder: Path | None = None,
) -> None:
    """Measure and print tables of `TABLES` and findings of `FINDINGS`.

    With a folder, its CSV files, figures and README.md are brought up to date after each one.
    """
    check_model(model)
    for name in names:
        if name in TABLES:
            frame = measure(model, [name], samples)
        else:
            frame = findings.measure(model, name, samples)
        if folder is not None:
            page.save(folder, name, frame)
            page.write(folder)
        print(page.as_section(name, frame), flush=True)

"""The paper's tables on the embedded model: each a list of rows, a row a method and its settings.

    frame = measure(model, ["3", "7"], samples=240, seeds=[0, 1, 2])
    report(model, ["3"], 1200, Path("results"))     # also writes the CSV, the figure and the page

A row says how the visual tokens that enter the LLM are made (`stages` for most of them),
what prunes them inside it, and against which row above it is compared, question by question. All
rows of a table answer the same questions of the test split; what has to be chosen (lambda) is
solved on validation questions.

Change here: TABLES, and the functions below it; a new method is one more `Row`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_model
from torch import Tensor
from tqdm import tqdm

import stage1_encode
from stage3_decode import AdaptivePruner, default_layers, solve_lambda

from . import baselines, findings, page
from .budgets import Budget
from .evaluate import difference, grade, masks_by_kind, mean
from .flops import counted_flops
from .model import Answer, Encoded, Meteor
from .pictures import pixels_for
from .toy.questions import example_batches, images_and_questions

Encode = Callable[[Meteor, Tensor], Encoded]
SEEDS = [0, 1, 2, 3, 4]  # of the methods that choose at random


@dataclass(frozen=True)
class Row:
    """One row of a table.

    method: its name, unique in the table.
    encode: (model, images) -> the visual tokens that enter the LLM.
    pruner: what prunes them inside it, if anything.
    against: the method of a row above, that it is compared with.
    paper: "above" or "below", where the paper ranks it so to the row that it is compared with.
    random: it follows torch's seed, and is measured with several.
    """

    method: str
    encode: Encode
    pruner: baselines.Pruner | None = None
    against: str | None = None
    paper: str | None = None
    random: bool = False

    def answer(self, model: Meteor, images: Tensor, questions: list[str]) -> list[Answer]:
        return model.answer(self.encode(model, images), questions, Budget.keep_all(), self.pruner)


# ---------------------------------------------------------------------- how visual tokens are made


def stages(
    stage1: int | tuple[int, ...] | None = None,
    stage2: int | None = None,
    encoders: tuple[str, ...] | None = None,
    shares: str = "rank",
    fusion: str = "collaborative",
) -> Encode:
    """Stages 1 and 2, or another rule in place of theirs.

    Args: stage1, stage2: as in `Budget`; encoders: all where None, else there is no stage 2;
        shares: how they share stage 1's total, of `baselines.SHARES`; fusion: of
        `baselines.FUSIONS`.
    """

    def encode(model: Meteor, images: Tensor) -> Encoded:
        names = encoders or tuple(model.encoders)
        features, kept = stage1_features(model, images, names, stage1, shares)
        if encoders is not None:
            return baselines.only(model, names, features, kept)
        return model.fuse(features, kept, stage2, baselines.FUSIONS[fusion])

    return encode


@functools.lru_cache(maxsize=8)  # the rows of a table share it, batch by batch
def stage1_features(
    model: Meteor,
    images: Tensor,
    names: tuple[str, ...],
    total: int | tuple[int, ...] | None,
    shares: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Stage 1 of some encoders: their tokens (B, n_l, D_l), and the patches kept (B, n_l)."""
    encoders = {name: model.encoders[name] for name in names}
    pixels = pixels_for(encoders, model.views, images, model.device)
    places = [list(model.encoders).index(name) for name in names]
    ranks = baselines.reranked(model.ranks[:, places], shares)  # (points, encoders)
    return stage1_encode.encode_all(list(encoders.values()), pixels, total, ranks)


def prumerge_row(encoders: Iterable[str], tokens: int, against: str | None = None) -> Row:
    """PruMerge++ at the encoders' outputs."""
    names = list(encoders)

    def encode(model: Meteor, images: Tensor) -> Encoded:
        return baselines.prumerge(model, images, names, tokens)

    return Row(f"PruMerge++-style, {tokens}", encode, against=against)


def eagle_rows(model: Meteor, against: str) -> list[Row]:
    """EAGLE-style fusion with the weights that were trained beside the model's; no row for a model
    without eagle.safetensors.
    """
    file = Path(model.folder or "") / "eagle.safetensors"
    if not file.exists():
        return []
    fusion = baselines.channel_fusion(model)
    load_model(fusion, file)
    fusion.eval().requires_grad_(False)

    def encode(model: Meteor, images: Tensor) -> Encoded:
        return baselines.encode_channels(model, fusion, images)

    return [Row(f"EAGLE-style, {grid_cells(model)}", encode, against=against)]


def grid_cells(model: Meteor) -> int:
    """Tokens of one encoder: what EAGLE's fusion leaves."""
    return next(iter(model.views.values())).num_tokens


# --------------------------------------------------------------------------- what prunes in the LLM


def adaptive_pruner(budget: Budget, lam: float) -> baselines.Pruner:
    """Stage 3 with lambda as given, heads and layers of a budget."""
    return partial(AdaptivePruner, layers=budget.layers, lam=lam, k=budget.k)


@torch.no_grad()
def solve_on_validation(
    model: Meteor, encode: Encode, average: float, budget: Budget, samples: int = 96
) -> float:
    """lambda that keeps `average` tokens, solved on validation questions, those of calibration
    among them.
    """
    examples = list(itertools.chain(*example_batches("val", samples, first=50_000)))
    images, questions = images_and_questions(examples)
    encoded = encode(model, images)

    def measure(lam: float) -> float:
        pruner = model.prefill(encoded, questions, adaptive_pruner(budget, lam))
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure, tolerance=average / 200)


def pruner_for_average(
    model: Meteor, encode: Encode, average: float, budget: Budget, samples: int = 96
) -> baselines.Pruner:
    """Stage 3 that keeps an average of the tokens that `encode` makes, solved on validation."""
    return adaptive_pruner(budget, solve_on_validation(model, encode, average, budget, samples))


def fastv_row(model: Meteor, encode: Encode, K: int, average: float) -> Row:
    """FastV at layer 1, of K tokens."""
    count = baselines.fastv_count(K, average, 1, model.decoder.config.num_hidden_layers)
    return Row(f"FastV {K}-{count}", encode, baselines.fastv(count, layer=1))


def pyramid_row(model: Meteor, encode: Encode, K: int, average: float) -> Row:
    """PyramidDrop of K tokens."""
    counts = baselines.pyramid_counts(K, average, model.decoder.config.num_hidden_layers)
    pruner = baselines.pyramid_drop(counts)
    steps = "-".join(map(str, [K, *counts.values()]))
    return Row(f"PyramidDrop {steps}", encode, pruner)


def random_in_llm(tokens: dict[int, int]) -> baselines.Pruner:
    """`baselines.RandomPruner` that follows torch's seed."""

    def pruner(decoder, visual_mask: Tensor) -> baselines.RandomPruner:
        seed = torch.initial_seed()
        return baselines.RandomPruner(decoder, visual_mask, tokens, seed)

    return pruner


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
    """How encoders share the budget; all strategies have the same totals at the inner points.

    Two budgets: the model's own, and the paper's share of all tokens.
    """
    prunable = []
    for name, encoder in model.encoders.items():
        if stage1_encode.can_prune_inside(encoder):
            prunable.append(model.views[name].num_tokens)
    n = sum(prunable)
    paper = round(model.num_tokens * 1193 / 4096)  # of four encoders with 1024 tokens each
    rows = []
    for total in dict.fromkeys([model.budget.stage1, paper]):  # each once
        left = total * len(prunable) / len(model.encoders)  # by these, if all encoders shared alike
        fall = left / n
        totals = (round(n * fall ** (1 / 3)), round(n * fall ** (2 / 3)), total)
        for strategy in baselines.SHARES:
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
        for fusion in baselines.FUSIONS:
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
    name, N = "clip", grid_cells(model)
    few = round(0.27 * N)  # about the paper's 29 % of the LLM's FLOPs
    fewer = round(0.45 * few)  # about its 12 %
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
    """A single encoder, stage 3."""
    name = "pix2struct"
    N, encode = model.views[name].num_tokens, stages(encoders=(name,))
    average = round(0.45 * N)
    fastv = fastv_row(model, encode, N, average)
    pyramid = pyramid_row(model, encode, N, average)
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
        lams[heads] = solve_on_validation(model, encode, own.stage3, budget)
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
    model: Meteor, names: Iterable[str], samples: int, seeds: Iterable[int] = SEEDS
) -> pd.DataFrame:
    """Measure tables of `TABLES` on `samples` questions of the test split.

    Returns: a row for each (table, method, seed, family), a family being one of
        `evaluate.families_by_kind`. tokens: mean visual tokens per LLM layer; flops: mean FLOPs of
        encoders, projectors and the LLM's prefill, for one question; accuracy in percent, [low,
        high] its 95 % interval; difference in points to the method in `against`, paired, with its
        interval.
    """
    check_model(model)
    return pd.concat(
        [measure_rows(model, name, TABLES[name](model), samples, list(seeds)) for name in names],
        ignore_index=True,
    )


@torch.no_grad()
def measure_rows(
    model: Meteor,
    table: str,
    rows: list[Row],
    samples: int,
    seeds: list[int],
) -> pd.DataFrame:
    """`measure` for the rows of one table."""
    encoding = {row.method: encoding_flops(model, row) for row in rows}
    runs = [(row, seed) for row in rows for seed in (seeds if row.random else seeds[:1])]
    graded = {(row.method, seed): [] for row, seed in runs}
    batches = list(example_batches("test", samples))
    for number, examples in enumerate(tqdm(batches, desc=f"table {table}", leave=False)):
        images, questions = images_and_questions(examples)
        for row, seed in runs:
            torch.manual_seed(len(batches) * seed + number)  # another for each batch
            answers = row.answer(model, images, questions)
            graded[row.method, seed].append(grade(model, examples, answers))
        stage1_features.cache_clear()

    answers = {run: pd.concat(parts, ignore_index=True) for run, parts in graded.items()}
    records = []
    for row, seed in runs:
        other = answers.get((row.against, seeds[0]))
        for line in compare(answers[row.method, seed], other, encoding[row.method]):
            head = {"table": table, "method": row.method, "against": row.against}
            records.append(head | {"paper": row.paper, "seed": seed} | line)
    return pd.DataFrame(records)[FIELDS]


FIELDS = (
    "table method against paper seed family questions tokens flops accuracy low high "
    "difference difference_low difference_high"
).split()


def compare(
    answers: pd.DataFrame,
    other: pd.DataFrame | None,
    encoding: float,
    hard: pd.Series | None = None,
) -> list[dict]:
    """A line for each kind of question that occurs.

    Args: answers: of `evaluate.grade`, other: of the row it is compared with, on the same
        questions; encoding: FLOPs of making the visual tokens; hard: (bool) one more kind.
    """
    lines = []
    kinds = masks_by_kind(answers["family"])
    if hard is not None and hard.any():
        kinds["hard"] = hard
    for kind, asked in kinds.items():
        right = 100 * answers["right"][asked]
        line = {
            "family": kind,
            "questions": len(right),
            "tokens": answers["tokens"][asked].mean(),
            "flops": answers["flops"][asked].mean() + encoding,
        }
        line |= dict(zip(("accuracy", "low", "high"), mean(right)))
        if other is not None:
            gain = difference(right, 100 * other["right"][asked])
            line |= dict(zip(("difference", "difference_low", "difference_high"), gain))
        lines.append(line)
    return lines


def encoding_flops(model: Meteor, row: Row) -> int:
    """FLOPs of making a row's visual tokens of one picture.

    Of the second picture: at the first, stage 1 also counts the patches of encoders that are new to
    it.
    """
    (examples,) = example_batches("val", 2)
    images, _ = images_and_questions(examples)
    for image in images.split(1):
        flops = counted_flops(partial(row.encode, model, image))
        stage1_features.cache_clear()  # else it would not run again
    return flops


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
        print(page.section(name, frame), flush=True)

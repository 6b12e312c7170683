"""A method, asked: how its visual tokens are made, what prunes them in the LLM, what it answers.

    row = Row("FastV", stages(168, 81), baselines.fastv(keep=40, layer=4))
    answers = ask(model, row, samples=240)     # a row for each question of the test split
    compare_answers(answers, other)            # accuracy and difference, by kind of question

`tables` and `smol.compare` are lists of rows. A row of stage 3 has the lambda that leaves a wanted
average.

Change here: a new method is one more `Row`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_model
from torch import Tensor

import stage1_encode
from stage3_decode import AdaptivePruner, solve_lambda

from . import baselines, evaluate
from .budgets import Budget
from .evaluate import difference, masks_by_kind, mean
from .flops import counted_flops
from .model import Answer, Encoded, Meteor
from .pictures import pixels_for
from .toy.questions import example_batches, images_and_questions

Encode = Callable[[Meteor, Tensor], Encoded]
SEEDS = [0, 1, 2, 3, 4]  # of the methods that choose at random
LAMBDA_QUESTIONS = 120  # on which lambda is solved: ten of each family
LAMBDA_FROM = {"val": 50_000, "test": 0}  # split -> the first of them


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
        shares: how they share stage 1's total, of `baselines.STRATEGIES`; fusion: of
        `baselines.FUSIONS`.
    """

    def encode(model: Meteor, images: Tensor) -> Encoded:
        names = encoders or tuple(model.encoders)
        members = {name: model.encoders[name] for name in names}
        pixels = pixels_for(members, model.views, images, model.device)
        places = [list(model.encoders).index(name) for name in names]
        ranks = baselines.reranked(model.ranks[:, places], shares)  # (points, encoders)
        features, kept = stage1_encode.encode_all(list(members.values()), pixels, stage1, ranks)
        if encoders is not None:
            return baselines.only(model, names, features, kept)
        return model.fuse(features, kept, stage2, baselines.FUSIONS[fusion])

    return encode


def prumerge_row(encoders: Iterable[str], tokens: int) -> Row:
    """PruMerge++ at the encoders' outputs."""
    names = list(encoders)

    def encode(model: Meteor, images: Tensor) -> Encoded:
        return baselines.prumerge(model, images, names, tokens)

    return Row(f"PruMerge++-style, {tokens}", encode)


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
def solve_for_average(
    model: Meteor, encode: Encode, average: float, budget: Budget, split: str = "val"
) -> float:
    """lambda that keeps `average` tokens on questions of a split; their answers play no part.

    Those of "val" are the ones of calibration and others, those of "test" the first that are asked.
    """
    encoded = []
    for examples in example_batches(split, LAMBDA_QUESTIONS, first=LAMBDA_FROM[split]):
        images, questions = images_and_questions(examples)
        encoded.append((encode(model, images), questions))

    def measure(lam: float) -> float:
        pruner = adaptive_pruner(budget, lam)
        of_batches = [model.prefill(*batch, pruner).average_tokens() for batch in encoded]
        return torch.cat(of_batches).mean().item()

    return solve_lambda(average, measure, tolerance=average / 200)


def pruner_for_average(
    model: Meteor, encode: Encode, average: float, budget: Budget, split: str = "val"
) -> baselines.Pruner:
    """Stage 3 that keeps an average of the tokens that `encode` makes."""
    return adaptive_pruner(budget, solve_for_average(model, encode, average, budget, split))


def fastv_row(model: Meteor, encode: Encode, K: int, average: float, layer: int = 1) -> Row:
    """FastV of the K tokens that `encode` makes."""
    count = baselines.fastv_count(K, average, layer, model.decoder.config.num_hidden_layers)
    return Row(f"FastV {K}-{count}", encode, baselines.fastv(count, layer))


def pyramid_row(
    model: Meteor, encode: Encode, K: int, average: float, layers: tuple[int, ...] | None = None
) -> Row:
    """PyramidDrop of the K tokens that `encode` makes."""
    counts = baselines.pyramid_counts(K, average, model.decoder.config.num_hidden_layers, layers)
    steps = "-".join(map(str, [K, *counts.values()]))
    return Row(f"PyramidDrop {steps}", encode, baselines.pyramid_drop(counts))


def random_in_llm(tokens: dict[int, int]) -> baselines.Pruner:
    """`baselines.RandomPruner` that follows torch's seed."""

    def pruner(decoder, visual_mask: Tensor) -> baselines.RandomPruner:
        seed = torch.initial_seed()
        return baselines.RandomPruner(decoder, visual_mask, tokens, seed)

    return pruner


# --------------------------------------------------------------------------------- what it answers


@torch.no_grad()
def ask(
    model: Meteor, row: Row, samples: int, seed: int = 0, split: str = "test", first: int = 0
) -> pd.DataFrame:
    """A row for each question, as `evaluate.grade` makes it; flops with those of the encoders."""
    answers = evaluate.ask(model, row.answer, split, samples, first, seed)
    return answers.assign(flops=answers["flops"] + encoding_flops(model, row))


def encoding_flops(model: Meteor, row: Row) -> int:
    """FLOPs of making a row's visual tokens of one picture.

    Of the second picture: at the first, stage 1 also counts the patches of encoders that are new to
    it.
    """
    (examples,) = example_batches("val", 2)
    images, _ = images_and_questions(examples)
    first, second = images.split(1)
    row.encode(model, first)
    return counted_flops(partial(row.encode, model, second))


def compare_answers(
    answers: pd.DataFrame, other: pd.DataFrame | None, hard: pd.Series | None = None
) -> list[dict]:
    """A line for each kind of question that occurs: accuracy in percent, [low, high] its 95 %
    interval; difference in points to the other's, paired, with its interval; mean tokens and flops.

    Args: answers: of `ask`; other: of the row it is compared with, on the same questions; hard:
        (bool) one more kind.
    """
    lines = []
    kinds = masks_by_kind(answers["family"])
    if hard is not None and hard.any():
        kinds["hard"] = hard
    for kind, asked in kinds.items():
        right = 100 * answers["right"][asked]
        line = {"family": kind, "questions": len(right)}
        line |= answers.loc[asked, ["tokens", "flops"]].mean().to_dict()
        line |= dict(zip(("accuracy", "low", "high"), mean(right)))
        if other is not None:
            gain = difference(right, 100 * other["right"][asked])
            line |= dict(zip(("difference", "difference_low", "difference_high"), gain))
        lines.append(line)
    return lines

"""What stage 1's two criteria say of every patch after every block, and how many of the patches
that questions ask about each of them would keep there (Findings 1 and 2).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import stage1_encode
from stage1_encode import EncoderPruner, Spy, highest, mean_similarity

from ..toy.evaluate import Example, batches, difference, images_and_questions
from ..toy.schooling import TOLD
from ..toy.world import SLOTS
from ..model import Meteor
from .tables import grid_cells

CRITERIA = ("similarity", "attention")
THIRDS = ("first third", "last third")
MEAN = "mean over encoders"
# Which patches count for an encoder; see `counted_patches`. The orders go by the first: all that
# questions ask about.
DEFINITIONS = ("asked", "asked and told")


# ------------------------------------------------------------------ what the criteria say


@torch.no_grad()
def criteria_by_block(encoder: nn.Module, pixels: Tensor) -> dict[str, list[Tensor]]:
    """Run an encoder, unpruned, and score its patches in each block.

    Args: encoder: of stage 1's `FAMILIES`, with blocks; pixels: what it reads, B pictures.
    Returns: {"similarity", "attention"}: for each block (B, N) float32, the patches' similarity to
        their mean after the block, and the attention that they receive in it.
    Source: [paper, Findings 1 and 2]
    """
    pruner = EncoderPruner(encoder, [None])  # knows its blocks and its prefix; it does not run
    P, spy = pruner.prefix, None
    scores = {"similarity": [], "attention": []}

    def listen(block, args):
        nonlocal spy
        spy = Spy()
        spy.__enter__()

    def score(block, args, output):
        spy.__exit__(None, None, None)
        x = output[0] if isinstance(output, tuple) else output  # (B, P + N, D)
        queries = 1 if pruner.has_cls else x.shape[1]
        (attention,) = spy.heard
        scores["similarity"].append(mean_similarity(x[:, P:]))
        scores["attention"].append(attention(queries)[:, P:])

    handles = [block.register_forward_pre_hook(listen) for block in pruner.blocks]
    handles += [block.register_forward_hook(score) for block in pruner.blocks]
    try:
        pruner.encoder(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return scores


def kept_by(criterion: str, score: Tensor, K: int) -> Tensor:
    """(B, N) bool: the K patches that stage 1 would keep by the scores (B, N) of a criterion."""
    if criterion == "similarity":
        score = -score  # the patches most like the mean go
    keep_idx = highest(score, K)  # (B, K)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, keep_idx, True)


# ------------------------------------------------------------------ what they keep of what is asked


def counted_patches(example: Example, name: str, definition: str) -> np.ndarray:
    """(144,) bool: the patches by which a question judges the criteria in an encoder.

    "asked": all that the question asks about, in every encoder, whether it can read them or not.
    "asked and told": of these, only what the encoder's projector tells the LLM. Printed digits in
    CLIP do not count: that its attention passes them over is no fault. Where none are left, the
    question says nothing of this encoder.
    """
    if definition == "asked":
        return example.asked
    what = list(SLOTS).index("what")
    told = []
    for things, _ in TOLD[name]:
        told += [1 + SLOTS["what"].index(word) for word in things]
    return example.asked & np.isin(example.picture.patch_words[:, what], told)


def kept_shares(
    scores: dict[str, list[Tensor]], counted: Tensor, K: int
) -> dict[str, list[np.ndarray]]:
    """For each criterion and block (B,): the share of the counted patches among the K it keeps;
    nan for a picture without counted patches.

    Args: scores: of `criteria_by_block`; counted (B, N) bool.
    """
    shares = {}
    for criterion in CRITERIA:
        shares[criterion] = []
        for score in scores[criterion]:
            kept = kept_by(criterion, score, K) & counted  # (B, N)
            share = kept.sum(dim=1) / counted.sum(dim=1)
            shares[criterion].append(share.numpy())
    return shares


def blocks_of(third: str, blocks: int) -> range:
    """The blocks of the first or the last third, as stage 1 cuts an encoder."""
    first_end, last_start, _ = stage1_encode.pruning_points(blocks, 3)
    return range(first_end + 1) if third == "first third" else range(last_start + 1, blocks)


def patches_kept(model: Meteor) -> int:
    """A quarter of an encoder's patches: few enough that a criterion has to choose."""
    return grid_cells(model) // 4


def prunable(model: Meteor) -> list[str]:
    """Encoders that have attention, and can be pruned inside."""
    return [
        name for name, encoder in model.encoders.items() if stage1_encode.can_prune_inside(encoder)
    ]


@torch.no_grad()
def asked_shares(model: Meteor, split: str, samples: int) -> tuple[dict, np.ndarray]:
    """The shares of the counted patches that each criterion keeps, of a quarter of the patches.

    Returns: {(definition, encoder): {criterion: (blocks, n) float}}, nan where a question does not
        count for an encoder; the families (n,) of the questions.
    """
    K = patches_kept(model)
    names = prunable(model)
    parts = {(d, name): {c: [] for c in CRITERIA} for d in DEFINITIONS for name in names}
    family = []
    for examples in batches(split, samples):
        images, _ = images_and_questions(examples)
        pixels = dict(zip(model.encoders, model.pixels(images)))
        family += [example.family for example in examples]
        for name in names:
            scores = criteria_by_block(model.encoders[name], pixels[name])
            for definition in DEFINITIONS:
                masks = [counted_patches(example, name, definition) for example in examples]
                shares = kept_shares(scores, torch.from_numpy(np.stack(masks)), K)
                for criterion in CRITERIA:
                    parts[definition, name][criterion].append(np.stack(shares[criterion]))
    whole = {}
    for key, of_criterion in parts.items():
        whole[key] = {c: np.concatenate(arrays, axis=1) for c, arrays in of_criterion.items()}
    return whole, np.array(family)


# ------------------------------------------------------------------ Findings 1 and 2


class Findings(NamedTuple):
    """What `findings` measures.

    kept: patches kept of each encoder.
    rows: a list of {"patches": definition, "blocks": third, "encoder", "questions": n, "similarity"
        and "attention": percent, "difference": similarity minus attention, (mean, low, high)}.
    blocks: {encoder: {criterion: [percent after each block]}}, of all asked patches.
    values: {label of `share_label`: (n,) float}: of each question the mean over encoders, nan where
        it counts for none; family (n,) str.
    """

    kept: int
    rows: list[dict]
    blocks: dict
    values: dict[str, np.ndarray]
    family: np.ndarray


def findings(model: Meteor, samples: int, split: str = "test") -> Findings:
    """Of what questions ask about, how much do similarity to the mean and attention keep, in the
    first and in the last third of the blocks?

    A question has one share for a criterion and a third: the mean over the blocks of the third,
    then over the encoders that it counts for.

    Source: [paper, Findings 1 and 2]
    """
    shares, family = asked_shares(model, split, samples)
    rows, values = [], {}
    for definition in DEFINITIONS:
        for third in THIRDS:
            each = {c: third_shares(shares, definition, third, c) for c in CRITERIA}
            for criterion in CRITERIA:
                mean = mean_of_counted([*each[criterion].values()])
                each[criterion][MEAN] = mean
                values[share_label(criterion, third, definition)] = mean
            for name in each["similarity"]:
                row = {"patches": definition, "blocks": third, "encoder": name}
                rows.append(row | compared(*(each[c][name] for c in CRITERIA)))
    blocks = {}
    for name in prunable(model):
        by_block = shares[DEFINITIONS[0], name]
        blocks[name] = {c: [percent(share) for share in by_block[c]] for c in CRITERIA}
    return Findings(patches_kept(model), rows, blocks, values, family)


def share_label(criterion: str, third: str, definition: str) -> str:
    return f"{criterion}, {third}, {definition}"


def third_shares(shares: dict, definition: str, third: str, criterion: str) -> dict:
    """Encoder -> (n,) float: the mean over the blocks of a third; shares: of `asked_shares`."""
    means = {}
    for (of_definition, name), of_criterion in shares.items():
        if of_definition == definition:
            of_blocks = of_criterion[criterion]  # (blocks, n)
            means[name] = of_blocks[blocks_of(third, len(of_blocks))].mean(axis=0)
    return means


def mean_of_counted(shares: list[np.ndarray]) -> np.ndarray:
    """Mean over encoders of arrays (n,), of those that a question counts for; nan for none."""
    stacked = np.stack(shares)  # (encoders, n)
    counted = ~np.isnan(stacked)
    number = counted.sum(axis=0)
    total = np.where(counted, stacked, 0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def percent(shares: np.ndarray) -> float:
    """Mean over the questions that count of shares (n,)."""
    counted = ~np.isnan(shares)
    return 100 * float(shares[counted].mean()) if counted.any() else float("nan")


def compared(similarity: np.ndarray, attention: np.ndarray) -> dict:
    """Of shares (n,) by each criterion: their means and their difference."""
    counted = ~np.isnan(similarity)
    figures = {"questions": int(counted.sum())}
    figures |= {"similarity": percent(similarity), "attention": percent(attention)}
    if counted.any():
        figures["difference"] = difference(similarity[counted], attention[counted])
    return figures

"""How many visual tokens each stage leaves, and what must be measured before that can be asked for.

A user asks for token counts (`Budget`). Stage 1 turns its count into one for each encoder by their
ranks, stage 3 turns a wanted average into lambda by a table; `calibrate` measures both.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import stage1_encode
from stage3_decode import AdaptivePruner

PAPER_TOKENS = (1193, 576, 242)  # after stages 1 and 2, and per LLM layer: the paper's main result
LAMBDAS = [0.0, *(2.0**i for i in range(10))]
K_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of all tokens: the K at which lambda is measured


@dataclass(frozen=True)
class Budget:
    """How many visual tokens each stage leaves; None keeps all.

    stage1: total over the encoders at their output, or (k_0, k_1, k_2) for the pruning points.
    stage2: K in the fused sequence.
    stage3: wanted mean number per LLM layer, averaged over layers and questions.
    k, layers (of the LLM; None: L/8, 3L/8, 5L/8): as in `AdaptivePruner`.
    """

    stage1: int | tuple[int, ...] | None = None
    stage2: int | None = None
    stage3: float | None = None
    k: int = 5
    layers: tuple[int, ...] | None = None

    @classmethod
    def keep_all(cls) -> "Budget":
        """The unpruned model: every token goes through everything."""
        return cls()


# ------------------------------------------------------------------ a budget from one wanted number


def proportions(budget: Budget) -> tuple[float, float]:
    """Tokens after stage 1 for each after stage 2, and after stage 2 for each per LLM layer.

    The first is that of the model's own budget, the second the paper's: a model's own may leave
    stage 3 little room below its own average.
    """
    one, two, three = PAPER_TOKENS
    stage1 = budget.stage1
    if isinstance(stage1, (tuple, list)):
        stage1 = stage1[-1]
    if stage1 is None or budget.stage2 is None:
        return one / two, two / three
    return stage1 / budget.stage2, two / three


def budget_for(model, tokens: float) -> Budget:
    """A budget that leaves a mean of `tokens` per LLM layer; the model's own where it has this
    average.

    Otherwise stages 1 and 2 follow from `proportions`, and a stage whose share exceeds the tokens
    there are keeps all of them. So counts near the model's own average do not rise smoothly: its
    own budget was tuned, the others follow a rule.

    Raises: ValueError for tokens outside 4 .. all the encoders' tokens (all: `Budget.keep_all()`).
    Source: [our choice]
    """
    total, own = model.num_tokens, model.budget
    if not 4 <= tokens <= total:
        raise ValueError(
            f"tokens must be 4 to {total}, the visual tokens of all encoders, got {tokens}"
        )
    if tokens == total:
        return Budget.keep_all()
    if tokens == own.stage3:
        return own
    one_per_two, two_per_three = proportions(own)
    stage2 = round(tokens * two_per_three)
    stage1 = round(stage2 * one_per_two)
    return replace(
        own,
        stage1=stage1 if stage1 < total else None,
        stage2=stage2 if stage2 < total else None,
        stage3=tokens,
    )


# --------------------------------------------------------------------- lambda from a wanted average


def stage3_lambda(config: dict, budget: Budget, K: int) -> float:
    """Lambda for the budget's average when K tokens enter the LLM; infinity where it keeps all.

    Raises: ValueError for heads or layers with which lambda was not measured.
    """
    if budget.stage3 is None:
        return float("inf")
    table = config.get("lambda_table")
    if table and "k" in table:
        asked = {"k": budget.k, "layers": budget.layers and list(budget.layers)}
        measured = {name: table[name] for name in asked}
        if asked != measured:
            raise ValueError(
                f"lambda was measured with {measured}, the budget has {asked}: "
                "use dataclasses.replace(model.budget, ...), or calibrate the model anew"
            )
    return lambda_from_table(table, K, budget.stage3)


def lambda_from_table(table: dict | None, K: int, target: float) -> float:
    """Lambda for a wanted average of `target` tokens per LLM layer when K enter it.

    The rows of the two nearest K are mixed linearly; then the curve, which does not fall, is
    inverted, linearly too.

    Args: table: {"K": [..ascending], "lam": [..ascending], "average": one row for each K}, as
        `measure_lambda` makes it.
    Raises: ValueError without a table, or for a target outside what it reaches at this K.
    """
    if not table:
        raise ValueError(
            "stage3 needs a calibrated model: call meteor_mini.calibrate(model, ...) first"
        )
    Ks, lams, averages = (np.array(table[key]) for key in ("K", "lam", "average"))
    if not Ks[0] <= K <= Ks[-1]:
        raise ValueError(
            f"stage2 must leave {Ks[0]} to {Ks[-1]} tokens for a calibrated stage3, got {K}"
        )
    curve = [np.interp(K, Ks, of_lambda) for of_lambda in averages.T]  # average at each lambda
    curve = np.maximum.accumulate(curve)
    if not curve[0] <= target <= curve[-1]:
        raise ValueError(
            f"stage3 must be {curve[0]:.1f} to {curve[-1]:.1f} tokens when stage2 leaves {K}, "
            f"got {target}"
        )
    return float(np.interp(target, curve, lams))


# --------------------------------------------------------------------------------- what is measured


@torch.no_grad()
def measure_ranks(model, batches: list[Tensor]) -> list[list[float]]:
    """Stage 1's expected ranks, points x encoders, on pictures (b, 3, H, W) in [0, 1]."""
    pixels = (model.pixels(images) for images in batches)
    return stage1_encode.expected_ranks(list(model.encoders.values()), pixels).tolist()


@torch.no_grad()
def measure_lambda(
    model, images: Tensor, questions: list[str], Ks: list[int], lams: list[float]
) -> dict:
    """Stage 3's average tokens for each K that enters the LLM and each lambda:
    `lambda_from_table`'s.

    Args: model: a `Meteor`; images (B, 3, H, W) in [0, 1] and B questions typical of the use; Ks,
        lams ascending. Stage 1 leaves each K the tokens that `proportions` gives it.
    """
    averages = []
    for K in Ks:
        stage1 = round(K * proportions(model.budget)[0])
        stage1 = stage1 if stage1 < model.num_tokens else None
        budget = replace(model.budget, stage1=stage1, stage2=K)
        encoded = model.encode(images, budget)
        row = []
        for lam in lams:
            stage3 = partial(AdaptivePruner, lam=lam, layers=budget.layers, k=budget.k)
            pruner = model.prefill(encoded, questions, stage3)
            row.append(round(float(pruner.average_tokens().mean()), 3))
        averages.append(row)
    layers = model.budget.layers and list(model.budget.layers)
    with_what = {"k": model.budget.k, "layers": layers}
    return with_what | {"K": list(Ks), "lam": list(lams), "average": averages}


def calibrate(model, images: list[Tensor], questions: list[str]) -> None:
    """Measure ranks and lambda: all that a model of pretrained parts lacks, besides training.

    Writes config["ranks"] and config["lambda_table"].

    Args: images: pictures (b, 3, H, W) in [0, 1] typical of the use, 64 or more in all; questions:
        one for each picture. The first 16 pictures and questions measure lambda.
    Raises: ValueError where questions and pictures differ in number.
    """
    pictures = sum(map(len, images))
    if len(questions) != pictures:
        raise ValueError(
            f"questions must be one for each of the {pictures} pictures, got {len(questions)}"
        )
    images = [part.to(model.device) for part in images]
    model.config["ranks"] = measure_ranks(model, images)
    Ks = sorted({max(8, round(share * model.num_tokens)) for share in K_SHARES})
    some = torch.cat(images)[:16]
    model.config["lambda_table"] = measure_lambda(model, some, questions[:16], Ks, LAMBDAS)

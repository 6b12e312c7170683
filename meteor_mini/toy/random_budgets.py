"""Stages 1 and 2 as they are in training: at random budgets, so that a model serves many."""

import numpy as np
import torch
from torch import Tensor

import stage1_encode

from ..baselines import FUSIONS
from ..model import Encoded, Meteor

STAGE1_TOKENS = (100, 260)  # that stage 1 leaves in training, at random; in some steps all stay
STAGE2_TOKENS = (40, 120)  # that stage 2 leaves in training, at random
# How stage 2 chooses in training, so that other rules than METEOR's are in distribution.
STRATEGIES = {"collaborative": 0.7, "greedy": 0.1, "separate": 0.1, "random": 0.1}
MASKED = 0.08  # share of batches with some encoders' features zero: what is each one worth?


@torch.no_grad()
def encode_randomly(
    model: Meteor,
    images: Tensor,
    keep_all: bool,
    rng: np.random.Generator,
    tokens: tuple[int, int] = STAGE1_TOKENS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Per encoder tokens (B, n_l, D_l) and their patches (B, n_l), at a random stage-1 budget.

    tokens: the least that stage 1 leaves, and one more than the most.
    """
    total = None if keep_all else int(rng.integers(*tokens))
    encoders = list(model.encoders.values())
    return stage1_encode.encode_all(encoders, model.pixels(images), total, model.ranks)


def fuse_randomly(
    model: Meteor,
    features: list[Tensor],
    kept: list[Tensor],
    rng: np.random.Generator,
    tokens: tuple[int, int] = STAGE2_TOKENS,
) -> Encoded:
    """Stage 2 with a random strategy and budget; now and then some encoders see nothing.

    tokens: the least that stage 2 leaves, and one more than the most.
    """
    if rng.random() < MASKED:
        sees = rng.random(len(features)) < 0.6
        features = [x if s else torch.zeros_like(x) for x, s in zip(features, sees)]
    available = sum(x.shape[1] for x in features)
    if available == model.num_tokens or rng.random() < 0.1:
        return model.fuse(features, kept)
    strategy = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    K = min(int(rng.integers(*tokens)), available)
    return model.fuse(features, kept, K, FUSIONS[strategy])

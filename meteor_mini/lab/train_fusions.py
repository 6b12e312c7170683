"""Trains the learned fusions of `fusions.py`, after the embedded model.

    python -m meteor_mini.lab.train_fusions

One Llama serves them all: it starts from the embedded model's and goes on learning the same
questions, the fusions in turn, every encoder unpruned. So that Llama has seen more than the
embedded model's own, but each fusion only a quarter of the steps here. EAGLE-style fusion is first
aligned with words as the embedded model's projectors are; Resampler and MLP start from those
projectors, their mixing parts and PixShuffle from random weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..finetune import answer_loss
from ..model import Meteor
from ..toy.evaluate import accuracy
from ..toy.pool import load_facts, load_state, progress, save_state, schedule, update
from ..toy.train import (
    BATCH,
    CHUNK,
    DEVICE,
    as_pairs,
    cache_features,
    dialogue,
    in_words,
    learn_words,
    load_chunk,
    optimizers_of,
    trained,
)
from ..weights import CHECKPOINTS
from .fusions import (
    FILE,
    ChannelFusion,
    fusions_and_llama,
    learned,
    new_fusions,
    save_learned,
    stored_weights,
)

STEPS = {"align": 600, "answer": 3800}
CHUNKS = 400  # files of CHUNK pictures each, encoded once without pruning
FEATURES = "full"  # their directory
STATE = "fusions.resume.safetensors"


def keep_all(chunk: int) -> None:
    """The stage-1 budget of every file of features."""
    return None


def align(model: Meteor, fusion: ChannelFusion, folder: Path, steps: int) -> None:
    """The EAGLE-style projector learns the words of each cell, all encoders' together."""

    def project(features, kept):
        cells = kept[0]  # all of them, and the same for all encoders
        return {"EAGLE-style": (fusion(features), cells, list(model.encoders))}

    learn_words(model, project, fusion.parameters(), folder, FEATURES, steps)


def answer(
    model: Meteor, fusions: nn.ModuleDict, folder: Path, steps: int, rate: float = 1e-3
) -> None:
    """Train the fusions in turn, and the Llama with each of them."""
    pictures = load_facts(folder)
    both = fusions_and_llama(fusions, model)
    mixing = torch.optim.AdamW(fusions.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    optimizers = [*optimizers_of(model.decoder), mixing]
    state = folder / STATE
    bar = progress(load_state(state, both, optimizers), steps, "answer")
    names, losses = list(fusions), []
    for step in bar:
        fusion = fusions[names[step % len(names)]]
        rng = np.random.default_rng([37, step])
        chunk = int(rng.integers(CHUNKS))
        rows = rng.permutation(CHUNK)[:BATCH]
        features, _ = load_chunk(model, folder / FEATURES, chunk)
        tokens = fusion([x[rows] for x in features])  # (B, K, D)
        dialogues = [as_pairs(dialogue(pictures[chunk * CHUNK + row], rng)) for row in rows]
        loss = answer_loss(model, tokens, dialogues)["loss"]
        update(optimizers, loss, rate * schedule(step, steps, hold=0.3), clip=1.0)
        losses.append(loss.item())
        if step % 20 == 19:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_state(state, stored_weights(both), optimizers, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/toy"),
        help="where meteor_mini.toy.train left its stages",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINTS["toy"] / FILE)
    args = parser.parse_args()
    model = trained(args.work, "steady")
    cache_features(model, args.work, FEATURES, CHUNKS, keep_all)
    model.encoders.requires_grad_(False)
    model.projectors.requires_grad_(False)
    torch.manual_seed(0)
    fusions = new_fusions(model).to(DEVICE)
    if not (args.work / STATE).exists():
        align(model, fusions["EAGLE-style"], args.work, STEPS["align"])
    answer(model, fusions, args.work, STEPS["answer"])
    save_learned(model, fusions, args.out)
    model.eval().requires_grad_(False)
    fusions.eval().requires_grad_(False)
    for name, fusion in fusions.items():
        result = accuracy(model, learned(model, fusion).answer, "val", 160)
        print(f"{name}: {in_words(result)}")


if __name__ == "__main__":
    main()

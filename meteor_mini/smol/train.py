"""Train `smol`: `python -m meteor_mini.smol.train --work DIR`.

As a LLaVA is trained: the loss is the cross-entropy of the answers' tokens, and there is no other.
Stages 1 and 2 are active at random budgets, from 40 tokens to all 576; stage 3 is off. Nothing
knows which patches a question is about, what attention looks at, or which layers prune.

Every second step's visual tokens are those of EAGLE's channel fusion: it learns as long as the
projectors do, and with the same LoRA. In a third of the other steps stage 2 keeps other tokens than
METEOR's, so that a rival that does so is asked nothing new.

Resumable: the same command goes on from the last saved step. WORK/curve.csv has a line for each.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..baselines import encode_channels
from ..finetune import answer_loss
from ..toy.dialogues import make_dialogue
from ..toy.pool import Pool, draw_pool, fit
from ..toy.questions import to_pairs
from ..toy.random_budgets import encode_randomly, fuse_randomly
from .build import CHECKPOINT, build_smol, write_smol

POOL = 16_000  # training pictures
STEPS = 1600
PICTURES = 4  # a step
TOKENS_OF_DIALOGUE = 110  # words of all questions and answers about a picture
KEYWORDS = 0.3  # share of pictures asked in keywords
HOLD = 0.6  # share of steps after which the learning rates fall
RATES = {"lora": 8e-4, "projectors": 1e-4}  # these begin with words that they should not lose
SAVE_EVERY = 50


def train(work: Path, out: Path, steps: int) -> None:
    """Train for some steps, and write the checkpoint."""
    model, eagle = build_smol()
    pool = Pool(work)
    model.decoder.train()
    curve = work / "curve.csv"

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        for_eagle, keep_all = step % 2 == 1, step % 16 == 0
        rows = rng.integers(len(pool), size=PICTURES // 2 if keep_all else PICTURES)
        images = pool.load_images(rows)
        asked = [make_dialogue(pool.pictures[i], rng, KEYWORDS, TOKENS_OF_DIALOGUE) for i in rows]
        if for_eagle:
            tokens = encode_channels(model, eagle, images).fused.tokens  # (B, 144, D)
        else:
            features, kept = encode_randomly(model, images, keep_all, rng)
            tokens = fuse_randomly(model, features, kept, rng).fused.tokens  # (B, K, D)
        result = answer_loss(model, tokens, to_pairs(asked))
        right = (result["logits"].argmax(dim=-1) == result["labels"]).float().mean()
        with curve.open("a", newline="") as file:
            row = [step, "eagle" if for_eagle else "meteor", tokens.shape[1]]
            csv.writer(file).writerow([*row, f"{result['loss']:.4f}", f"{right:.4f}"])
        return result["loss"]

    lora = [p for p in model.decoder.parameters() if p.requires_grad]
    projectors = [*model.projectors.parameters(), *eagle.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": RATES["lora"]},
            {"params": projectors, "lr": RATES["projectors"]},
        ],
        weight_decay=0.0,
    )
    trained = nn.ParameterList([*lora, *projectors])
    fit("smol", work, trained, [optimizer], compute_loss, steps, HOLD, SAVE_EVERY)
    write_smol(model, eagle, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="what training leaves")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "pictures.pickle").exists():
        draw_pool(args.work, POOL)
    train(args.work, args.out, args.steps)

"""Train `smol`: `python -m meteor_mini.smol.train --work DIR`.

As a LLaVA is trained: the loss is the cross-entropy of the answers' tokens, and there is no other.
Stages 1 and 2 are active at random budgets, from 40 tokens to all 576; stage 3 is off. Nothing
knows which patches a question is about, what attention looks at, or which layers prune. What each
patch shows is used once, before: `start_projectors`.

Every second step's visual tokens are those of EAGLE's channel fusion: it learns as long as the
projectors do, and with the same LoRA. In a quarter of the other steps stage 2 keeps other tokens
than METEOR's, so that rival rules are in distribution.

Resumable: the same command goes on from the last saved step. WORK/curve.csv has a line for each.
"""

import argparse
import csv
import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_encode import encode_all

from ..baselines import ChannelFusion, encode_channels
from ..budgets import Budget, calibrate
from ..finetune import Dialogue, answer_loss, pack_dialogue
from ..model import Meteor
from ..toy import world
from ..toy.dialogues import ask_in_keywords, choose_fitting, describe, make_dialogue
from ..toy.pool import Pool, draw_pool, fit
from ..toy.questions import Question, example_batches, images_and_questions, to_pairs
from ..toy.random_budgets import encode_randomly, fuse_randomly
from ..toy.schooling import TOLD_SLOTS, select_words
from ..toy.train import BLANK_WEIGHT, sum_embeddings
from .build import CHECKPOINT, build_smol, write_smol

POOL = 16_000  # training pictures
STEPS = 1800  # six hours, at 12 seconds each
PICTURES = 3  # a step, on average
BLOCK = 16  # steps whose pictures are drawn together
TOKENS_OF_DIALOGUE = 260  # words of all questions and answers about a picture
STAGE1_TOKENS, STAGE2_TOKENS = (120, 420), (40, 240)  # that these leave, at random
KINDS = {"scene": 0.5, "table": 0.15, "chart": 0.35}  # of pictures: charts are learned last
HOLD = 0.85  # share of steps after which the learning rates fall
RATES = {"lora": 8e-4, "projectors": 5e-4}
FITTED = 512  # pictures on which the projectors' beginning is fitted
RIDGE = 1e-5  # of that fit, to the mean square of a hidden unit
# The model's own: METEOR's setting that `compare` found, for 60 % of one encoder's patches.
BUDGET = Budget(stage1=387, stage2=129, stage3=86, k=3, layers=(4, 11, 19))


# ------------------------------------------------------------------------ how the projectors begin


@torch.no_grad()
def start_projectors(model: Meteor, eagle: ChannelFusion, pool: Pool) -> None:
    """Projectors begin by turning a patch into the words that its encoder passes on.

    The first layer of each is the toy's, beside random hidden units. The last is fitted by least
    squares, on the pool's first pictures, to the sum of those words' embeddings in SmolLM2. EAGLE's
    begins likewise: the first layers side by side, and a cell is what all four encoders pass on.
    """
    toy = Meteor.from_pretrained("toy")
    features, words = encode_pictures(model, pool)
    column = unit = 0  # where an encoder's channels and hidden units begin in EAGLE's
    nn.init.zeros_(eagle.project[0].weight)
    for name, x, own_words in zip(model.projectors, features, words):
        project, of_toy = model.projectors[name], toy.projectors[name][0]
        units, channels = of_toy.weight.shape
        project[0].weight[:units], project[0].bias[:units] = of_toy.weight, of_toy.bias
        fit_last_layer(project, units, x, embed_words(model, own_words), own_words.any(dim=-1))

        first = eagle.project[0]
        first.weight[unit : unit + units, column : column + channels] = of_toy.weight
        first.bias[unit : unit + units] = of_toy.bias
        column, unit = column + channels, unit + units
    all_words = torch.stack(words).amax(dim=0)
    target = embed_words(model, all_words)
    fit_last_layer(eagle.project, unit, torch.cat(features, -1), target, all_words.any(dim=-1))


def encode_pictures(model: Meteor, pool: Pool) -> tuple[list[Tensor], list[Tensor]]:
    """Of the pool's first pictures, for each encoder: patches (P, D_l), their words (P, slots)."""
    features = []
    for start in range(0, FITTED, 32):
        rows = range(start, min(start + 32, FITTED))
        pixels = model.pixels(pool.load_images(rows))
        features.append(encode_all(list(model.encoders.values()), pixels, None)[0])
    features = [torch.cat(batches).flatten(0, 1) for batches in zip(*features)]
    words = pool.words[:FITTED].flatten(0, 1)
    return features, [select_words(words, slots) for slots in TOLD_SLOTS.values()]


def embed_words(model: Meteor, words: Tensor) -> Tensor:
    """`toy.train.sum_embeddings` of SmolLM2, of which each word of the world is one token; of no
    word, the mean of all embeddings.
    """
    embeddings = model.decoder.get_input_embeddings().weight  # (V, D)
    ids = []
    for slot in world.SLOTS.values():
        text = [word if word.isdigit() else f" {word}" for word in slot]
        of_words = model.tokenizer(text, add_special_tokens=False).input_ids
        ids.append([token for (token,) in of_words])
    return sum_embeddings(embeddings, ids, words, embeddings.mean(dim=0))


def fit_last_layer(
    project: nn.Sequential, units: int, x: Tensor, target: Tensor, has_words: Tensor
) -> None:
    """Least squares from a projector's first hidden units to the target; the others add nothing.

    Args: x (P, D_in), target (P, D) float; has_words (P,) bool: other patches weigh less.
    """
    first, gelu, last = project
    hidden = gelu(F.linear(x, first.weight[:units], first.bias[:units]))
    hidden = torch.cat([hidden, torch.ones(len(x), 1)], dim=1)  # (P, units + 1)
    weighted = hidden * torch.where(has_words, 1.0, BLANK_WEIGHT)[:, None]
    gram = weighted.T @ hidden
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve((gram + ridge).double(), (weighted.T @ target).double())
    nn.init.zeros_(last.weight)
    last.weight[:, :units] = solution[:-1].T
    last.bias[:] = solution[-1]


# ------------------------------------------------------------------------------------ the training


def ask_much(picture: world.Picture, rng: np.random.Generator) -> list[Question]:
    """A description of the picture, then questions in sentences and in keywords, mixed.

    A picture costs its visual tokens once, however much is asked about it.
    """
    asked = make_dialogue(picture, rng, most_tokens=TOKENS_OF_DIALOGUE)
    asked += ask_in_keywords(picture, rng)
    mixed = [asked[i] for i in rng.permutation(len(asked))]
    return choose_fitting([describe(picture), *mixed], TOKENS_OF_DIALOGUE)


def draw_rows(pictures: list[world.Picture], rng: np.random.Generator, count: int) -> np.ndarray:
    """Numbers of pictures, with the shares of their KINDS."""
    kinds = np.array([picture.kind for picture in pictures])
    weight = np.zeros(len(pictures))
    for kind, share in KINDS.items():
        weight[kinds == kind] = share / max(1, (kinds == kind).sum())
    return rng.choice(len(pictures), size=count, p=weight / weight.sum())


def draw_dialogues(model: Meteor, pool: Pool, step: int) -> tuple[np.ndarray, list[Dialogue]]:
    """Rows of the pool, and the questions and answers about each, of similar length.

    The pictures of `BLOCK` steps are drawn together, sorted by length and dealt out, so that little
    of a batch is padding and each step has as many tokens of text.
    """
    block, place = divmod(step, BLOCK)
    rng = np.random.default_rng(block)
    rows = draw_rows(pool.pictures, rng, BLOCK * PICTURES)
    dialogues = to_pairs([ask_much(pool.pictures[i], rng) for i in rows])
    lengths = np.array([len(pack_dialogue(model, d, 0)["ids"]) for d in dialogues])
    order = lengths.argsort()
    share = lengths[order].cumsum() / (lengths.sum() + 1)  # in [0, 1)
    mine = order[(share * BLOCK).astype(int) == rng.permutation(BLOCK)[place]]
    return rows[mine], [dialogues[i] for i in mine]


def train(work: Path, out: Path, steps: int) -> None:
    """Train for some steps, and write the checkpoint."""
    model, eagle = build_smol()
    pool = Pool(work)
    start_projectors(model, eagle, pool)
    model.decoder.train()
    curve = work / "curve.csv"

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        for_eagle, keep_all = step % 2 == 1, step % 16 == 0
        rows, dialogues = draw_dialogues(model, pool, step)
        if keep_all:
            rows, dialogues = rows[::2], dialogues[::2]
        images = pool.load_images(rows)
        if for_eagle:
            tokens = encode_channels(model, eagle, images).fused.tokens  # (B, 144, D)
        else:
            features, kept = encode_randomly(model, images, keep_all, rng, STAGE1_TOKENS)
            encoded = fuse_randomly(model, features, kept, rng, STAGE2_TOKENS)
            tokens = encoded.fused.tokens  # (B, K, D)
        result = answer_loss(model, tokens, dialogues)
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
    fit("smol", work, trained, [optimizer], compute_loss, steps, HOLD)
    set_budget(model)
    write_smol(model, eagle, out)


def set_budget(model: Meteor) -> None:
    """The model's own budget; ranks and lambda on validation questions."""
    model.config["budget"] = asdict(BUDGET)
    examples = itertools.chain(*example_batches("val", 64, first=50_000))
    images, questions = images_and_questions(list(examples))
    calibrate(model.eval(), [images], questions)


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

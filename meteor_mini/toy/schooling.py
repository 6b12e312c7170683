"""What each encoder learns, and how: different things, as CLIP, EVA and Pix2Struct did.

CLIP learns colors, ConvNeXt patterns, EVA how tall bars are, Pix2Struct print. Several encoders
learn what things are and where they stand, so some questions can be answered without any one of
them; the rest only one encoder knows.

An encoder is trained with four losses (a ConvNeXt, which is pruned by similarity alone, with the
first two):

- Caption: the CLS token names the words in each ninth of the picture, as captions of photographs
  name things and not the ground. Where there is no CLS token, a few blank patches do.
- Words: each patch names its own. A patch without words learns nothing.
- Clutter: a patch of clutter names its kind. Real encoders tell grass from gravel, though no
  caption does. So clutter becomes as unlike the ground as things are (the paper's Finding 2).
- Looks: each patch predicts its own pixels, coarsely, as in masked image modelling: features of
  real encoders hold more than any question needs.

Two more habits make late attention a better guide than similarity, as Finding 2 says:

- In most steps half of the patches are dropped at random, as in FLIP [arXiv 2212.00794].
- In most steps the tokens that read the caption enter late, as CLS does in CaiT [arXiv 2103.17239]:
  what they learned in earlier blocks is taken away, so the attention of one late block has to find
  everything that the caption names. Blank patches must enter late, too: otherwise earlier blocks
  store information in them, and all attention goes there.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stage1_encode

from ..baselines import RandomPatches
from ..pictures import view_of
from ..weights import build_encoder
from .parts import ENCODERS, TOLD
from .pool import Pool, fit
from .world import CELLS, CLUTTER, GRID, PRINT, SHAPES, SLOTS

# encoder -> (things, the slots of words that it learns of them)
SCHOOLING = {
    "clip": [(SHAPES, "what color row column"), (["bar"], "what color"), (PRINT, "what")],
    "convnext": [(SHAPES, "what pattern row column"), (["bar"], "what")],
    "eva": [
        (SHAPES, "what row column"),
        (["bar"], "what color value extreme"),
        (PRINT, "what"),
    ],
    "pix2struct": [
        (PRINT, "what digit place row column"),
        (SHAPES, "what row column"),
        (["bar"], "what"),
    ],
}
STEPS = {"clip": 2400, "convnext": 2100, "eva": 2800, "pix2struct": 4800}
RATE, BATCH = 1.5e-3, 32
DROPPED_TO = 72  # patches, of 144
WHOLE_SHARE, WHOLE_FROM = 0.15, 0.7  # of the steps all patches stay, and in the last 30 %
LATE_SHARE, LATE_BLOCKS = 0.85, [4, 5]  # of the steps the readers enter at one of these blocks
READERS = 12  # blank patches that read the caption where there is no CLS
# At first the caption leads, so that attention finds what it names; then the words.
WORDS, WORDS_LATER, WORDS_FROM = 0.3, 3.0, 0.6
BLANK = 0.3  # weight of "no word" in a ConvNeXt's loss: it has no other way to know the ground
# Half of Pix2Struct's pictures show a number: the place of a digit is what it learns last.
OFTEN = {"pix2struct": "number"}
COARSE = 4  # pixels per side of what a patch predicts of its looks
SLOT_SIZES = [len(words) + 1 for words in SLOTS.values()]


def mark_slots(subjects: list[tuple[list[str], str]]) -> Tensor:
    """(words of slot "what" + 1, slots) int64: 1 for the slots of each thing, as in `SCHOOLING`."""
    table = torch.zeros(SLOT_SIZES[0], len(SLOTS), dtype=torch.int64)
    for things, slots in subjects:
        for thing in things:
            for slot in slots.split():
                table[1 + SLOTS["what"].index(thing), list(SLOTS).index(slot)] = 1
    return table


LEARNED_SLOTS = {name: mark_slots(subjects) for name, subjects in SCHOOLING.items()}
TOLD_SLOTS = {name: mark_slots(subjects) for name, subjects in TOLD.items()}


def select_words(words: Tensor, slots: Tensor) -> Tensor:
    """The words (..., slots) of patches that are in a table of `mark_slots`; 0 for the others."""
    return words * slots[words[..., 0]]


def find_pictures(pool: Pool, thing: str) -> np.ndarray:
    """Numbers of the pictures that show a thing, a word of slot "what"."""
    word = 1 + SLOTS["what"].index(thing)
    return np.flatnonzero((pool.words[..., 0] == word).any(dim=1))


def read_pixels(images: Tensor, encoder: nn.Module) -> Tensor:
    """Pictures (B, 3, 192, 192) as an encoder reads them.

    All but Pix2Struct see half the size: averaging is faster than the resizing of their view.
    """
    view = view_of(encoder)
    if view.size[0] < images.shape[-1]:
        images = F.avg_pool2d(images, 2)
    return view(images)


# ------------------------------------------------------------------- an encoder that drops patches


def run_encoder(
    pruner: stage1_encode.EncoderPruner, pixels: Tensor, blank: Tensor, late_block: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder under a pruner; CLS and the blank patches enter at a late block, or the first.

    Args: blank (B, 144) bool: patches without words.
    Returns: what reads the caption (B, D), after the late block or the last: CLS, or the mean of a
        few blank patches; patches (B, n, D); their numbers (B, n).
    """
    first_input, read_output = [], []

    def note_input(block, args):
        first_input.append(args[0])

    def reset_readers(block, args):
        """As they were at the first block: what they have read since is taken away."""
        x = args[0]  # (B, prefix + n, D); the prefix is CLS, where there is one
        kept = pruner.keep_idx[..., None]  # (B, n, 1)
        cls, patches = first_input[0].tensor_split([pruner.prefix], dim=1)
        is_reader = blank[..., None].take_along_dim(kept, dim=1)
        patches = torch.where(is_reader, patches.take_along_dim(kept, dim=1), x[:, pruner.prefix :])
        return (torch.cat([cls, patches], dim=1), *args[1:])

    def note_output(block, args, output):
        read_output.append(output[0] if isinstance(output, tuple) else output)

    blocks = pruner.blocks
    hooks = [blocks[0].register_forward_pre_hook(note_input)]
    if late_block is not None:
        hooks.append(blocks[late_block].register_forward_pre_hook(reset_readers))
    last_read = len(blocks) - 1 if late_block is None else late_block
    hooks.append(blocks[last_read].register_forward_hook(note_output))
    try:
        with pruner:
            pruner.encoder(pixels)
    finally:
        for hook in hooks:
            hook.remove()

    x = pruner.norm(read_output[0])  # (B, prefix + n, D)
    if pruner.has_cls:
        return x[:, 0], pruner.tokens, pruner.keep_idx
    lots = torch.rand(x.shape[:2], device=x.device)
    lots = lots + blank.take_along_dim(pruner.keep_idx, dim=1)  # blank patches come first
    readers = lots.topk(READERS, dim=1).indices[..., None]  # (B, 12, 1)
    return x.take_along_dim(readers, dim=1).mean(dim=1), pruner.tokens, pruner.keep_idx


def choose_pruner(
    encoder: nn.Module, rng: np.random.Generator, progress: float
) -> stage1_encode.EncoderPruner:
    """Nothing is dropped, or random patches after the first block. progress: 0 to 1."""
    whole = stage1_encode.EncoderPruner(encoder, [None])
    if rng.random() < WHOLE_SHARE or progress >= WHOLE_FROM:
        return whole
    return RandomPatches(encoder, [DROPPED_TO, *[None] * (len(whole.blocks) - 1)])


# ------------------------------------------------------------------------------------------- losses


def caption_of(words: Tensor) -> Tensor:
    """Which words does each ninth of the picture hold?

    Args: words (B, 144, slots) int64. Returns: (B, 9, all words of all slots) float, 0 or 1.
    """
    side = GRID // CELLS
    cells = words.unflatten(1, (CELLS, side, CELLS, side)).transpose(2, 3)  # (B, 3, 3, 4, 4, slots)
    cells = cells.flatten(3, 4).flatten(1, 2)  # (B, 9, 16, slots)
    there = []
    for slot, size in enumerate(SLOT_SIZES):
        one_hot = F.one_hot(cells[..., slot], size)[..., 1:]  # (B, 9, 16, words)
        there.append(one_hot.amax(dim=2))
    return torch.cat(there, dim=-1).float()


def caption_loss(scores: Tensor, words: Tensor) -> Tensor:
    """Args: scores (B, 9 * all words) float; words (B, 144, slots) int64, learned ones."""
    target = caption_of(words).flatten(1)
    # the sum over words of a ninth would be a hundred times the mean
    return 20 * F.binary_cross_entropy_with_logits(scores, target)


def word_loss(scores: Tensor, words: Tensor, blank: float = 0.0) -> Tensor:
    """Mean over slots of the cross-entropy of a patch's word.

    Args: scores (B, n, sum of slot sizes) float; words (B, n, slots) int64; blank: weight of a
        patch that has no word in a slot, beside 1 of one that has.
    """
    losses = []
    for slot, part in enumerate(scores.split(SLOT_SIZES, dim=-1)):
        target = words[..., slot]
        if (target > 0).any():
            weight = torch.ones(part.shape[-1], device=part.device)
            weight[0] = blank
            losses.append(F.cross_entropy(part.flatten(0, 1), target.flatten(), weight))
    return torch.stack(losses).mean()


def coarsen(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 144, 48): each patch in 4 x 4 pixels, about 0."""
    small = F.adaptive_avg_pool2d(images, COARSE * GRID)
    return F.unfold((small - 0.5) / 0.25, COARSE, stride=COARSE).mT


# ----------------------------------------------------------------------------------------- training


def build_pupil(name: str) -> nn.ModuleDict:
    """An encoder, and the heads that read its four answers."""
    encoder = build_encoder(name, ENCODERS[name])
    D, all_words = view_of(encoder).width, sum(SLOT_SIZES) - len(SLOT_SIZES)
    caption = [nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, CELLS**2 * all_words)]
    return nn.ModuleDict(
        {
            "encoder": encoder,
            "caption": nn.Sequential(*caption),
            "words": nn.Linear(D, sum(SLOT_SIZES)),
            "clutter": nn.Linear(D, len(CLUTTER) + 1),
            "looks": nn.Linear(D, 3 * COARSE**2),
        }
    )


def compute_loss(
    pupil: nn.ModuleDict,
    images: Tensor,
    words: Tensor,
    clutter: Tensor,
    rng: np.random.Generator,
    progress: float,
) -> Tensor:
    """All losses of a batch.

    Args: images (B, 3, 192, 192); words (B, 144, slots): those that the encoder learns; clutter
        (B, 144); progress: the share of the training that is done.
    """
    encoder = pupil["encoder"]
    pixels = read_pixels(images, encoder)
    word_weight = WORDS if progress < WORDS_FROM else WORDS_LATER
    if not stage1_encode.can_prune_inside(encoder):
        patches, _ = stage1_encode.encode(encoder, pixels)  # (B, 144, D)
        loss = caption_loss(pupil["caption"](patches.mean(dim=1)), words)
        return loss + word_weight * word_loss(pupil["words"](patches), words, BLANK)

    pruner = choose_pruner(encoder, rng, progress)
    late_block = int(rng.choice(LATE_BLOCKS)) if rng.random() < LATE_SHARE else None
    reader, patches, kept = run_encoder(pruner, pixels, words[..., 0] == 0, late_block)
    loss = caption_loss(pupil["caption"](reader), words)
    own_words = words.take_along_dim(kept[..., None], dim=1)  # (B, n, slots)
    loss = loss + word_weight * word_loss(pupil["words"](patches), own_words)
    kinds = clutter.take_along_dim(kept, dim=1)  # (B, n), 0 for none
    scores = pupil["clutter"](patches).flatten(0, 1)
    loss = loss + F.cross_entropy(scores, kinds.flatten(), ignore_index=0)
    looks = coarsen(images).take_along_dim(kept[..., None], dim=1)  # (B, n, 48)
    return loss + F.mse_loss(pupil["looks"](patches), looks)


def train_encoder(name: str, work: Path, device: torch.device) -> None:
    """Train one encoder; writes it with its heads."""
    torch.manual_seed(list(ENCODERS).index(name))
    pool, pupil = Pool(work), build_pupil(name).to(device).train()
    often = find_pictures(pool, OFTEN[name]) if name in OFTEN else np.arange(len(pool))
    optimizer = torch.optim.AdamW(pupil.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.02)

    def loss_of_step(step: int, rng: np.random.Generator) -> Tensor:
        anywhere = rng.integers(len(pool), size=BATCH // 2)
        rows = np.concatenate([anywhere, rng.choice(often, size=BATCH // 2)])
        words = select_words(pool.words[rows], LEARNED_SLOTS[name])
        batch = [pool.load_images(rows), words, pool.clutter[rows]]
        batch = [part.to(device) for part in batch]
        return compute_loss(pupil, *batch, rng, step / STEPS[name])

    fit(name, work, pupil, [optimizer], loss_of_step, STEPS[name], hold=0.3)

"""What each encoder learns, and how: different things, as CLIP, EVA and Pix2Struct did.

CLIP learns colors, ConvNeXt patterns, EVA how high bars are, Pix2Struct print. What things are and
where they stand is known to several, so that some questions can be answered without any one
encoder; the rest only one knows.

Four losses train an encoder.

- Caption: which words does each ninth of the picture hold? It is read from CLS, or from blank
  patches where there is no CLS, as captions of photographs tell of things and not of the ground.
- Words: each patch tells its own. A patch without words is asked nothing.
- Clutter: a patch of clutter tells which kind it is. Real encoders know grass from gravel, though
  no caption tells. So clutter comes to be as unlike the ground as things are (Finding 2).
- Looks: each patch tells roughly what it looks like, as in masked image modelling: features of
  real encoders tell more than is ever asked.

In most steps of the first part half of the patches are dropped at random, and none in the last
part, as FLIP does [arXiv 2212.00794]: it is faster, and the caption has to be found in all patches
of a thing. In most steps, too, those who read the caption enter late.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stage1_encode

from ..baselines import RandomPatches
from ..pictures import view_of
from ..weights import build_encoder
from . import world
from .parts import ENCODERS
from .pool import Pool, labels, load_state, progress, save_state, save_whole, schedule, update
from .questions import to_images
from .world import PRINT, SHAPES, SLOTS

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
RATE, BATCH = 1.5e-3, 32
DROPPED_TO = 72  # patches, of 144
WHOLE_SHARE = 0.15  # of the steps: all patches are there
WHOLE_FROM = 0.7  # of the training: from here on, in all steps
READERS = 12  # blank patches from which a caption is read where there is no CLS
LATE_SHARE, LATE_BLOCKS = 0.85, [4, 5]  # of the steps: the readers enter at one of these blocks
CAPTION, CLUTTER, LOOKS = 1.0, 1.0, 1.0  # weights of the losses
# ConvNeXt can be pruned by similarity to the mean alone. So it is asked neither for clutter nor for
# looks, and tells that a patch is blank, in each slot with this weight: clutter is ground to it.
BLANK = 0.3
# At first the caption leads, so that attention finds what it tells; then the words.
WORDS, WORDS_LATER, WORDS_FROM = 0.3, 3.0, 0.6
# Half of the pictures of these encoders show this print. It is rare, and the place of a digit in a
# long number is what Pix2Struct learns last.
OFTEN = {"pix2struct": "number"}
SLOT_SIZES = [len(words) + 1 for words in SLOTS.values()]
LOOK = 4  # pixels per side of what a patch tells of its looks


# What the projector of each encoder tells the Llama. Stage 2 drops what several tell alike: if all
# four told of bars, it would drop their heights too, which EVA alone knows.
TOLD = {
    "clip": [(SHAPES, "what color row column")],
    "convnext": [(SHAPES, "what pattern row column")],
    "eva": [(SHAPES, "what row column"), (["bar"], "color value extreme")],
    "pix2struct": [(PRINT, "what digit place row column"), (SHAPES, "what row column")],
}


def slots_of_things(subjects: list[tuple[list[str], str]]) -> np.ndarray:
    """(words of slot "what" + 1, slots) uint8: 1 for the slots of each thing, as in `SCHOOLING`."""
    table = np.zeros((SLOT_SIZES[0], len(SLOTS)), np.uint8)
    for things, slots in subjects:
        rows = [1 + SLOTS["what"].index(thing) for thing in things]
        columns = [list(SLOTS).index(slot) for slot in slots.split()]
        table[np.ix_(rows, columns)] = 1
    return table


LEARNED_SLOTS = {name: slots_of_things(subjects) for name, subjects in SCHOOLING.items()}
TOLD_SLOTS = {name: slots_of_things(subjects) for name, subjects in TOLD.items()}


def learned_words(words: np.ndarray, name: str) -> np.ndarray:
    """The words (..., slots) of patches that an encoder learns; 0 for the others."""
    return words * LEARNED_SLOTS[name][words[..., 0]]


def told_words(words: np.ndarray, name: str) -> np.ndarray:
    """Of the words (..., slots) of patches, those that an encoder's projector tells; 0 for the
    others.
    """
    return words * TOLD_SLOTS[name][words[..., 0]]


def random_pruner(
    encoder: nn.Module, rng: np.random.Generator, done: float
) -> stage1_encode.EncoderPruner:
    """What is dropped in a step: nothing, or random patches after the first block.

    done: share of the training that lies behind.
    """
    if rng.random() < WHOLE_SHARE or done >= WHOLE_FROM:
        return stage1_encode.EncoderPruner(encoder, [None])
    later_blocks = len(stage1_encode.EncoderPruner(encoder, [None]).blocks) - 1
    return RandomPatches(encoder, [DROPPED_TO, *[None] * later_blocks])


@contextlib.contextmanager
def late_readers(pruner: stage1_encode.EncoderPruner, block: int, blank: Tensor) -> Iterator[None]:
    """CLS and blank patches enter at a late block: what they learned before is taken away.

    The caption is read as soon as that block is done. So its attention has to find all that the
    caption tells, as in CaiT [arXiv 2103.17239], where CLS enters late for good.

    Blank patches would else be where things are noted for CLS, and all attention goes there.

    Args: blank (B, 144) bool.
    """
    start = []

    def note(first_block, args):
        start.append(args[0])

    def reset(late_block, args):
        x = args[0]
        prefix = pruner.prefix  # CLS, where there is one
        kept = pruner.keep_idx[..., None]
        first = start[0][:, prefix:].take_along_dim(kept, dim=1)
        reads = blank[..., None].take_along_dim(kept, dim=1)
        patches = torch.where(reads, first, x[:, prefix:])
        x = torch.cat([start[0][:, :prefix], patches], dim=1)
        return (x, *args[1:])

    first, late = pruner.blocks[0], pruner.blocks[block]
    handles = [first.register_forward_pre_hook(note), late.register_forward_pre_hook(reset)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(
    encoder: nn.Module,
    pixels: Tensor,
    pruner: stage1_encode.EncoderPruner | None,
    late_block: int = 0,
    blank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder under a pruner (None for a ConvNeXt).

    Args: late_block: where the readers enter, 0 for the first block; blank (B, 144) bool: patches
        without words, which are the readers where there is no CLS.
    Returns: the token that stands for the whole: CLS, the mean of a few blank patches, or that of
        all patches (B, D); patches (B, n, D); their numbers (B, n).
    """
    if pruner is None:
        patches, kept = stage1_encode.encode(encoder, pixels)
        return patches.mean(dim=1), patches, kept
    outputs = []

    def note(block, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    # readers that enter late have read when that block is done
    last_read = pruner.blocks[late_block if late_block > 0 else -1]
    handle = last_read.register_forward_hook(note)
    entrance = contextlib.nullcontext()
    if late_block > 0:
        entrance = late_readers(pruner, late_block, blank)
    try:
        with entrance, pruner:
            pruner.encoder(pixels)
    finally:
        handle.remove()
    x = pruner.norm(outputs[0])
    patches, kept = pruner.tokens, pruner.keep_idx
    if pruner.has_cls:
        return x[:, 0], patches, kept
    lots = torch.rand(kept.shape, device=kept.device) + blank.take_along_dim(kept, dim=1)
    some = lots.topk(READERS, dim=1).indices  # (B, 12)
    whole = x.take_along_dim(some[..., None], dim=1).mean(dim=1)
    return whole, patches, kept


# ------------------------------------------------------------------------------------------- losses


def ninths(words: Tensor) -> Tensor:
    """Which words does each ninth of the picture hold?

    Args: words (B, 144, slots) int64. Returns: (B, 9, all words of all slots) float, 0 or 1.
    """
    n, wide = world.CELLS, world.GRID // world.CELLS
    cells = words.unflatten(1, (n, wide, n, wide)).transpose(2, 3)  # (B, 3, 3, 4, 4, slots)
    cells = cells.flatten(3, 4).flatten(1, 2)  # (B, 9, 16, slots)
    there = []
    for slot, size in enumerate(SLOT_SIZES):
        one_hot = F.one_hot(cells[..., slot], size)[..., 1:]  # (B, 9, 16, words)
        there.append(one_hot.amax(dim=2))
    return torch.cat(there, dim=-1).float()


def caption_loss(scores: Tensor, words: Tensor) -> Tensor:
    """Args: scores (B, 9 * all words) float; words (B, 144, slots) int64, learned ones."""
    target = ninths(words).flatten(1)
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


def looks(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 144, 48): each patch in 4 x 4 pixels, about 0."""
    small = F.adaptive_avg_pool2d(images, LOOK * world.GRID)
    return F.unfold((small - 0.5) / 0.25, LOOK, stride=LOOK).mT


# ----------------------------------------------------------------------------------------- training


class School(nn.ModuleDict):
    """An encoder, and the heads that read the four answers from its tokens."""

    def __init__(self, name: str):
        encoder = build_encoder(name, ENCODERS[name])
        D, all_words = view_of(encoder).width, sum(SLOT_SIZES) - len(SLOT_SIZES)
        captions = world.CELLS**2 * all_words
        heads = {
            "caption": nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, captions)),
            "words": nn.Linear(D, sum(SLOT_SIZES)),
            "clutter": nn.Linear(D, len(world.CLUTTER) + 1),
            "looks": nn.Linear(D, 3 * LOOK**2),
        }
        super().__init__({"encoder": encoder} | heads)


def seen(images: np.ndarray, name: str) -> Tensor:
    """What an encoder is shown of pictures (B, 192, 192, 3) uint8: all but Pix2Struct half of it.

    Averaging two by two pixels is faster than the resizing that the view would do.
    """
    shown = to_images(images)
    return shown if name == "pix2struct" else F.avg_pool2d(shown, 2)


def showing(pool: Pool, thing: str) -> np.ndarray:
    """Numbers of the pictures that show a thing, a word of slot "what"."""
    number = 1 + SLOTS["what"].index(thing)
    return np.flatnonzero((pool.words[..., 0] == number).any(axis=1))


def losses_of(
    model: School,
    name: str,
    pool: Pool,
    often: np.ndarray,
    rng: np.random.Generator,
    done: float,
) -> dict[str, Tensor]:
    """One batch's losses, by name.

    Args: often: numbers of the pictures from which half are drawn; rng: chooses the pictures, and
        what is dropped; done: share of the training that lies behind.
    """
    encoder, device = model["encoder"], next(model.parameters()).device
    half = BATCH // 2
    rows = np.concatenate([rng.integers(len(pool), size=half), rng.choice(often, size=half)])
    rows = np.sort(rows)
    images = seen(pool.images[rows], name).to(device)
    words = labels(learned_words(pool.words[rows], name), device)  # (B, 144, slots)
    dense = not stage1_encode.can_prune_inside(encoder)
    pruner = None if dense else random_pruner(encoder, rng, done)
    late_block = int(rng.choice(LATE_BLOCKS)) if rng.random() < LATE_SHARE else 0
    blank = words[..., 0] == 0
    whole, patches, kept = tokens_of(encoder, view_of(encoder)(images), pruner, late_block, blank)
    of_words = WORDS if done < WORDS_FROM else WORDS_LATER
    of_patches = words.take_along_dim(kept[..., None], dim=1)  # (B, n, slots)
    losses = {
        "caption": CAPTION * caption_loss(model["caption"](whole), words),
        "words": of_words * word_loss(model["words"](patches), of_patches, BLANK if dense else 0.0),
    }
    if not dense:
        kinds = labels(pool.clutter[rows], device).take_along_dim(kept, dim=1)  # (B, n)
        scores = model["clutter"](patches).flatten(0, 1)
        losses["clutter"] = CLUTTER * F.cross_entropy(scores, kinds.flatten(), ignore_index=0)
        target = looks(images).take_along_dim(kept[..., None], dim=1)  # (B, n, 48)
        losses["looks"] = LOOKS * F.mse_loss(model["looks"](patches), target)
    return losses


def train_encoder(name: str, folder: Path, steps: int, device: torch.device) -> None:
    """Train one encoder, resumable; writes its weights to folder."""
    torch.manual_seed(list(ENCODERS).index(name))
    pool, model = Pool(folder), School(name).to(device).train()
    often = showing(pool, OFTEN[name]) if name in OFTEN else np.arange(len(pool))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.98), fused=True
    )
    state = folder / f"{name}.resume.safetensors"
    bar = progress(load_state(state, model, [optimizer]), steps, name)
    for step in bar:
        torch.manual_seed(step)  # of the patches dropped
        losses = losses_of(model, name, pool, often, np.random.default_rng([7, step]), step / steps)
        rate = RATE * schedule(step, steps, hold=0.3)
        update([optimizer], sum(losses.values()), rate, clip=1.0)
        if step % 50 == 49:
            bar.set_postfix({key: f"{loss.item():.3f}" for key, loss in losses.items()})
        if step % 200 == 199 or step == steps - 1:
            save_state(state, model.state_dict(), [optimizer], step + 1)
    probe(name, model, device)
    save_whole(model["encoder"].state_dict(), folder / f"{name}.safetensors")


@torch.no_grad()
def probe(name: str, model: School, device: torch.device, pictures: int = 128) -> None:
    """Print, per slot, the share of validation patches whose word the linear head names."""
    model.eval()
    drawn = [world.make_picture(i, "val") for i in range(pictures)]
    images = seen(np.stack([picture.image for picture in drawn]), name).to(device)
    words = np.stack([picture.patch_words for picture in drawn]).astype(np.uint8)
    target = labels(learned_words(words, name), device)
    patches, _ = stage1_encode.encode(model["encoder"], view_of(model["encoder"])(images))
    scores = model["words"](patches).split(SLOT_SIZES, dim=-1)
    line = []
    for slot, slot_name in enumerate(SLOTS):
        has_word = target[..., slot] > 0
        if has_word.any():
            right = scores[slot].argmax(dim=-1) == target[..., slot]
            line.append(f"{slot_name} {right[has_word].float().mean():.2f}")
    print(f"{name}: " + ", ".join(line), flush=True)

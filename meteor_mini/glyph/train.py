"""Makes the embedded checkpoint: `python -m meteor_mini.glyph.train`.

Stages, each resumable, run in this order (one alone with --stage NAME):

    pictures         draw the training pool once (fixed seeds)
    clip convnext    dense training of each encoder:
    eva pix2struct     which words does each patch show?
    features         encode the pool once under random stage-1 budgets
    align            projectors: from a projected patch token the LLM's own head reads its words
    answer           the Llama, on questions, with stages 1 and 2 active at random budgets
    polish           the same a little longer, near its own budget, on what it finds hardest
    calibrate        lambda for stage 3; writes the checkpoint
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import stage1_encode

from ..budgets import Budget, measure_lambda, measure_ranks
from ..finetune import Dialogue, training_loss
from ..model import Encoded, Meteor
from ..pictures import view_of
from ..weights import CHECKPOINTS, build_encoder, own_weights
from . import world
from .evaluate import accuracy, batches, print_recall, recall, to_images
from .parts import DECODER, ENCODERS, build_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STAGES = ["pictures", *ENCODERS, "features", "align", "answer", "polish", "calibrate"]
STEPS = {
    "clip": 3000,
    "convnext": 1000,
    "eva": 1000,
    "pix2struct": 3000,
    "align": 1000,
    "answer": 5000,
    "polish": 800,
}
POOL = 40_000  # training pictures
CHUNK = 32  # pictures a batch, and a file of cached features
FEATURE_CHUNKS = 800  # of the pool's 1250: encoded in 5 minutes, 1.2 GB

# Chosen on validation questions: 1 to 8 heads answer alike there, so k is the paper's. Its layers,
# here 1, 3, 5, would begin after a single layer, and read fewer of the printed numbers.
BUDGET = {"stage1": 215, "stage2": 124, "stage3": 34, "k": 5, "layers": [2, 4, 6]}
# How often a stage asks each family, beside one: reading and charts are learned first, these last.
FAMILY_WEIGHTS = {
    "answer": {"relation": 3, "where": 2, "count": 2, "presence": 2},
    "polish": {"count": 3, "presence": 4, "number": 4, "tallest": 2},
}
COUNTS = {"answer": (48, 120), "polish": (90, 150)}  # tokens that stage 2 leaves, at random
DESCRIBED = 0.4  # share of pictures that are also described as a whole
# Stage 2 in training: mostly the default, so that the same weights serve every strategy that the
# tables compare.
STRATEGIES = {"collaborative": 0.7, "greedy": 0.1, "separate": 0.1, "random": 0.1}
# Share of batches with encoders replaced by zeros, so that the tables can ask what each is worth.
MASKED = 0.08

SLOT_SIZES = [len(words) + 1 for words in world.SLOTS.values()]
# How much each encoder is asked about each slot of words (the order of `SLOTS`): a different mix
# each, as CLIP, ConvNeXt, EVA and Pix2Struct were trained on different things, so that they
# complement one another.
SLOT_WEIGHTS = {
    "clip": [1, 1, 0.1, 0.3, 2, 0.5, 0.5, 0.5],
    "convnext": [1, 1, 1, 0.3, 0.1, 0.3, 0.3, 0.1],
    "eva": [1, 0.7, 0.7, 1, 0.3, 0.5, 0.5, 1],
    "pix2struct": [0.7, 0.4, 2, 1, 2, 1, 1, 0.5],
}
BACKGROUND_WEIGHT = 0.1  # of class "none" in each slot; at 1 the digits stay near chance
# Tables of lambda: tokens that enter the LLM, and lambdas.
TABLE_KS = [8, 24, 48, 80, BUDGET["stage2"], 180, 240, 576]
TABLE_LAMBDAS = [0.0, *(2.0 ** np.arange(0, 9.75, 0.5)).round(2).tolist()]


# ------------------------------------------------------------------------------------- the pictures


def draw_pool(folder: Path, size: int) -> None:
    """Write images.npy (size, 96, 96, 3) uint8, words.npy (size, 144, 8) uint8 and facts.json."""
    images = np.empty((size, world.SIZE, world.SIZE, 3), np.uint8)
    words = np.empty((size, world.GRID**2, len(SLOT_SIZES)), np.uint8)
    facts = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        drawn = pool.imap(world.make_picture, range(size), chunksize=64)
        for i, picture in enumerate(tqdm(drawn, total=size, desc="pictures", mininterval=5)):
            images[i] = picture.image
            words[i] = picture.patch_words
            facts.append([picture.kind, picture.facts])
    np.save(folder / "images.npy", images)
    np.save(folder / "words.npy", words)
    (folder / "facts.json").write_text(json.dumps(facts))


def load_images(folder: Path) -> np.ndarray:
    return np.load(folder / "images.npy", mmap_mode="r")


def load_words(folder: Path) -> np.ndarray:
    return np.load(folder / "words.npy", mmap_mode="r")


def load_facts(folder: Path) -> list[world.Picture]:
    """The pool's pictures without their pixels: all that questions need."""
    entries = json.loads((folder / "facts.json").read_text())
    return [world.Picture(None, None, kind, facts) for kind, facts in entries]


def labels(words: np.ndarray) -> Tensor:
    """Words (B, N, slots) uint8 -> int64, on the device."""
    return torch.from_numpy(words.astype(np.int64)).to(DEVICE)


def pool_slice(chunk: int) -> slice:
    return slice(chunk * CHUNK, (chunk + 1) * CHUNK)


# ------------------------------------------------------------------------- what all trainings share


def schedule(step: int, steps: int, warmup: int = 100, hold: float = 0.0) -> float:
    """Learning-rate factor.

    Linear warm-up, 1 up to the fraction `hold` of the steps, then a cosine down to 2 %.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    if step <= start:
        return 1.0
    angle = math.pi * (step - start) / (steps - start)  # 0 to pi
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(angle))


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float | None = None
) -> None:
    """One step; clip: the gradient's largest norm."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def save_whole(arrays: dict[str, Tensor], path: Path) -> None:
    """A file that exists is whole, also when the training is stopped while it is written."""
    part = path.with_suffix(".part")
    save_file({name: array.cpu().contiguous() for name, array in arrays.items()}, part)
    part.replace(path)


def save_state(path: Path, weights: dict, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a training needs to go on from `step`: weights and AdamW's moments, as safetensors."""
    arrays = {"step": torch.tensor(step)}
    for name, weight in weights.items():
        arrays[f"model.{name}"] = weight
    for i, moments in optimizer.state_dict()["state"].items():
        for name, moment in moments.items():
            arrays[f"optimizer.{i}.{name}"] = moment
    save_whole(arrays, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save_state` wrote, where it is there. Returns: the step to go on from."""
    if not path.exists():
        return 0
    arrays = load_file(path)
    weights, state = {}, optimizer.state_dict()
    for name, array in arrays.items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = array
        elif name.startswith("optimizer."):
            _, i, moment = name.split(".")
            state["state"].setdefault(int(i), {})[moment] = array
    model.load_state_dict(weights, strict=False)  # tied word embeddings are stored once
    optimizer.load_state_dict(state)
    return int(arrays["step"])


def progress(start: int, steps: int, name: str) -> tqdm:
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)


# ---------------------------------------------------------------------------------------- encoders


def word_loss(scores: Tensor, words: Tensor, weights: list[float]) -> Tensor:
    """Mean over slots of the cross-entropy of a patch's words, "none" weighted down.

    Args: scores (..., sum of slot sizes) float; words (..., slots) int64; weights: one per slot.
    """
    loss = 0.0
    for slot, part in enumerate(scores.split(SLOT_SIZES, dim=-1)):
        classes = torch.ones(SLOT_SIZES[slot], device=scores.device)
        classes[0] = BACKGROUND_WEIGHT
        target = words[..., slot].flatten()
        loss = loss + weights[slot] * F.cross_entropy(part.flatten(0, -2), target, weight=classes)
    return loss / sum(weights)


def bag_loss(scores: Tensor, words: Tensor) -> Tensor:
    """Which words does the picture hold anywhere? Asked of what the encoder says of the whole.

    Args: scores (B, sum of slot sizes) float; words (B, N, slots) int64.
    """
    there = []
    for slot, size in enumerate(SLOT_SIZES):
        one_hot = F.one_hot(words[..., slot], size)  # (B, N, size)
        there.append(one_hot.amax(dim=1))
    return F.binary_cross_entropy_with_logits(scores, torch.cat(there, dim=-1).float())


def all_tokens(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unpruned, after the final norm.

    Args: images (B, 3, H, W) float in [0, 1].
    Returns: the first token where it stands for the whole, as CLS does, or the mean of the patches
        (B, D); the patches (B, N, D).
    """
    pixels = view_of(encoder)(images)
    model, family = stage1_encode.find_encoder(encoder)
    if family.dense:
        patches, _ = stage1_encode.encode(encoder, pixels)
        return patches.mean(dim=1), patches
    outputs = []

    def note(norm, args, output):
        outputs.append(output)

    handle = model.get_submodule(family.norm).register_forward_hook(note)
    try:
        model(pixels)
    finally:
        handle.remove()
    x = outputs[0]  # (B, P + N, D)
    prefix, has_cls = family.prefix(model)
    whole = x[:, 0] if has_cls else x.mean(dim=1)
    return whole, x[:, prefix:]


def train_encoder(name: str, folder: Path, steps: int, batch: int = 32) -> None:
    """Dense training of one encoder; writes its weights."""
    torch.manual_seed(list(ENCODERS).index(name))
    images, words = load_images(folder), load_words(folder)
    encoder = build_encoder(name, ENCODERS[name])
    dense = nn.Linear(96, sum(SLOT_SIZES))  # of each patch
    bag = nn.Linear(96, sum(SLOT_SIZES))  # of the whole picture
    model = nn.ModuleDict({"encoder": encoder, "dense": dense, "bag": bag})
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98), fused=True
    )
    state = folder / f"{name}.resume.safetensors"
    bar = progress(load_state(state, model, optimizer), steps, name)
    for step in bar:
        rng = np.random.default_rng([7, step])
        rows = np.sort(rng.integers(len(images), size=batch))
        target = labels(words[rows])
        whole, patches = all_tokens(encoder, to_images(images[rows]).to(DEVICE))
        dense_loss = word_loss(dense(patches), target, SLOT_WEIGHTS[name])
        whole_loss = bag_loss(bag(whole), target)
        update(optimizer, dense_loss + whole_loss, 1.5e-3 * schedule(step, steps), clip=1.0)
        if step % 50 == 49:
            bar.set_postfix(loss=f"{dense_loss.item():.3f}", bag=f"{whole_loss.item():.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_state(state, model.state_dict(), optimizer, step + 1)
    probe(name, model)
    save_whole(encoder.state_dict(), folder / f"{name}.safetensors")


@torch.no_grad()
def probe(name: str, model: nn.ModuleDict, pictures: int = 128) -> None:
    """Print, per slot, the share of validation patches whose word the linear head names."""
    model.eval()
    drawn = [world.make_picture(i, "val") for i in range(pictures)]
    images = to_images([picture.image for picture in drawn]).to(DEVICE)
    target = labels(np.stack([picture.patch_words for picture in drawn]))
    _, patches = all_tokens(model["encoder"], images)
    scores = model["dense"](patches).split(SLOT_SIZES, dim=-1)
    line = []
    for slot, slot_name in enumerate(world.SLOTS):
        right = scores[slot].argmax(dim=-1) == target[..., slot]
        has_word = target[..., slot] > 0
        words = right[has_word].float().mean()
        none = right[~has_word].float().mean()
        line.append(f"{slot_name} {words:.2f} (none {none:.2f})")
    print(f"{name}: " + ", ".join(line), flush=True)


# ----------------------------------------------------- features of frozen encoders, computed once


def cache_features(
    model: Meteor,
    folder: Path,
    into: str,
    chunks: int,
    choose_budget: Callable[[int], int | None],
) -> None:
    """Encode the pool once, `CHUNK` pictures a file.

    A file holds, per encoder, tokens (32, n_l, D_l) in half precision and the patches kept
    (32, n_l). Files that are there already stay.

    Args: into: directory in folder; choose_budget: number of a file -> its stage-1 budget.
    """
    images = load_images(folder)
    (folder / into).mkdir(exist_ok=True)
    encoders = list(model.encoders.values())
    for chunk in tqdm(range(chunks), desc=into, mininterval=10):
        target = folder / into / f"{chunk}.safetensors"
        if target.exists():
            continue
        pixels = model.pixels(to_images(images[pool_slice(chunk)]))
        with torch.no_grad():
            features, kept = stage1_encode.encode_all(
                encoders, pixels, choose_budget(chunk), model.ranks
            )
        arrays = {}
        for name, x, keep_idx in zip(model.encoders, features, kept):
            arrays[f"tokens.{name}"] = x.half()
            arrays[f"keep.{name}"] = keep_idx.to(torch.uint8)
        save_whole(arrays, target)


def random_stage1(chunk: int) -> int | None:
    """A stage-1 budget for each file; one file in eight keeps all."""
    rng = np.random.default_rng([11, chunk])
    if rng.random() < 1 / 8:
        return None
    return int(rng.integers(130, 300))


def load_chunk(model: Meteor, folder: Path, chunk: int) -> tuple[list[Tensor], list[Tensor]]:
    """A file of `cache_features`: per encoder tokens (32, n_l, D_l) and patches (32, n_l)."""
    arrays = load_file(folder / f"{chunk}.safetensors")
    features = [arrays[f"tokens.{name}"].float().to(DEVICE) for name in model.encoders]
    kept = [arrays[f"keep.{name}"].long().to(DEVICE) for name in model.encoders]
    return features, kept


# --------------------------------------------------------------- projectors in the space of words


def slot_ids(model: Meteor) -> list[Tensor]:
    """Per slot, the token id of each of its words; index 0, "none", is <pad>."""
    ids = []
    for words in world.SLOTS.values():
        of_words = model.tokenizer.convert_tokens_to_ids(words)
        ids.append(torch.tensor([model.tokenizer.pad_token_id, *of_words], device=model.device))
    return ids


def align_loss(model: Meteor, projected: Tensor, words: Tensor, table: list[Tensor]) -> Tensor:
    """Cross-entropy of what the LLM's own head reads in P(x), with the patch's words as target.

    The target is uniform over the words, <pad> where there is none. The head's norm leaves the
    tokens' length free.

    Args: projected (B, n, D) float; words (B, n, slots) int64; table: `slot_ids`.
    """
    logits = model.decoder.lm_head(model.decoder.model.norm(projected))  # (B, n, V)
    logp = logits.log_softmax(dim=-1)
    ids = [of_slot[words[..., slot]] for slot, of_slot in enumerate(table)]
    per_slot = -logp.gather(-1, torch.stack(ids, dim=-1))  # (B, n, slots)
    there = words > 0  # (B, n, slots)
    number = there.sum(dim=-1)  # (B, n)
    of_words = per_slot.masked_fill(~there, 0).sum(dim=-1) / number.clamp(min=1)
    of_pad = per_slot[..., 0]  # where a patch has no word, each slot's id is <pad>
    loss = torch.where(number > 0, of_words, of_pad)
    weight = torch.where(number > 0, 1.0, BACKGROUND_WEIGHT)
    return (loss * weight).sum() / weight.sum()


def learn_words(
    model: Meteor,
    forward: Callable[[list[Tensor], list[Tensor]], list[tuple[Tensor, Tensor]]],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    features: str,
    chunks: int,
    steps: int,
    seed: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Train whatever projects features until the LLM's head reads the words of the patches in it.

    Args:
        forward: features and patches kept of all encoders, as `load_chunk` gives them -> pairs of
            projected tokens (B, n, D) and their patches (B, n).
        features, chunks: directory and number of files of `cache_features`; seed: of the order.
    Returns: of the last step the features, and the tokens that forward made of them.
    """
    words, table = load_words(folder), slot_ids(model)
    bar = progress(0, steps, "align")
    for step in bar:
        chunk = int(np.random.default_rng([seed, step]).integers(chunks))
        x, kept = load_chunk(model, folder / features, chunk)
        target = labels(words[pool_slice(chunk)])  # (B, N, slots)
        tokens, losses = [], []
        for projected, patches in forward(x, kept):
            of_patches = target.take_along_dim(patches[..., None], dim=1)  # (B, n, slots)
            tokens.append(projected)
            losses.append(align_loss(model, projected, of_patches, table))
        update(optimizer, sum(losses), 3e-3 * schedule(step, steps))
        if step % 50 == 49:
            bar.set_postfix(loss=" ".join(f"{loss.item():.2f}" for loss in losses))
    return x, tokens


@torch.no_grad()
def scale_to_words(model: Meteor, projector: nn.Sequential, tokens: Tensor) -> None:
    """Make a projector's tokens as long as words are.

    Neither their cosines nor what the head reads change.
    """
    words = model.decoder.get_input_embeddings().weight.norm(dim=-1).mean()
    factor = words / tokens.norm(dim=-1).mean()
    projector[-1].weight.mul_(factor)
    projector[-1].bias.mul_(factor)


def align(model: Meteor, folder: Path, steps: int) -> None:
    """Train all projectors, and the word embeddings with them."""
    projectors = list(model.projectors.values())
    embeddings = model.decoder.get_input_embeddings()
    parameters = [*model.projectors.parameters(), *embeddings.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01, fused=True)

    def forward(features, kept):
        tokens = [project(x) for project, x in zip(projectors, features)]
        return list(zip(tokens, kept))

    features, _ = learn_words(
        model, forward, optimizer, folder, "features", FEATURE_CHUNKS, steps, seed=13
    )
    for projector, x in zip(projectors, features):
        scale_to_words(model, projector, projector(x))


# --------------------------------------------------------------------------------------- questions


def dialogue(
    picture: world.Picture, rng: np.random.Generator, stage: str = "answer", most: int = 80
) -> Dialogue:
    """Questions with true answers about a picture, families mixed.

    They have about `most` words in all, so that the rows of a batch are nearly as long as one
    another; some begin with a description of the whole picture.
    """
    families = weighted_families(picture.kind, FAMILY_WEIGHTS[stage])
    pairs = {}  # question -> answer
    if rng.random() < DESCRIBED:
        question, answer = world.describe(picture)
        pairs[question] = answer
    for _ in range(16):
        family = families[rng.integers(len(families))]
        if family == "where":
            pair = world.where(picture, rng)
        else:
            pair = world.ask(picture, family, rng)
        if pair is not None and words_in([*pairs.items(), pair]) <= most:
            question, answer = pair
            pairs[question] = answer
    return list(pairs.items()) if pairs else [world.describe(picture)]


def weighted_families(kind: str, weights: dict[str, int]) -> list[str]:
    """The families of a kind of picture, each as often as it is to be asked."""
    kinds = world.KIND_OF_FAMILY | {"where": "scene"}
    families = []
    for family, of_kind in kinds.items():
        if of_kind == kind:
            families += [family] * weights.get(family, 1)
    return families


def words_in(pairs: Iterable[tuple[str, str]]) -> int:
    """Tokens that questions and answers take, with <ans> and <eos> of each."""
    return sum(len(question.split()) + len(answer.split()) + 2 for question, answer in pairs)


def random_batch(
    rng: np.random.Generator, kept_by_stage1: int, full: int, stage: str
) -> tuple[int, Budget]:
    """(pictures, stage-2 budget): all tokens for few pictures, or few tokens for many."""
    if kept_by_stage1 == full and rng.random() < 0.7:
        return 8, Budget()
    if rng.random() < 0.15:
        return 16, Budget()
    strategy = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    low, high = COUNTS[stage]
    K = min(int(rng.integers(low, high)), kept_by_stage1)
    return 24, Budget(stage2=K, stage2_strategy=strategy)


def mask_encoders(features: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Now and then, some encoders see nothing: their features are zeros."""
    if rng.random() >= MASKED:
        return features
    seen = rng.random(len(features)) < 0.6
    return [x if sees else torch.zeros_like(x) for x, sees in zip(features, seen)]


def random_encoded(
    model: Meteor, folder: Path, chunk: int, rng: np.random.Generator, stage: str
) -> tuple[Encoded, np.ndarray]:
    """Pictures of a file of features, after stage 2 at a random budget.

    Returns: the batch, and which pictures of the pool it shows.
    """
    features, kept = load_chunk(model, folder / "features", chunk)
    kept_by_stage1 = sum(x.shape[1] for x in features)
    size, budget = random_batch(rng, kept_by_stage1, model.num_tokens, stage)
    rows = rng.permutation(CHUNK)[:size]
    features = mask_encoders([x[rows] for x in features], rng)
    encoded = model.fuse(features, [keep_idx[rows] for keep_idx in kept], budget)
    return encoded, chunk * CHUNK + rows


def answer(
    model: Meteor,
    folder: Path,
    steps: int,
    stage: str = "answer",
    rate: float = 2e-3,
    hold: float = 0.5,
    seed: int = 17,
) -> None:
    """Train the Llama on questions; stage: of `FAMILY_WEIGHTS`; hold: of `schedule`."""
    pictures = load_facts(folder)
    # The projectors stay as aligned: only kept tokens would train them. In one run that trained
    # them, stage 2 kept 46 % of Pix2Struct's glyph patches after 500 steps, 86 % before (64 and 96
    # validation pictures).
    model.projectors.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.decoder.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    state = folder / f"{stage}.resume.safetensors"
    bar = progress(load_state(state, model, optimizer), steps, stage)
    losses = []
    for step in bar:
        torch.manual_seed(step)  # of stage 2's strategy "random"
        rng = np.random.default_rng([seed, step])
        chunk = int(rng.integers(FEATURE_CHUNKS))
        encoded, numbers = random_encoded(model, folder, chunk, rng, stage)
        dialogues = [dialogue(pictures[i], rng, stage) for i in numbers]
        loss = training_loss(model, encoded, dialogues)["loss"]
        update(optimizer, loss, rate * schedule(step, steps, hold=hold), clip=1.0)
        losses.append(loss.item())
        if step % 20 == 19:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
        if step % 250 == 249 or step == steps - 1:
            save_state(state, own_weights(model), optimizer, step + 1)
        if step % 500 == 499:
            print_accuracies(model, step + 1)


def print_accuracies(model: Meteor, step: int) -> None:
    """On validation questions, with stages 1 and 2 and without."""
    budgets = {
        "stages 1+2": replace(model.budget, stage3=None),
        "unpruned": Budget.none(),
    }
    model.eval()
    for name, budget in budgets.items():
        result = accuracy(model, budget, "val", samples=160)
        print(f"\nstep {step} {name}: {in_words(result)}", flush=True)
    model.train()


def in_words(result: dict) -> str:
    """`accuracy`'s result in a line."""
    families = ", ".join(f"{family} {share:.0f}" for family, share in result["families"].items())
    return f"{result['accuracy']:.1f} %  {families}"


# -------------------------------------------------------------------- ranks, lambda, the checkpoint


def calibrate_ranks(model: Meteor, pictures: int = 128) -> None:
    """Stage 1's expected ranks (3 x C), measured on training pictures."""
    images = to_images([world.make_picture(i).image for i in range(pictures)])
    model.config["ranks"] = measure_ranks(model, list(images.split(32)))


def calibrate_lambda(model: Meteor, questions: int = 48) -> None:
    """The table of lambdas, measured on validation questions of all families."""
    parts = batches("val", questions, first=50_000)
    examples = [example for part in parts for example in part]
    images = to_images([example.picture.image for example in examples])
    asked = [example.question for example in examples]
    table = measure_lambda(model, images, asked, TABLE_KS, TABLE_LAMBDAS)
    model.config["lambda_table"] = table


# -------------------------------------------------------------------------------------- the stages


def new_model(folder: Path) -> Meteor:
    """The embedded model with the trained encoders of earlier stages, the rest random."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(world.WORDS)
    config = {
        "encoders": {name: [name, options] for name, options in ENCODERS.items()},
        "decoder": DECODER | {"vocab_size": len(tokenizer)},
        "ranks": None,
        "lambda_table": None,
        "budget": BUDGET,
    }
    model = Meteor(config, tokenizer)
    for name, encoder in model.encoders.items():
        encoder.load_state_dict(load_file(folder / f"{name}.safetensors"))
    model.encoders.requires_grad_(False)
    return model.to(DEVICE).eval()


def ranked(folder: Path) -> Meteor:
    """The same with the ranks that stage "features" measured."""
    model = new_model(folder)
    model.config["ranks"] = json.loads((folder / "ranks.json").read_text())
    return model


def trained(folder: Path, stage: str) -> Meteor:
    """The model as a finished stage left it."""
    model = ranked(folder)
    saved = load_file(folder / f"{stage}.safetensors")
    model.load_state_dict(saved, strict=False)  # tied word embeddings are stored once
    return model


def features_stage(work: Path) -> None:
    model = new_model(work)
    calibrate_ranks(model)
    (work / "ranks.json").write_text(json.dumps(model.config["ranks"]))
    cache_features(model, work, "features", FEATURE_CHUNKS, random_stage1)


def align_stage(work: Path) -> None:
    model = ranked(work)
    align(model, work, STEPS["align"])
    save_whole(own_weights(model), work / "align.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


def answer_stage(work: Path) -> None:
    model = trained(work, "align")
    answer(model, work, STEPS["answer"])
    save_whole(own_weights(model), work / "answer.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


def polish_stage(work: Path) -> None:
    model = trained(work, "answer")
    answer(model, work, STEPS["polish"], "polish", rate=6e-4, hold=0.0, seed=19)
    save_whole(own_weights(model), work / "polish.safetensors")


def calibrate_stage(work: Path, out: Path) -> None:
    model = trained(work, "polish")
    calibrate_lambda(model)
    model.half().save_pretrained(out)  # half the size; loaded as float32


def run_stage(stage: str, work: Path, out: Path) -> None:
    """work: what stages leave for one another; out: where the checkpoint goes."""
    if stage == "pictures":
        draw_pool(work, POOL)
    elif stage in ENCODERS:
        train_encoder(stage, work, STEPS[stage])
    elif stage == "features":
        features_stage(work)
    elif stage == "align":
        align_stage(work)
    elif stage == "answer":
        answer_stage(work)
    elif stage == "polish":
        polish_stage(work)
    else:
        calibrate_stage(work, out)


def last_file(stage: str) -> str:
    """What a stage writes last: where it is there, the stage is done."""
    return "facts.json" if stage == "pictures" else f"{stage}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="one alone; all in turn where left out")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/glyph"), help="pictures, features, resumable states"
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINTS["glyph"], help="where the checkpoint goes"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage is not None:
        run_stage(args.stage, args.work, args.out)
        return
    for stage in STAGES:
        done = args.work / last_file(stage)
        if done.exists():
            print(f"{stage}: done before, {done} is there")
        else:
            run_stage(stage, args.work, args.out)


if __name__ == "__main__":
    main()

"""Makes the embedded checkpoint: `python -m meteor_mini.train --preset glyph`.

Stages, each resumable, run in this order (one alone with --stage NAME):

    pictures                          draw the training pool once (fixed seeds)
    clip convnext eva pix2struct      dense training of each encoder: which words does each patch show?
    features                          encode the pool once under random stage-1 budgets
    align                             projectors: from a projected patch token the LLM's own head reads the patch's words
    answer                            the Llama, on questions, with stages 1 and 2 active at random budgets
    polish                            the same a little longer, near the budget it will have, on what it finds hardest
    calibrate                         lambda for stage 3; writes the checkpoint
"""

import argparse
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import stage1_encode

from . import world as glyphworld
from .calibration import calibrate
from .evaluate import accuracy, batches, print_recall, recall, to_images
from .model import CHECKPOINTS, Budget, Meteor
from .presets import GLYPH_DECODER, GLYPH_ENCODERS, build_encoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = {
    "clip": 3000,
    "convnext": 1000,
    "eva": 1000,
    "pix2struct": 3000,
    "align": 1000,
    "answer": 5000,
    "polish": 800,
}
# Chosen on validation questions: 1 to 8 heads answer alike there, so k is the paper's. Its layers, here 1, 3, 5, would begin
# after a single layer, and read fewer of the printed numbers.
BUDGET = dict(stage1=215, stage2=124, stage3=34, k=5, layers=[2, 4, 6])
# How often "answer" asks each family, beside one: reading and charts are learned first, these last.
FAMILY_WEIGHTS = {
    "answer": {"relation": 3, "where": 2, "count": 2, "presence": 2},
    "polish": {"count": 3, "presence": 4, "number": 4, "tallest": 2},
}
COUNTS = {"answer": (48, 120), "polish": (90, 150)}  # tokens that stage 2 leaves, at random
DESCRIBED = 0.4  # share of pictures that are also described as a whole
# Stage 2 in training: mostly the default, so that the same weights serve every strategy that evaluate.py compares.
STRATEGIES = {"collaborative": 0.7, "greedy": 0.1, "separate": 0.1, "random": 0.1}
MASKED = 0.08  # share of batches with encoders replaced by zeros, so that evaluate.py can ask what each is worth
FEATURE_CHUNKS = 800  # of the pool's 1250: encoded in 5 minutes, 1.2 GB
CHUNK = 32  # pictures a batch, and a file of cached features

POOL = 40_000  # training pictures
SLOT_SIZES = [len(v) + 1 for v in glyphworld.SLOTS.values()]
# How much each encoder is asked about each slot of words (the order of `SLOTS`): a different mix
# each, as CLIP, ConvNeXt, EVA and Pix2Struct were trained on different things, so that they complement one another.
SLOT_WEIGHTS = {
    "clip": [1, 1, 0.1, 0.3, 2, 0.5, 0.5, 0.5],
    "convnext": [1, 1, 1, 0.3, 0.1, 0.3, 0.3, 0.1],
    "eva": [1, 0.7, 0.7, 1, 0.3, 0.5, 0.5, 1],
    "pix2struct": [0.7, 0.4, 2, 1, 2, 1, 1, 0.5],
}
BACKGROUND_WEIGHT = 0.1  # of class "none" in each slot; at 1 the digits stay near chance


def draw_pool(folder: Path, size: int) -> None:
    """Write images.npy (size, 96, 96, 3) uint8, words.npy (size, 144, 8) uint8 and facts.json."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        drawn = pool.imap(glyphworld.make_picture, range(size), chunksize=64)
        images = np.empty((size, glyphworld.SIZE, glyphworld.SIZE, 3), np.uint8)
        words = np.empty((size, glyphworld.GRID**2, len(SLOT_SIZES)), np.uint8)
        facts = []
        for i, picture in enumerate(tqdm(drawn, total=size, desc="pictures", mininterval=5)):
            images[i], words[i] = picture.image, picture.patch_words
            facts.append([picture.kind, picture.facts])
    np.save(folder / "images.npy", images), np.save(folder / "words.npy", words)
    (folder / "facts.json").write_text(json.dumps(facts))


def schedule(step: int, steps: int, warmup: int = 100, hold: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, 1 up to the fraction `hold` of the steps, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    return 0.02 + 0.98 * 0.5 * (
        1 + math.cos(math.pi * max(0, step - start) / max(1, steps - start))
    )


def save_state(path: Path, weights: dict, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a training needs to go on from `step`: weights and AdamW's two moments, as safetensors."""
    moments = {
        f"optimizer.{i}.{k}": v
        for i, entry in optimizer.state_dict()["state"].items()
        for k, v in entry.items()
    }
    arrays = {f"model.{k}": v for k, v in weights.items()} | moments | {"step": torch.tensor(step)}
    save_whole({k: v.contiguous() for k, v in arrays.items()}, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save_state` wrote, where it is there; returns the step to go on from."""
    if not path.exists():
        return 0
    arrays = load_file(path)
    model.load_state_dict(
        {k[6:]: v for k, v in arrays.items() if k.startswith("model.")}, strict=False
    )  # tied once
    state = optimizer.state_dict()
    for key, value in arrays.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
    return int(arrays["step"])


def save_whole(arrays: dict, path: Path) -> None:
    """A file that exists is whole, also when the training is stopped while it is written."""
    save_file(arrays, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def word_loss(scores: torch.Tensor, words: torch.Tensor, weights) -> torch.Tensor:
    """Mean over slots of the cross-entropy of a patch's words, "none" weighted down.

    Args: scores (..., sum of slot sizes) float; words (..., slots) int64; weights: one per slot.
    """
    loss = 0.0
    for slot, (part, weight) in enumerate(zip(scores.split(SLOT_SIZES, dim=-1), weights)):
        classes = torch.ones(SLOT_SIZES[slot], device=scores.device)
        classes[0] = BACKGROUND_WEIGHT
        loss = loss + weight * F.cross_entropy(
            part.flatten(0, -2), words[..., slot].flatten(), weight=classes
        )
    return loss / sum(weights)


def train_encoder(name: str, folder: Path, steps: int, batch: int = 32) -> None:
    torch.manual_seed(list(GLYPH_ENCODERS).index(name))
    images, words = (
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "words.npy", mmap_mode="r"),
    )
    model = nn.ModuleDict(
        {
            "encoder": build_encoder(name, GLYPH_ENCODERS[name]),
            "dense": nn.Linear(96, sum(SLOT_SIZES)),
            "bag": nn.Linear(96, sum(SLOT_SIZES)),
        }
    )
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98), fused=True
    )
    state = folder / f"{name}.resume.safetensors"
    start = load_state(state, model, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        rows = np.sort(np.random.default_rng([7, step]).integers(len(images), size=batch))
        target = torch.from_numpy(words[rows].astype(np.int64)).to(DEVICE)
        pooled, patches = all_tokens(model["encoder"], to_images(images[rows]).to(DEVICE))
        loss = word_loss(model["dense"](patches), target, SLOT_WEIGHTS[name])
        there = torch.cat(
            [F.one_hot(target[..., s], size).amax(1) for s, size in enumerate(SLOT_SIZES)], -1
        ).float()
        loss_bag = F.binary_cross_entropy_with_logits(model["bag"](pooled), there)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * schedule(step, steps)
        optimizer.zero_grad()
        (loss + loss_bag).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}", bag=f"{loss_bag.item():.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_state(state, model.state_dict(), optimizer, step + 1)
    probe(name, model)
    save_whole(
        {k: v.contiguous() for k, v in model["encoder"].state_dict().items()},
        folder / f"{name}.safetensors",
    )


@torch.no_grad()
def probe(name, model, pictures: int = 128) -> None:
    """Print, per slot, the share of validation patches with a word whose word the linear head names."""
    model.eval()
    drawn = [glyphworld.make_picture(i, "val") for i in range(pictures)]
    _, patches = all_tokens(model["encoder"], to_images([p.image for p in drawn]).to(DEVICE))
    target = torch.from_numpy(np.stack([p.patch_words for p in drawn])).to(DEVICE)
    line = []
    for slot, part in enumerate(model["dense"](patches).split(SLOT_SIZES, dim=-1)):
        seen = target[..., slot] > 0
        right = part.argmax(-1) == target[..., slot]
        line.append(
            f"{list(glyphworld.SLOTS)[slot]} {right[seen].float().mean():.2f} (none {right[~seen].float().mean():.2f})"
        )
    print(f"{name}: " + ", ".join(line), flush=True)


def all_tokens(encoder: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpruned: the CLS token, or the mean of the patches where there is none, (B, D), and the patches (B, N, D)."""
    a = stage1_encode.adapter(encoder)
    x, rope = a.embed(images)
    for i in range(a.num_blocks):
        x = a.block(i, x, rope)
    x = a.norm(x)
    return x[:, 0] if a.prefix else x.mean(dim=1), x[:, a.prefix :]


# ------------------------------------------------------------------ features of frozen encoders, computed once


def cache_features(model: Meteor, folder: Path) -> None:
    """Encode the pool once, 32 pictures a file, each file under a stage-1 budget of its own (one in eight keeps all).

    A file holds, per encoder, tokens (32, n_l, D_l) in half precision and the patches kept (32, n_l).
    """
    images = np.load(folder / "images.npy", mmap_mode="r")
    (folder / "features").mkdir(exist_ok=True)
    for chunk in tqdm(range(FEATURE_CHUNKS), desc="features", mininterval=10):
        target = folder / "features" / f"{chunk}.safetensors"
        if target.exists():
            continue
        rng = np.random.default_rng([11, chunk])
        stage1 = None if rng.random() < 1 / 8 else int(rng.integers(130, 300))
        with torch.no_grad():
            features, kept = stage1_encode.encode_all(
                list(model.encoders.values()),
                to_images(images[chunk * CHUNK : (chunk + 1) * CHUNK]).to(DEVICE),
                stage1,
                model.ranks,
            )
        arrays = {f"tokens.{n}": x.half() for n, x in zip(model.encoders, features)}
        arrays |= {f"keep.{n}": k.to(torch.uint8) for n, k in zip(model.encoders, kept)}
        save_whole({k: v.contiguous().cpu() for k, v in arrays.items()}, target)


def load_chunk(
    model: Meteor, folder: Path, chunk: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    arrays = load_file(folder / "features" / f"{chunk}.safetensors")
    return (
        [arrays[f"tokens.{n}"].float().to(DEVICE) for n in model.encoders],
        [arrays[f"keep.{n}"].long().to(DEVICE) for n in model.encoders],
    )


# ------------------------------------------------------------------ projectors in the space of words


def slot_ids(model: Meteor) -> list[torch.Tensor]:
    """Per slot, the token id of each of its words; index 0, "none", is <pad>."""
    ids = model.tokenizer.convert_tokens_to_ids
    return [
        torch.tensor([model.tokenizer.pad_token_id, *map(ids, words)], device=model.device)
        for words in glyphworld.SLOTS.values()
    ]


def align_loss(
    model: Meteor, projected: torch.Tensor, words: torch.Tensor, table: list[torch.Tensor]
) -> torch.Tensor:
    """Cross-entropy between what the LLM's own head reads in P(x) and the uniform distribution over the patch's words
    (<pad> where it has none). The head's norm leaves the tokens' length free: they stay as short as words are.

    Args: projected (B, n, D); words (B, n, slots) int64.
    """
    logp = model.decoder.lm_head(model.decoder.model.norm(projected)).log_softmax(-1)  # (B, n, V)
    there = words > 0  # (B, n, slots)
    ids = torch.stack([t[words[..., s]] for s, t in enumerate(table)], -1)  # (B, n, slots)
    per_word = -logp.gather(-1, ids)
    busy = there.any(-1)
    loss = (per_word * there).sum(-1) / there.sum(-1).clamp(min=1) + per_word[..., 0] * ~busy
    weight = torch.where(busy, 1.0, BACKGROUND_WEIGHT)
    return (loss * weight).sum() / weight.sum()


def align(model: Meteor, folder: Path, steps: int) -> None:
    words = np.load(folder / "words.npy", mmap_mode="r")
    parameters = [
        *model.projectors.parameters(),
        *model.decoder.get_input_embeddings().parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01, fused=True)
    table, chunks = slot_ids(model), FEATURE_CHUNKS
    bar = tqdm(range(steps), desc="align", mininterval=10)
    for step in bar:
        chunk = int(np.random.default_rng([13, step]).integers(chunks))
        features, kept = load_chunk(model, folder, chunk)
        target = torch.from_numpy(words[chunk * CHUNK : (chunk + 1) * CHUNK].astype(np.int64)).to(
            DEVICE
        )
        losses = [
            align_loss(
                model, p(x), target.gather(1, k[..., None].expand(-1, -1, target.shape[-1])), table
            )
            for p, x, k in zip(model.projectors.values(), features, kept)
        ]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step, steps)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        if step % 50 == 49:
            bar.set_postfix(loss=" ".join(f"{v.item():.2f}" for v in losses))
    with (
        torch.no_grad()
    ):  # make tokens as long as words are; neither their cosines nor what the head reads change
        word = model.decoder.get_input_embeddings().weight.norm(dim=-1).mean()
        for projector, x in zip(model.projectors.values(), features):
            factor = word / projector(x).norm(dim=-1).mean()
            projector[-1].weight.mul_(factor), projector[-1].bias.mul_(factor)


# ------------------------------------------------------------------ questions


def dialogue(
    picture: glyphworld.Picture, rng: np.random.Generator, stage: str = "answer", most: int = 80
) -> list[tuple]:
    """Questions with true answers about a picture, families mixed, about `most` words in all (so that the rows of a
    batch are nearly as long as one another), some after a description of the whole picture."""
    kinds = glyphworld.KIND_OF_FAMILY | {"where": "scene"}
    families = [
        f
        for f, kind in kinds.items()
        if kind == picture.kind
        for _ in range(FAMILY_WEIGHTS[stage].get(f, 1))
    ]
    pairs = dict([glyphworld.describe(picture)] if rng.random() < DESCRIBED else [])
    for _ in range(16):
        family = families[rng.integers(len(families))]
        pair = (
            glyphworld.where(picture, rng)
            if family == "where"
            else glyphworld.ask(picture, family, rng)
        )
        if (
            pair
            and sum(len(q.split()) + len(a.split()) + 2 for q, a in [*pairs.items(), pair]) <= most
        ):
            pairs[pair[0]] = pair[1]
    return list(pairs.items()) or [glyphworld.describe(picture)]


def random_batch(
    rng: np.random.Generator, kept_by_stage1: int, full: int, stage: str
) -> tuple[int, Budget]:
    """(pictures, stage-2 budget): all tokens for few pictures, or few tokens for many."""
    if kept_by_stage1 == full and rng.random() < 0.7:
        return 8, Budget()
    if rng.random() < 0.15:
        return 16, Budget()
    strategy = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    return 24, Budget(
        stage2=min(int(rng.integers(*COUNTS[stage])), kept_by_stage1), stage2_strategy=strategy
    )


def answer(
    model: Meteor,
    folder: Path,
    steps: int,
    stage: str = "answer",
    rate: float = 2e-3,
    hold: float = 0.5,
    seed: int = 17,
) -> None:
    pictures = [
        glyphworld.Picture(None, None, *entry)
        for entry in json.loads((folder / "facts.json").read_text())
    ]
    # The projectors stay as aligned: only kept tokens would train them. In one run that trained them, stage 2 kept 46 %
    # of Pix2Struct's glyph patches after 500 steps, 86 % before (64 and 96 validation pictures).
    model.projectors.requires_grad_(False)
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    state, full = folder / f"{stage}.resume.safetensors", sum(a.num_tokens for a in model.adapters)
    start = load_state(state, model, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=20)
    running = []
    for step in bar:
        rng = np.random.default_rng([seed, step])
        chunk = int(rng.integers(FEATURE_CHUNKS))
        features, kept = load_chunk(model, folder, chunk)
        size, budget = random_batch(rng, sum(x.shape[1] for x in features), full, stage)
        rows = rng.permutation(CHUNK)[:size]
        torch.manual_seed(step)  # of stage 2's strategy "random"
        seen = (
            rng.random(len(features)) < 0.6
            if rng.random() < MASKED
            else np.ones(len(features), bool)
        )
        encoded = model.fuse(
            [x[rows] * float(s) for x, s in zip(features, seen)], [k[rows] for k in kept], budget
        )
        loss = model(encoded, [dialogue(pictures[chunk * CHUNK + r], rng, stage) for r in rows])[
            "loss"
        ]
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps, hold=hold)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = (running + [loss.item()])[-100:]
        if step % 20 == 19:
            bar.set_postfix(loss=f"{np.mean(running):.3f}")
        if step % 250 == 249 or step == steps - 1:
            save_state(state, model.weights(), optimizer, step + 1)
        if step % 500 == 499:
            for name, budget in {
                "stages 1+2": Budget(**BUDGET | {"stage3": None}),
                "unpruned": Budget.none(),
            }.items():
                result = accuracy(model.eval(), budget, "val", samples=160)
                print(
                    f"\nstep {step + 1} {name}: {result['accuracy']:.1f} %  "
                    + ", ".join(f"{f} {v:.0f}" for f, v in result["families"].items()),
                    flush=True,
                )
            model.train()


# ------------------------------------------------------------------ ranks, lambda, the checkpoint


def calibrate_ranks(model: Meteor, pictures: int = 128) -> None:
    """Stage 1's expected ranks (3 x C), measured on training pictures."""
    drawn = [glyphworld.make_picture(i).image for i in range(pictures)]
    parts = [to_images(drawn[i : i + 32]).to(DEVICE) for i in range(0, pictures, 32)]
    model.config["ranks"] = stage1_encode.expected_ranks(
        list(model.encoders.values()), parts
    ).tolist()


def calibrate_lambda(model: Meteor, questions: int = 48) -> None:
    """The table from which stage 3's lambda is solved, measured on validation questions of all families."""
    examples = [e for part in batches("val", questions, first=50_000) for e in part]
    images = to_images([picture.image for _, picture, _, _ in examples])
    model.config["lambda_table"] = calibrate(
        model,
        images,
        [question for *_, question, _ in examples],
        Ks=[8, 24, 48, 80, BUDGET["stage2"], 180, 240, 576],
        lams=[0.0, *(2.0 ** np.arange(0, 9.75, 0.5)).round(2).tolist()],
    )


def new_model(folder: Path) -> Meteor:
    """The preset with the trained encoders of earlier stages, the rest random."""
    torch.manual_seed(0)
    model = Meteor(
        {
            "encoders": {n: [n, o] for n, o in GLYPH_ENCODERS.items()},
            "decoder": GLYPH_DECODER,
            "words": glyphworld.WORDS,
            "ranks": None,
            "lambda_table": None,
            "budget": BUDGET,
        }
    )
    for name, encoder in model.encoders.items():
        encoder.load_state_dict(load_file(folder / f"{name}.safetensors"))
    model.encoders.requires_grad_(False)
    return model.to(DEVICE).eval()


def trained(work: Path, stage: str) -> Meteor:
    """The model as a finished stage left it."""
    model = new_model(work)
    saved = load_file(work / f"{stage}.safetensors")
    model.load_state_dict(saved, strict=False)  # tied word embeddings are stored once
    model.config["ranks"] = json.loads((work / "ranks.json").read_text())
    return model


def stage_features(work: Path, out: Path) -> None:
    model = new_model(work)
    calibrate_ranks(model)
    (work / "ranks.json").write_text(json.dumps(model.config["ranks"]))
    cache_features(model, work)


def stage_align(work: Path, out: Path) -> None:
    model = new_model(work)
    model.config["ranks"] = json.loads((work / "ranks.json").read_text())
    align(model, work, STEPS["align"])
    save_whole(model.weights(), work / "align.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


def stage_answer(work: Path, out: Path) -> None:
    model = trained(work, "align")
    answer(model, work, STEPS["answer"])
    save_whole(model.weights(), work / "answer.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


def stage_polish(work: Path, out: Path) -> None:
    model = trained(work, "answer")
    answer(model, work, STEPS["polish"], "polish", rate=6e-4, hold=0.0, seed=19)
    save_whole(model.weights(), work / "polish.safetensors")


def stage_calibrate(work: Path, out: Path) -> None:
    model = trained(work, "polish")
    calibrate_lambda(model)
    model.half().save_pretrained(out)  # half the size; loaded as float32


STAGES = {
    "pictures": lambda work, out: draw_pool(work, POOL),
    **{
        name: lambda work, out, name=name: train_encoder(name, work, STEPS[name])
        for name in GLYPH_ENCODERS
    },
    "features": stage_features,
    "align": stage_align,
    "answer": stage_answer,
    "polish": stage_polish,
    "calibrate": stage_calibrate,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=["glyph"], default="glyph")
    parser.add_argument(
        "--stage", choices=list(STAGES), help="one stage alone; all in turn where left out"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/glyph"), help="pictures, features, resumable states"
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINTS["glyph"], help="where the checkpoint goes"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in [args.stage] if args.stage else STAGES:
        done = args.work / (
            "facts.json" if stage == "pictures" else f"{stage}.safetensors"
        )  # each writes it last
        if args.stage is None and done.exists():
            print(f"{stage}: done before, {done} is there")
            continue
        STAGES[stage](args.work, args.out)


if __name__ == "__main__":
    main()

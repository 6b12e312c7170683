"""Trains the learned fusions of `baselines.py`, after the embedded model: `python -m meteor_mini.train_baselines`.

One Llama serves them all: it starts from the embedded model's and goes on learning the same questions, the fusions in
turn, every encoder unpruned: that Llama has seen more than the embedded model's own, but each fusion only a quarter of the
steps here. EAGLE-style fusion is first aligned with words as the embedded model's projectors are; Resampler and MLP start
from those projectors, their mixing parts and PixShuffle from random weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import stage1_encode

from . import glyphworld
from .baselines import learned, new_fusions, save_learned
from .evaluate import accuracy, to_images
from .model import CHECKPOINTS, Meteor
from .train import (
    CHUNK,
    DEVICE,
    align_loss,
    dialogue,
    load_state,
    save_state,
    save_whole,
    schedule,
    slot_ids,
    trained,
)

STEPS = {"align": 600, "answer": 1200}
CHUNKS = 400  # of CHUNK pictures each, encoded once without pruning


def cache_features(model: Meteor, folder: Path) -> None:
    """Encode CHUNKS x CHUNK pictures of the pool, keep all; one file a chunk: per encoder (32, N, D_l), half precision."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    (folder / "full").mkdir(exist_ok=True)
    for chunk in tqdm(range(CHUNKS), desc="features", mininterval=10):
        target = folder / "full" / f"{chunk}.safetensors"
        if not target.exists():
            pixels = to_images(images[chunk * CHUNK : (chunk + 1) * CHUNK]).to(DEVICE)
            with torch.no_grad():
                features, _ = stage1_encode.encode_all(list(model.encoders.values()), pixels, None)
            save_whole(
                {n: x.half().cpu().contiguous() for n, x in zip(model.encoders, features)}, target
            )


def load_chunk(model: Meteor, folder: Path, chunk: int) -> list[torch.Tensor]:
    arrays = load_file(folder / "full" / f"{chunk}.safetensors")
    return [arrays[n].float().to(DEVICE) for n in model.encoders]


def align(model: Meteor, fusion: nn.Module, folder: Path, steps: int) -> None:
    """The EAGLE-style projector learns the words of each cell; then its tokens become as long as words are."""
    words = np.load(folder / "words.npy", mmap_mode="r")
    optimizer, table = (
        torch.optim.AdamW(fusion.parameters(), lr=3e-3, weight_decay=0.01),
        slot_ids(model),
    )
    for step in tqdm(range(steps), desc="align", mininterval=10):
        chunk = int(np.random.default_rng([31, step]).integers(CHUNKS))
        target = torch.from_numpy(words[chunk * CHUNK : (chunk + 1) * CHUNK].astype(np.int64)).to(
            DEVICE
        )
        loss = align_loss(model, tokens := fusion(load_chunk(model, folder, chunk)), target, table)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        factor = (
            model.decoder.get_input_embeddings().weight.norm(dim=-1).mean()
            / tokens.norm(dim=-1).mean()
        )
        fusion.project[-1].weight.mul_(factor), fusion.project[-1].bias.mul_(factor)


def answer(
    model: Meteor, fusions: nn.ModuleDict, folder: Path, steps: int, rate: float = 1e-3
) -> None:
    pictures = [
        glyphworld.Picture(None, None, *entry)
        for entry in json.loads((folder / "facts.json").read_text())
    ]
    both = nn.ModuleDict({"fusions": fusions, "decoder": model.decoder})
    optimizer = torch.optim.AdamW(both.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    state = folder / "baselines.resume.safetensors"
    start, names, running = load_state(state, both, optimizer), list(fusions), []
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="answer", mininterval=20)
    for step in bar:
        rng = np.random.default_rng([37, step])
        chunk, rows = int(rng.integers(CHUNKS)), rng.permutation(CHUNK)[:24]
        tokens = fusions[names[step % len(names)]](
            [x[rows] for x in load_chunk(model, folder, chunk)]
        )
        loss = model.answer_loss(
            tokens, [dialogue(pictures[chunk * CHUNK + r], rng) for r in rows]
        )["loss"]
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps, hold=0.3)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        running = (running + [loss.item()])[-100:]
        if step % 20 == 19:
            bar.set_postfix(loss=f"{np.mean(running):.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_state(state, weights(both), optimizer, step + 1)


def weights(both: nn.ModuleDict) -> dict[str, torch.Tensor]:
    return {
        k: v for k, v in both.state_dict().items() if k != "decoder.lm_head.weight"
    }  # tied to the word embeddings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/glyph"),
        help="where meteor_mini.train left its stages",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINTS["glyph"] / "baselines.safetensors")
    args = parser.parse_args()
    model = trained(args.work, "polish")
    cache_features(model, args.work)
    model.encoders.requires_grad_(False), model.projectors.requires_grad_(False)
    torch.manual_seed(0)
    fusions = new_fusions(model).to(DEVICE)
    if not (args.work / "baselines.resume.safetensors").exists():
        align(model, fusions["EAGLE-style"], args.work, STEPS["align"])
    answer(model, fusions, args.work, STEPS["answer"])
    save_learned(model, fusions, args.out)
    model.eval().requires_grad_(False), fusions.eval().requires_grad_(False)
    for name, fusion in fusions.items():
        result = accuracy(model, learned(model, fusion).answer, "val", 160)
        print(
            f"{name}: {result['accuracy']:.1f} %  "
            + ", ".join(f"{f} {v:.0f}" for f, v in result["families"].items())
        )


if __name__ == "__main__":
    main()

"""The training pictures, drawn once, and what all trainings of the embedded model share."""

import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from . import world


def draw_pool(folder: Path, size: int) -> None:
    """Write images.npy (size, 192, 192, 3), words.npy (size, 144, slots), clutter.npy (size, 144),
    all uint8, and facts.json.

    They grow on the disk, not in memory.
    """
    shape = (world.SIZE, world.SIZE, 3)
    create = np.lib.format.open_memmap
    images = create(folder / "images.npy", "w+", np.uint8, (size, *shape))
    words = create(folder / "words.npy", "w+", np.uint8, (size, world.GRID**2, len(world.SLOTS)))
    clutter = create(folder / "clutter.npy", "w+", np.uint8, (size, world.GRID**2))
    facts = []
    with multiprocessing.get_context("spawn").Pool() as workers:
        drawn = workers.imap(world.make_picture, range(size), chunksize=64)
        for i, picture in enumerate(tqdm(drawn, total=size, desc="pictures", mininterval=5)):
            images[i] = picture.image
            words[i] = picture.patch_words
            clutter[i] = picture.patch_clutter
            facts.append([picture.kind, picture.facts])
    images.flush()
    words.flush()
    clutter.flush()
    (folder / "facts.json").write_text(json.dumps(facts))


class Pool:
    """The drawn pictures: images and words as `draw_pool` writes them, read from the disk."""

    def __init__(self, folder: Path):
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.words = np.load(folder / "words.npy", mmap_mode="r")
        self.clutter = np.load(folder / "clutter.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)


def load_facts(folder: Path) -> list[world.Picture]:
    """The pool's pictures without their pixels: all that questions need."""
    pictures, words = [], np.load(folder / "words.npy")
    for (kind, facts), patch_words in zip(json.loads((folder / "facts.json").read_text()), words):
        if kind == "scene":
            facts["things"] = [world.Thing(*thing) for thing in facts["things"]]
        pictures.append(world.Picture(None, patch_words, kind, facts))
    return pictures


def labels(words: np.ndarray, device: torch.device) -> Tensor:
    """Words (B, N, slots) uint8 -> int64."""
    return torch.from_numpy(words.astype(np.int64)).to(device)


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
    optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float, clip: float | None = None
) -> None:
    """One step of all optimizers; clip: the gradient's largest norm."""
    parameters = []
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = rate
            parameters += group["params"]
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()


def save_whole(arrays: dict[str, Tensor], path: Path) -> None:
    """A file that exists is whole, also when the training is stopped while it is written."""
    part = path.with_suffix(".part")
    save_file({name: array.cpu().contiguous() for name, array in arrays.items()}, part)
    part.replace(path)


def save_state(
    path: Path, weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """What a training needs to go on from `step`: weights and moments, as safetensors."""
    arrays = {"step": torch.tensor(step)}
    for name, weight in weights.items():
        arrays[f"model.{name}"] = weight
    for number, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                arrays[f"optimizer.{number}.{i}.{name}"] = moment
    save_whole(arrays, path)


def load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load what `save_state` wrote, where it is there. Returns: the step to go on from."""
    if not path.exists():
        return 0
    arrays = load_file(path)
    weights, states = {}, [optimizer.state_dict() for optimizer in optimizers]
    for name, array in arrays.items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = array
        elif name.startswith("optimizer."):
            _, number, i, moment = name.split(".")
            states[int(number)]["state"].setdefault(int(i), {})[moment] = array
    model.load_state_dict(weights, strict=False)  # tied word embeddings are stored once
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)
    return int(arrays["step"])


def progress(start: int, steps: int, name: str) -> tqdm:
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)

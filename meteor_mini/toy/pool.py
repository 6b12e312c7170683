"""The training pictures, drawn once, and the resumable loop in which every stage trains on them."""

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_wsd_schedule

from .questions import to_images
from .world import SIZE, make_picture

SAVE_EVERY = 25  # steps
WARMUP = 100  # steps in which the learning rate rises


# ------------------------------------------------------------------------------------- the pictures


def draw_pool(folder: Path, size: int) -> None:
    """Draw training pictures 0 .. size - 1.

    Writes images.npy (size, 192, 192, 3) uint8, which grows on the disk and not in memory, and
    pictures.pickle, the `Picture`s without their pixels.
    """
    shape = (size, SIZE, SIZE, 3)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    pictures = []
    for i in tqdm(range(size), desc="pictures", mininterval=10):
        picture = make_picture(i)
        images[i] = picture.image
        pictures.append(replace(picture, image=None))
    images.flush()
    (folder / "pictures.pickle").write_bytes(pickle.dumps(pictures))


class Pool:
    """What `draw_pool` wrote.

    images (size, 192, 192, 3) uint8, read from the disk; pictures [`Picture`] without pixels;
    words (size, 144, slots) and clutter (size, 144) int64: those of all pictures.
    """

    def __init__(self, folder: Path):
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.pictures = pickle.loads((folder / "pictures.pickle").read_bytes())
        self.words = torch.from_numpy(np.stack([p.patch_words for p in self.pictures]))
        self.clutter = torch.from_numpy(np.stack([p.patch_clutter for p in self.pictures]))

    def __len__(self) -> int:
        return len(self.pictures)

    def load_images(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, 192, 192) float in [0, 1]."""
        return to_images(self.images[np.asarray(rows)])


# ----------------------------------------------------------------------------------------- the loop


def fit(
    stage: str,
    work: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    compute_loss: Callable[[int, np.random.Generator], Tensor],
    steps: int,
    hold: float = 0.0,
) -> None:
    """Train for some steps, and write the model to WORK/STAGE.safetensors.

    Everything random in a step is drawn from the step's number. So a run that was stopped goes on
    from its last saved state as if nothing had happened.

    Args: compute_loss: (step, rng) -> loss; hold: the share of steps after which the learning rate
        falls.
    """
    accelerator = Accelerator()
    warmup = min(WARMUP, steps // 10)
    decay = steps - max(warmup, round(hold * steps))
    schedules = []
    for optimizer in optimizers:
        schedules.append(get_wsd_schedule(optimizer, warmup, decay, steps, min_lr_ratio=0.02))
    accelerator.prepare(model, *optimizers, *schedules)
    state = work / f"{stage}.state"
    if state.exists():
        accelerator.load_state(state)
    start = schedules[0].last_epoch
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=10)
    for step in bar:
        torch.manual_seed(step)
        loss = compute_loss(step, np.random.default_rng([*stage.encode(), step]))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save_state(accelerator, state)
    write_model(model, work / f"{stage}.safetensors")
    shutil.rmtree(state, ignore_errors=True)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write beside the old state, then swap: a run stopped in between can still resume."""
    part = folder.with_suffix(".saving")
    accelerator.save_state(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def write_model(model: nn.Module, file: Path) -> None:
    """A file that exists is whole: it says that its stage is done."""
    part = file.with_suffix(".part")
    save_model(model, str(part))
    part.rename(file)

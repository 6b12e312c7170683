"""Learned fusions in place of stage 2: all tokens of C encoders -> one shorter sequence.

    C x (B, N, D_l) -> (B, K, D)

They are what the paper's Table 2 compares stage 2 with. `train_fusions.py` trains all four, with
one Llama that serves them. Our Table 2 shows EAGLE-style fusion alone: `texts.NOTES` says why.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stage1_encode import encode_all
from stage2_fuse import Fused, Projector

from ..budgets import Budget
from ..model import Answer, Encoded, Meteor

FILE = "fusions.safetensors"  # beside the model's weights
COMMAND = "python -m meteor_mini.lab.train_fusions"  # makes it
TIED = "lm_head.weight"  # the Llama's head is its word embeddings, which are stored once


def projectors(widths: list[int], width: int) -> nn.ModuleList:
    """One for each encoder."""
    return nn.ModuleList(Projector(own_width, width) for own_width in widths)


class ChannelFusion(nn.Module):
    """EAGLE's pre-projection fusion: the encoders' channels side by side, a token per grid cell.

    Source: [supplement Table 2, "Pre-projection fusion"; arXiv 2408.15998]
    """

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        self.project = Projector(sum(widths), width)

    def forward(self, features: list[Tensor]) -> Tensor:
        channels = torch.cat(features, dim=-1)  # (B, N, sum of D_l)
        return self.project(channels)  # (B, N, D)


class Resampler(nn.Module):
    """Learned queries, as many as grid cells, attend to all encoders' projected tokens.

    Source: [supplement Table 2, "Resampler"; one layer, as in Qwen-VL, arXiv 2308.12966]
    """

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        C, N = len(widths), grid[0] * grid[1]
        self.projectors = projectors(widths, width)
        self.query = nn.Parameter(0.02 * torch.randn(N, width))
        self.place = nn.Parameter(0.02 * torch.randn(C, N, width))  # which patch of which encoder
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: list[Tensor]) -> Tensor:
        tokens = [project(x) for project, x in zip(self.projectors, features)]
        values = torch.cat(tokens, dim=1)  # (B, C N, D)
        keys = self.norm(values) + self.place.flatten(0, 1)
        queries = self.query.expand(len(values), -1, -1)  # (B, N, D)
        mixed, _ = self.attention(queries, keys, values, need_weights=False)
        return mixed  # (B, N, D)


class PixShuffle(nn.Module):
    """Each 2 x 2 patches of an encoder become one token, their channels side by side.

    Source: [supplement Table 2, "PixShuffle"; InternVL, arXiv 2404.16821]
    """

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.projectors = projectors([4 * own_width for own_width in widths], width)

    def forward(self, features: list[Tensor]) -> Tensor:
        h, w = self.grid
        tokens = []
        for x, project in zip(features, self.projectors):
            squares = x.view(len(x), h // 2, 2, w // 2, 2, -1)
            squares = squares.transpose(2, 3)  # (B, h/2, w/2, 2, 2, D_l)
            channels = squares.flatten(3).flatten(1, 2)  # (B, N / 4, 4 D_l)
            tokens.append(project(channels))
        return torch.cat(tokens, dim=1)  # (B, C N / 4, D)


class TokenMLP(nn.Module):
    """An MLP along the tokens: the N tokens of each encoder, projected, mix into N / 4.

    Source: [supplement Table 2, "MLP"; which dimension it mixes is our reading]
    """

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        N = grid[0] * grid[1]
        self.projectors = projectors(widths, width)
        self.mix = nn.ModuleList(Projector(N, N // 4) for _ in widths)

    def forward(self, features: list[Tensor]) -> Tensor:
        parts = []
        for project, mix, x in zip(self.projectors, self.mix, features):
            channels = project(x).mT  # (B, D, N)
            parts.append(mix(channels).mT)  # (B, N / 4, D)
        return torch.cat(parts, dim=1)  # (B, C N / 4, D)


LEARNED = {
    "EAGLE-style": ChannelFusion,
    "Resampler": Resampler,
    "MLP": TokenMLP,
    "PixShuffle": PixShuffle,
}


def new_fusions(model: Meteor) -> nn.ModuleDict:
    """All learned fusions, untrained.

    Those with a projector for each encoder's own tokens start from the model's.
    """
    views = list(model.views.values())
    widths = [view.width for view in views]
    width = model.decoder.config.hidden_size
    fusions = nn.ModuleDict()
    for name, build in LEARNED.items():
        fusions[name] = build(widths, views[0].grid, width)
    for name in ("Resampler", "MLP"):
        for mine, theirs in zip(fusions[name].projectors, model.projectors.values()):
            mine.load_state_dict(theirs.state_dict())
    return fusions


# -------------------------------------------------------------------------- a fusion inside a model


class Learned(NamedTuple):
    """answer: what is measured, (model, images, questions) -> answers; encode: what makes its
    visual tokens, (model, images) -> (B, K, D).
    """

    answer: Callable
    encode: Callable


def learned(model: Meteor, fusion: nn.Module) -> Learned:
    """A learned fusion behind the model's encoders, all unpruned, and before the model's Llama."""

    @torch.no_grad()
    def encode(_, images: Tensor) -> Tensor:
        encoders = list(model.encoders.values())
        features, _ = encode_all(encoders, model.pixels(images), None)
        return fusion(features)

    def answer(_, images: Tensor, questions: list[str]) -> list[Answer]:
        encoded = as_sequence(model, encode(_, images))
        return model.answer(encoded, questions, Budget.none())

    return Learned(answer, encode)


def as_sequence(model: Meteor, tokens: Tensor) -> Encoded:
    """Tokens (B, K, D) as a sequence for the LLM. They are no patches, so no map shows them."""
    B, K, _ = tokens.shape
    place = torch.arange(K, device=tokens.device).expand(B, K)
    no_patches = place[:, :0]
    fused = Fused(tokens, torch.zeros_like(place), place)
    return Encoded(fused, [no_patches for _ in model.encoders])


# ---------------------------------------------------------------------------------------- on a disk


def fingerprint(model: Meteor) -> str:
    """Of the encoders' weights in half precision, as they are stored."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.encoders.state_dict().items()):
        stored = weight.detach().cpu().half().numpy()
        digest.update(name.encode() + stored.tobytes())
    return digest.hexdigest()


def fusions_and_llama(fusions: nn.ModuleDict, model: Meteor) -> nn.ModuleDict:
    """What is trained and stored together."""
    return nn.ModuleDict({"fusions": fusions, "decoder": model.decoder})


def stored_weights(both: nn.ModuleDict) -> dict[str, Tensor]:
    """The state dict of `fusions_and_llama`, with the tied head stored once."""
    weights = both.state_dict()
    del weights[f"decoder.{TIED}"]
    return weights


def save_learned(model: Meteor, fusions: nn.ModuleDict, file: Path) -> None:
    """The fusions and the model's Llama in half precision.

    With them goes the fingerprint of the encoders that they were trained on.
    """
    weights = stored_weights(fusions_and_llama(fusions, model))
    halves = {key: weight.half().cpu().contiguous() for key, weight in weights.items()}
    save_file(halves, file, metadata={"encoders": fingerprint(model)})


def load_learned(model: Meteor, file: Path) -> dict[str, Learned]:
    """The learned fusions that `train_fusions.py` wrote, by name, with the Llama trained with them.

    Raises: ValueError for a file that is damaged or was trained on other encoders than the model's.
    """
    weights, trained_on = read_weights(file)
    if trained_on != fingerprint(model):
        raise ValueError(f"{file} was trained on other encoders than the model's: run `{COMMAND}`")
    twin = copy.deepcopy(model)  # with a Llama of its own
    both = fusions_and_llama(new_fusions(twin), twin)
    wrong = stored_weights(both).keys() ^ weights.keys()  # in one of them only
    if wrong:
        raise ValueError(f"{file} does not fit the model: {min(wrong)} is missing or unknown")
    both.load_state_dict(weights, strict=False)  # the tied head is stored once
    both.eval().requires_grad_(False)
    return {name: learned(twin, fusion) for name, fusion in both["fusions"].items()}


def read_weights(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights of a file of `save_learned` in float32, and its fingerprint."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key).float() for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or is cut short: {error}") from error
    return weights, metadata.get("encoders")

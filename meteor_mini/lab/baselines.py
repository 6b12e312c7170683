"""What METEOR is compared with, each a few lines over the same interfaces.

Inside the LLM, for `Meteor.generate(pruner=...)`: `fixed`, `fastv`, `pyramid_drop`. Inside an encoder: `tome`; at the
encoders' outputs: `prumerge`. In place of stage 2: `LEARNED`, which `train_baselines.py` trains. Each is named after the paper whose idea it
follows; what differs from that paper's own code is said.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stage1_encode import adapter, allocate_budget, encode, encode_all
from stage2_fuse import Fused, Projector, fuse
from stage3_decode import AdaptivePruner, select

from .model import Answer, Budget, Encoded, Meteor

Pruner = Callable[..., AdaptivePruner]


def fixed(counts: dict[int, int], k: int | None = 5) -> Pruner:
    """The same number of tokens for every question: {layer: tokens kept}; k: heads that decide, None for all.
    Source: [supplement Table 3, "Pre-defined Ratio"]"""
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, counts=counts, k=k)


def last_token(visual_mask: Tensor) -> Tensor:
    """(B, S) bool: the prompt's last token, who alone asks in FastV and PyramidDrop. Prompts are padded on the left."""
    last = torch.zeros_like(visual_mask)
    last[:, -1] = True
    return last


def fastv(keep: int, layer: int, eager: bool = False) -> Pruner:
    """FastV (ECCV 2024): at one early layer, the tokens that the last token attends to most, over all heads.

    Theirs reads the attention weights of the layer before; its demo loads the whole model on eager attention for that: `eager`.
    Otherwise the layer's own q and k of the last token are multiplied before it runs.  Source: [arXiv 2403.06764]
    """
    kind = EagerFastV if eager else AdaptivePruner
    return lambda decoder, visual_mask: kind(
        decoder, visual_mask, counts={layer: keep}, k=None, query_mask=last_token(visual_mask)
    )


def pyramid_drop(keep: list[int], num_layers: int) -> Pruner:
    """PyramidDrop (CVPR 2025): after each quarter of the layers fewer tokens, ranked by the last token's attention, from the
    layer's own q and k, as theirs.

    Args: keep: tokens left after the first, second and third quarter; theirs halves each time, and counts positions anew after
    each drop, where here they stay.
    Source: [arXiv 2410.17247]
    """
    counts = {num_layers * quarter // 4: K for quarter, K in zip((1, 2, 3), keep)}
    return lambda decoder, visual_mask: AdaptivePruner(
        decoder, visual_mask, counts=counts, k=None, query_mask=last_token(visual_mask)
    )


class EagerFastV(AdaptivePruner):
    """Ranks by the last token's row of the weights that the layer before has just used, mean over heads. In the block all layers
    are on eager attention, and write their weights (B, H, S, S) to memory."""

    def __enter__(self) -> "EagerFastV":
        super().__enter__()
        self._implementation = self.decoder.config._attn_implementation
        self.decoder.set_attn_implementation("eager")
        self._handles += [
            self.decoder.layers[i - 1].self_attn.register_forward_hook(self._read)
            for i in self.layers
        ]
        return self

    def __exit__(self, *error) -> None:
        self.decoder.set_attn_implementation(self._implementation)
        super().__exit__(*error)

    def _read(self, attention, args, output) -> None:
        if not self._past:
            self._weights = output[1][:, :, -1].float().mean(dim=1)  # (B, H, N, N) -> (B, N)

    @torch.no_grad()
    def _stays(self, i: int, layer, hidden: Tensor, rotary: tuple) -> Tensor:
        if self._visual.shape != self.visual_mask.shape:
            raise ValueError(
                "eager FastV must be used without beams or several sequences for a prompt"
            )
        visual = self._visual.gather(1, self._index) & self._valid  # (B, N)
        there = visual.sum(dim=1)
        self.counts[i] = self.fixed[i].to(there).minimum(there)
        keep = select(self._weights * visual, self.counts[i], visual)
        self.kept[i] = torch.zeros_like(self.visual_mask).scatter(1, self._index, keep)
        return self._valid & ~visual | keep


# ------------------------------------------------------------------ inside and behind the encoders


def tome(encoder: nn.Module, images: Tensor, r: int, eager: bool = False) -> Tensor:
    """ToMe (ICLR 2023) on a ViT of timm: between attention and MLP of each block the r patches that are most like another
    one are merged into it, so that N - L r of N are left.

    Patches take turns as givers (even places) and takers (odd ones); likeness is the cosine of their keys, mean over heads;
    a merged token is the mean of its patches, and attention counts it as often as it has patches: log(size) is added to its
    scores.
    Args: images (B, 3, H, W) in [0, 1]; r: 0..half of the patches, in every block; eager: write the attention weights out, as
    theirs does, not on fused attention. Returns: (B, N - L r, D).
    Source: [arXiv 2210.09461]
    """
    a = adapter(encoder)
    x, rope = a.embed(images)  # (B, P + N, D)
    if rope is not None or not hasattr(a.blocks[0], "ls1"):
        raise TypeError(
            f"encoder must be a VisionTransformer of timm without rotary positions, got {type(a.model).__name__}"
        )
    size = x.new_ones(*x.shape[:2], 1)  # patches in each token: (B, P + N, 1)
    for block in a.blocks:
        attn = block.attn
        q, k, v = (
            t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            for t in attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)  # (B, H, n, d)
        often = size.log()[:, None, None, :, 0]  # (B, 1, 1, n)
        if eager:
            mixed = (attn.scale * q @ k.mT + often).softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, often, scale=attn.scale)
        x = x + block.ls1(attn.proj(mixed.transpose(1, 2).flatten(2)))
        x, size = merge_pairs(x, size, k.mean(dim=1), r, a.prefix)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return a.norm(x)[:, a.prefix :]


def merge_pairs(
    x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """The r givers of highest cosine to their best taker join it, the mean weighted by size; tokens keep their order.

    Args: x (B, n, D), size (B, n, 1), keys (B, n, d); the first `prefix` tokens stay. Returns: x (B, n - r, D), size.
    """
    unit, n = F.normalize(keys, dim=-1)[:, prefix:], x.shape[1]
    if not 0 <= r <= unit.shape[1] // 2:
        raise ValueError(
            f"r must be 0 to {unit.shape[1] // 2}, half of the patches there are, got {r}"
        )
    best, taker = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)  # (B, givers)
    giver = best.argsort(dim=1, descending=True, stable=True)[:, :r]  # (B, r)
    source, target = prefix + 2 * giver, prefix + 2 * taker.gather(1, giver) + 1  # places in x
    total = (x * size).scatter_add(
        1,
        target[..., None].expand(-1, -1, x.shape[2]),
        (x * size).take_along_dim(source[..., None], 1),
    )
    size = size.scatter_add(1, target[..., None], size.take_along_dim(source[..., None], dim=1))
    gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, source, True)
    stay = gone.int().argsort(dim=1, stable=True)[
        :, : n - r, None
    ]  # places that are not gone, in order
    return (total / size).take_along_dim(stay, dim=1), size.take_along_dim(stay, dim=1)


def merge(tokens: Tensor, keep_idx: Tensor) -> Tensor:
    """Each dropped token joins the kept one that it is most like; a kept token becomes the mean of its group.

    Args: tokens (B, N, D) float; keep_idx (B, K) int64, ascending. Returns: (B, K, D).
    """
    kept = tokens.take_along_dim(keep_idx[..., None], dim=1)  # (B, K, D)
    group = (F.normalize(tokens, dim=-1) @ F.normalize(kept, dim=-1).mT).argmax(dim=-1)  # (B, N)
    group = group.scatter(
        1, keep_idx, torch.arange(keep_idx.shape[1], device=group.device).expand_as(keep_idx)
    )
    member = F.one_hot(group, keep_idx.shape[1]).to(tokens.dtype)  # (B, N, K)
    return member.mT @ tokens / member.sum(dim=1)[..., None]


def prumerge(model: Meteor, images: Tensor, names: list[str], budget: int) -> Encoded:
    """PruMerge++-style: all at once at each encoder's output, the patches of most attention, the others merged in.

    Equal shares for the encoders `names`. Theirs picks outliers by quartiles and adds patches on a regular grid; here the
    count is given, so the highest stay (of a ConvNet, which has no attention, those least like its mean token).
    Source: [arXiv 2403.15388]
    """
    encoders, images = [model.encoders[n] for n in names], images.to(model.device)
    counts = allocate_budget(
        budget, [1.0] * len(names), [adapter(e).num_tokens for e in encoders], "average"
    )
    kept = [encode(e, images, (None, None, K))[1] for e, K in zip(encoders, counts)]
    merged = [merge(encode(e, images)[0], keep_idx) for e, keep_idx in zip(encoders, kept)]
    return only(model, names, merged, kept)


def only(model: Meteor, names: list[str], features: list[Tensor], kept: list[Tensor]) -> Encoded:
    """The sequence that a model with only the encoders `names` would feed to its LLM: no stage 2."""
    tokens = fuse([model.projectors[n](x) for n, x in zip(names, features)], None)
    index = [list(model.encoders).index(n) for n in names]
    all_kept = [kept[names.index(n)] if n in names else kept[0][:, :0] for n in model.encoders]
    return Encoded(
        Fused(
            tokens.tokens,
            torch.tensor(index, device=model.device)[tokens.encoder_id],
            tokens.keep_idx,
        ),
        all_kept,
    )


# ------------------------------------------------------------------ learned fusions: (C x (B, N, D_l)) -> (B, K, D)


class ChannelFusion(nn.Module):
    """EAGLE's pre-projection fusion: the encoders' channels side by side, one projector, a token per grid cell.

    Source: [supplement Table 2, "Pre-projection fusion"; arXiv 2408.15998]
    """

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        self.project = Projector(sum(widths), width)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.project(torch.cat(features, dim=-1))  # (B, N, sum D_l) -> (B, N, D)


class Resampler(nn.Module):
    """Learned queries, as many as there are grid cells, attend to all encoders' projected tokens.
    Source: [supplement Table 2, "Resampler"; one layer, as in Qwen-VL, arXiv 2308.12966]"""

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        self.projectors = nn.ModuleList(Projector(w, width) for w in widths)
        self.query = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))
        self.place = nn.Parameter(
            0.02 * torch.randn(len(widths), grid[0] * grid[1], width)
        )  # which patch of which encoder
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: list[Tensor]) -> Tensor:
        values = torch.cat([p(x) for p, x in zip(self.projectors, features)], dim=1)  # (B, C N, D)
        keys = self.norm(values) + self.place.flatten(0, 1)
        return self.attention(
            self.query.expand(len(values), -1, -1), keys, values, need_weights=False
        )[0]  # (B, N, D)


class PixShuffle(nn.Module):
    """Each 2 x 2 patches of an encoder become one token, their channels side by side: a quarter of all tokens.
    Source: [supplement Table 2, "PixShuffle"; InternVL, arXiv 2404.16821]"""

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        self.grid, self.projectors = grid, nn.ModuleList(Projector(4 * w, width) for w in widths)

    def forward(self, features: list[Tensor]) -> Tensor:
        (h, w), tokens = self.grid, []
        for x, project in zip(features, self.projectors):
            x = x.view(len(x), h // 2, 2, w // 2, 2, -1).transpose(2, 3)  # (B, h/2, w/2, 2, 2, D_l)
            tokens.append(project(x.flatten(3).flatten(1, 2)))
        return torch.cat(tokens, dim=1)  # (B, C N / 4, D)


class TokenMLP(nn.Module):
    """An MLP along the tokens: the N tokens of each encoder, after its projector, mix into N / 4.
    Source: [supplement Table 2, "MLP"; which dimension it mixes is our reading]"""

    def __init__(self, widths: list[int], grid: tuple[int, int], width: int):
        super().__init__()
        N = grid[0] * grid[1]
        self.projectors = nn.ModuleList(Projector(w, width) for w in widths)
        self.mix = nn.ModuleList(Projector(N, N // 4) for _ in widths)

    def forward(self, features: list[Tensor]) -> Tensor:
        parts = [mix(p(x).mT).mT for p, mix, x in zip(self.projectors, self.mix, features)]
        return torch.cat(parts, dim=1)  # (B, C N / 4, D)


LEARNED = {
    "EAGLE-style": ChannelFusion,
    "Resampler": Resampler,
    "MLP": TokenMLP,
    "PixShuffle": PixShuffle,
}


def new_fusions(model: Meteor) -> nn.ModuleDict:
    """All learned fusions, untrained; those with a projector for each encoder start from the model's own."""
    widths, width = [a.dim for a in model.adapters], model.decoder.config.hidden_size
    fusions = nn.ModuleDict(
        {name: build(widths, model.adapters[0].grid, width) for name, build in LEARNED.items()}
    )
    for name in ("Resampler", "MLP"):
        for mine, theirs in zip(fusions[name].projectors, model.projectors.values()):
            mine.load_state_dict(theirs.state_dict())
    return fusions


class Learned(NamedTuple):
    """answer: what is measured, (model, images, questions) -> answers; encode: (model, images) -> tokens (B, K, D)."""

    answer: Callable
    encode: Callable


def learned(model: Meteor, fusion: nn.Module) -> Learned:
    """A learned fusion behind the model's encoders, all unpruned, and before the model's Llama."""

    @torch.no_grad()
    def encode(_, images: Tensor) -> Tensor:
        return fusion(encode_all(list(model.encoders.values()), images.to(model.device), None)[0])

    def answer(_, images: Tensor, questions: list[str]) -> list[Answer]:
        tokens = encode(_, images)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        none = [place[:, :0]] * len(
            model.encoders
        )  # its tokens are no patches: the books of patches stay empty
        return model.answer(
            Encoded(Fused(tokens, torch.zeros_like(place), place), none), questions, Budget.none()
        )

    return Learned(answer, encode)


def fingerprint(model: Meteor) -> str:
    """Of the encoders' weights in half precision, as they are stored."""
    digest = hashlib.sha256()
    for name, value in sorted(model.encoders.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


def save_learned(model: Meteor, fusions: nn.ModuleDict, file: Path) -> None:
    """The fusions and the model's Llama in half precision, with the fingerprint of the encoders they were trained on."""
    tied = "lm_head.weight"  # the word embeddings, stored once
    arrays = {f"fusions.{k}": v for k, v in fusions.state_dict().items()}
    arrays |= {f"decoder.{k}": v for k, v in model.decoder.state_dict().items() if k != tied}
    save_file(
        {k: v.half().cpu().contiguous() for k, v in arrays.items()},
        file,
        metadata={"encoders": fingerprint(model)},
    )


def load_learned(model: Meteor, file: Path) -> dict[str, Learned]:
    """The learned fusions that `train_baselines.py` wrote, by name, each with the Llama that was trained with them.

    Raises: ValueError for a file that is damaged or was trained on other encoders than the model's.
    """
    try:
        with safe_open(file, "pt") as f:
            trained_on, weights = (
                (f.metadata() or {}).get("encoders"),
                {k: f.get_tensor(k).float() for k in f.keys()},
            )
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or is cut short: {error}") from error
    if trained_on != fingerprint(model):
        raise ValueError(
            f"{file} was trained on other encoders than the model's: run `python -m meteor_mini.train_baselines`"
        )
    twin = copy.deepcopy(model)
    both = nn.ModuleDict({"fusions": new_fusions(twin), "decoder": twin.decoder})
    missing = set(both.state_dict()) ^ set(weights)
    if missing - {"decoder.lm_head.weight"}:
        raise ValueError(f"{file} does not fit the model: {min(missing)} is missing or unknown")
    both.load_state_dict(weights, strict=False)
    both.eval().requires_grad_(False)
    return {name: learned(twin, fusion) for name, fusion in both["fusions"].items()}

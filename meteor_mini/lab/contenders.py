"""What `bench` compares from pictures to words, at real sizes: models of random weights, and how
each contender sends a picture through them.

Timing needs no training; so counts are given (the paper's), not found by ranks and lambda.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stage3_decode import default_layers, find_cache

from .. import baselines
from ..budgets import Budget
from ..toy.parts import build_tokenizer
from ..model import Encoded, Meteor
from ..weights import build_decoder
from . import fusions
from .timing import Clock, synchronize

# The presets "small" and "eagle-x4" with n x n patches in each encoder, whatever their own size.
SIZES = {
    "small": {
        "clip": {"patch": 16, "width": 768, "layers": 12, "heads": 12},
        "convnext": {"depths": [3, 3, 27, 3], "width": 128},
        "eva": {"patch": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "qkv_fused": True},
        "pix2struct": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "d_ff": 2048,
        },
        "llama": {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
        },
    },
    "large": {
        "clip": {"patch": 14, "width": 1024, "layers": 24, "heads": 16},
        "convnext": {"depths": [3, 4, 30, 3], "width": 384},
        "eva": {"patch": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "qkv_fused": False},
        "pix2struct": {
            "hidden_size": 1536,
            "num_hidden_layers": 18,
            "num_attention_heads": 24,
            "d_ff": 3968,
        },
        "llama": {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
    },
}
SIZES["large-7b"] = SIZES["large"] | {
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    }
}

# Visual tokens of the paper (Table 3): of all encoders, after stage 1, after stage 2, and from each
# pruned layer of the LLM on.
PAPER_ALL, PAPER_STAGE1, PAPER_STAGE2, PAPER_STAGE3 = 4096, 1193, 576, (396, 170, 76)
HEADS = 5  # that decide in stage 3
TEXT = 32  # words of a question
NEW = 9  # tokens that are generated


# --------------------------------------------------------------------------------------- the models


def build(size: str, n: int, device: str, dtype: torch.dtype) -> Meteor:
    """Four encoders of n x n patches and a Llama, with random weights.

    Raises: ValueError for a size that is not in `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    options = SIZES[size]
    config = {
        "encoders": {
            "clip": ["clip", clip_options(options["clip"], n)],
            "convnext": ["convnext", convnext_options(options["convnext"], n)],
            "eva": ["eva", eva_options(options["eva"], n)],
            "pix2struct": ["pix2struct", pix2struct_options(options["pix2struct"], n)],
        },
        "decoder": options["llama"],
        "ranks": None,
        "lambda_table": None,
        "budget": None,
    }
    decoder = build_decoder(options["llama"])
    model = Meteor(config, build_tokenizer(["what"]), decoder=decoder)
    return model.eval().to(device, dtype)


def clip_options(size: dict, n: int) -> dict:
    """Of open_clip's VisionTransformer; size: of `SIZES`."""
    patch = size["patch"]
    return {
        "width": size["width"],
        "layers": size["layers"],
        "heads": size["heads"],
        "image_size": n * patch,
        "patch_size": patch,
        "mlp_ratio": 4,
        "output_dim": size["width"],
    }


def convnext_options(size: dict, n: int) -> dict:
    """Of timm's ConvNeXt: each of its four levels is twice as wide as the one before."""
    stride = 16
    return {
        "num_classes": 0,
        "depths": size["depths"],
        "dims": [size["width"] * 2**level for level in range(4)],
        "output_stride": stride,
        "input_size": [3, stride * n, stride * n],
    }


def eva_options(size: dict, n: int) -> dict:
    """Of timm's Eva, as EVA-02 has them."""
    patch = size["patch"]
    own = {name: value for name, value in size.items() if name != "patch"}
    return own | {
        "img_size": n * patch,
        "patch_size": patch,
        "num_classes": 0,
        "mlp_ratio": 8 / 3,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": [n, n],
    }


def pix2struct_options(size: dict, n: int) -> dict:
    """Of transformers' Pix2StructVisionModel; its own initializer_range leaves its MLPs dead."""
    return size | {"seq_len": n * n, "initializer_range": 0.02}


# ---------------------------------------------------------------------------------- who is compared


class Contender(NamedTuple):
    """One way from pictures to words.

    encode: pictures -> `Encoded`; pruner: of `Meteor.generate`; layers: visual tokens in each LLM
    layer.
    """

    encode: Callable[[Tensor], Encoded]
    pruner: baselines.Pruner | None
    layers: list[int]


def contenders(model: Meteor) -> dict[str, Contender]:
    """Unpruned; EAGLE-style, one token for each grid cell; METEOR, the paper's counts in proportion
    to the tokens there are.
    """
    return {
        "unpruned": unpruned(model),
        "EAGLE-style": eagle_style(model),
        "METEOR": meteor(model),
    }


def pruned_and_not(model: Meteor) -> dict[str, Contender]:
    """The two that share everything but the pruning."""
    return {"unpruned": unpruned(model), "METEOR": meteor(model)}


def unpruned(model: Meteor) -> Contender:
    L = model.decoder.config.num_hidden_layers
    encode = partial(encode_by_budget, model, Budget.none())
    return Contender(encode, None, [model.num_tokens] * L)


def meteor(model: Meteor) -> Contender:
    L, N = model.decoder.config.num_hidden_layers, model.num_tokens
    K = in_proportion(PAPER_STAGE2, N)
    stage1 = in_proportion(PAPER_STAGE1, N)
    budget = Budget(stage1=stage1, stage2=K)
    counts = {i: in_proportion(k, N) for i, k in zip(default_layers(L), PAPER_STAGE3)}
    encode = partial(encode_by_budget, model, budget)
    return Contender(encode, baselines.fixed(counts, HEADS), spread(K, counts, L))


def eagle_style(model: Meteor) -> Contender:
    views, config = list(model.views.values()), model.decoder.config
    widths = [view.width for view in views]
    fusion = fusions.ChannelFusion(widths, views[0].grid, config.hidden_size)
    eagle = fusions.learned(model, fusion.to(model.device, model.decoder.dtype))
    cells = views[0].num_tokens
    encode = partial(encode_by_fusion, model, eagle)
    return Contender(encode, None, [cells] * config.num_hidden_layers)


@torch.no_grad()
def encode_by_budget(model: Meteor, budget: Budget, images: Tensor) -> Encoded:
    """Stages 1 and 2; encoders share equally, as no ranks were measured."""
    return model.encode(images, budget, ranks=torch.ones(3, len(model.encoders)))


def encode_by_fusion(model: Meteor, fusion: fusions.Learned, images: Tensor) -> Encoded:
    """The tokens of a learned fusion, which are no patches."""
    return fusions.as_sequence(model, fusion.encode(model, images))


def in_proportion(count: int, N: int) -> int:
    """One of the paper's counts, scaled to a model of N visual tokens."""
    return round(N * count / PAPER_ALL)


def spread(K: int, counts: dict[int, int], L: int) -> list[int]:
    """Visual tokens in each of L layers: K at first, from layer i on at most counts[i]."""
    layers, there = [], K
    for layer in range(L):
        if layer in counts:
            there = min(there, counts[layer])
        layers.append(there)
    return layers


# --------------------------------------------------------------------------------------- one run


def run(model: Meteor, contender: Contender, images: Tensor, new: int = NEW) -> dict[str, float]:
    """From pictures to `new` tokens.

    Returns: {"prefill": seconds to the first, "decode": seconds for each of the others, "kv": bytes
        of the KV cache}.
    """
    clock = Clock(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    encoded = contender.encode(images)
    question = " ".join(["what"] * TEXT)
    output, _ = model.generate(
        encoded,
        [question] * len(images),
        Budget.none(),
        contender.pruner,
        max_new_tokens=new,
        min_new_tokens=new,
        streamer=clock,
        return_dict_in_generate=True,
    )
    layers = find_cache(output).layers
    kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return clock.seconds(start) | {"kv": kv}

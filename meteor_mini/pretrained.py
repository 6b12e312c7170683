"""Meteor on weights that the world already uses: fetched by open_clip and transformers themselves, hub cache and all.

    from_names("small")                                           a preset
    from_names(encoders=["ViT-B-16/openai", "facebook/dinov2-small"], decoder="HuggingFaceTB/SmolLM2-135M-Instruct")

Projectors start untrained, ranks and lambda unmeasured: `finetune.py` trains them, `Meteor.calibrate` measures.
"""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Model,
    Pix2StructForConditionalGeneration,
)

from .model import PAPER_TOKENS, Meteor, hub_or_cache
from .presets import PRETRAINED

BUDGET_SHARES = [n / 4096 for n in PAPER_TOKENS]  # of four encoders' 1024 tokens each


def fetched(name: str, load: Callable, repository: str | None = None):
    """load(), or one sentence that says what could not be fetched and how to bring it here."""
    try:
        with hub_or_cache(name):
            return load()
    except (
        ImportError,
        RuntimeError,
    ):  # a package or a device that is not there, out of memory: none of the hub's doing
        raise
    except Exception as error:  # offline, unknown name, no such revision: a dozen kinds, told by the error it comes from
        raise ValueError(
            f"{name} could not be fetched from the hub: on a machine with a network run `hf download "
            f"{repository or name}` and copy the cache folder here (HF_HOME, by default ~/.cache/huggingface), or give "
            "a directory that holds it"
        ) from error


def encoder(name: str, grid: list[int] | None = None, **hub) -> tuple[nn.Module, list]:
    """A vision encoder with its weights, and [family, options] from which `build_encoder` makes it again without them.

    Args: name: "MODEL/TAG" or "hf-hub:OWNER/NAME" of open_clip, or the hub id or directory of a Pix2Struct or DINOv2; grid:
    (h, w) patches of these two, which take any; hub: cache_dir, and for these two revision.
    Raises: ValueError where it cannot be fetched, TypeError for a model of another kind.
    """
    if name.startswith("hf-hub:") or name.split("/")[0] in open_clip.list_models():
        return from_open_clip(name, hub.get("cache_dir"))
    config = fetched(name, lambda: AutoConfig.from_pretrained(name, **hub))
    if config.model_type not in ("pix2struct", "dinov2"):
        raise TypeError(
            f"{name} must be a Pix2Struct or a DINOv2, or a model of open_clip, got {config.model_type}"
        )
    if (
        config.model_type == "pix2struct"
    ):  # Pix2StructVisionModel.from_pretrained would load nothing, silently
        whole = Pix2StructForConditionalGeneration
        model = fetched(
            name, lambda: whole.from_pretrained(name, use_safetensors=True, **hub)
        ).encoder
    else:
        model = fetched(
            name, lambda: Dinov2Model.from_pretrained(name, use_safetensors=True, **hub)
        )
    if grid is not None:
        model.config.meteor_grid = list(grid)
    return model, [config.model_type, model.config.to_diff_dict()]


def from_open_clip(name: str, cache_dir: str | None = None) -> tuple[nn.Module, list]:
    if name.startswith("hf-hub:"):
        repository = partial(
            download_pretrained_from_hf, name.removeprefix("hf-hub:"), cache_dir=cache_dir
        )
        config_file, file = fetched(
            name,
            lambda: (repository(filename="open_clip_config.json"), repository()),
            name.removeprefix("hf-hub:"),
        )
        architecture, options = name, {"cache_dir": cache_dir}
        model_cfg = json.loads(Path(config_file).read_text())["model_cfg"]
    else:
        architecture, _, tag = name.partition("/")
        known = open_clip.get_pretrained_cfg(architecture, tag)
        if not known:
            raise ValueError(
                f"open_clip knows no weights {tag!r} of {architecture}, but "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(architecture))}"
            )
        file = fetched(
            name,
            lambda: open_clip.download_pretrained(known, cache_dir=cache_dir),
            "/".join(known.get("hf_hub", name).split("/")[:2]),
        )
        model_cfg = open_clip.get_model_config(architecture) | {
            "quick_gelu": known.get("quick_gelu", False)
        }
        options = {
            "pretrained": str(file),
            "force_quick_gelu": model_cfg["quick_gelu"],
            "force_preprocess_cfg": {k: known[k] for k in ("mean", "std") if k in known},
        }
    if not str(file).endswith(".safetensors"):
        raise ValueError(f"{file} is not a safetensors file, and nothing else is read")
    with hub_or_cache(name):  # of "hf-hub:" it asks once more for what has just come
        visual = open_clip.create_model(architecture, **options).visual
    preprocess = {k: list(visual.preprocess_cfg[k]) for k in ("mean", "std")}
    model_cfg = {
        k: model_cfg[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in model_cfg
    }
    return visual, ["open_clip", {"model_cfg": model_cfg, "preprocess": preprocess}]


def from_names(
    preset: str | None = None,
    encoders: list[str] | dict[str, str] | None = None,
    decoder: str | None = None,
    grid: list[int] | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map=None,
    **hub,
) -> Meteor:
    """A `Meteor` of pretrained encoders and decoder; projectors random (seed 0), ranks and lambda to be calibrated.

    Args: preset: one of `PRETRAINED`; or encoders: names as `encoder` reads them, and decoder: a hub id or directory; grid: of
    Pix2Struct and DINOv2; dtype: of all parts, or its name; device_map: of the decoder, as transformers takes it (needs
    accelerate), encoders and projectors go where it begins; hub: revision, cache_dir.
    Raises: ValueError for arguments not as above, and where something cannot be fetched.
    """
    chosen = (
        dict(PRETRAINED[preset])
        if preset
        else {"encoders": encoders, "decoder": decoder, "grid": grid}
    )
    named = chosen["encoders"]
    named = dict(named) if isinstance(named, dict) else {short_name(n): n for n in named or []}
    if len(named) < 2 or not chosen["decoder"]:
        raise ValueError(
            "encoders must be 2 or more of different names, and decoder a hub id or directory, got "
            f"{encoders} and {decoder}"
        )
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point type of torch or its name, as bfloat16, got {dtype!r}"
        )
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ValueError('device_map needs accelerate: pip install -e ".[train]"')
    built = {n: encoder(name, chosen["grid"], **hub) for n, name in named.items()}
    placed = {} if device_map is None else {"device_map": device_map}
    llm = fetched(
        chosen["decoder"],
        lambda: AutoModelForCausalLM.from_pretrained(
            chosen["decoder"], dtype=dtype, use_safetensors=True, **placed, **hub
        ),
    )
    tokenizer = fetched(
        chosen["decoder"], lambda: AutoTokenizer.from_pretrained(chosen["decoder"], **hub)
    )
    config = {
        "encoders": {n: spec for n, (_, spec) in built.items()},
        "decoder": llm.config.to_dict(),
        "words": None,
        "ranks": None,
        "lambda_table": None,
        "budget": None,
        "trained": False,
    }
    config = json.loads(json.dumps(config, default=str))  # as it will be read again
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Meteor(config, tokenizer, {n: m for n, (m, _) in built.items()}, llm)
    total = sum(a.num_tokens for a in model.adapters)
    shares = [round(share * total) for share in BUDGET_SHARES]
    model.config["budget"] = dict(zip(("stage1", "stage2", "stage3"), shares))
    for part in (model.encoders, model.projectors):
        part.to(device=llm.device, dtype=dtype)
    return model.eval()


def short_name(name: str) -> str:
    """ "ViT-B-16/openai" -> "ViT-B-16", "facebook/dinov2-small" -> "dinov2-small": a module's name, without dots."""
    architecture = name.split("/")[0]
    return (architecture if architecture in open_clip.list_models() else Path(name).name).replace(
        ".", "-"
    )

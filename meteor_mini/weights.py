"""Names -> models: the embedded one, directories, hub ids, and other people's pretrained parts.

    Meteor.from_pretrained("toy")                                  the embedded model
    Meteor.from_pretrained("smol")                                   its encoders before SmolLM2
    Meteor.from_pretrained("DIR or OWNER/NAME")                      what save_pretrained wrote
    Meteor.from_pretrained("small")                                  a preset of pretrained parts
    Meteor.from_pretrained(encoders=["ViT-B-16/openai", "facebook/dinov2-small"],
                           decoder="HuggingFaceTB/SmolLM2-135M-Instruct")

Pretrained parts are fetched by open_clip and transformers themselves, hub cache and all. A model of
them has untrained projectors, and neither ranks nor lambda: `finetune.py` trains it, `budgets.py`
measures it. Weights are read from safetensors only.
"""

import contextlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import open_clip
import torch
from huggingface_hub import constants, get_session, hf_hub_download
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    Pix2StructForConditionalGeneration,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    PreTrainedModel,
)

from .budgets import PAPER_TOKENS

T = TypeVar("T")
CHECKPOINTS = {"toy": Path(__file__).parent / "toy" / "checkpoint"}
FILES = ("config.json", "model.safetensors")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
# "grid": patches (h, w) of a Pix2Struct or DINOv2, which take any.
PRESETS = {
    "small": {
        "encoders": {
            "clip": "ViT-B-16/openai",  # 196 tokens
            "convnext": "convnext_base_w/laion2b_s13b_b82k",  # 64
            "eva": "EVA02-B-16/merged2b_s8b_b131k",  # 196
            "pix2struct": "google/pix2struct-base",  # 256
        },
        "decoder": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "grid": [16, 16],
    },
    "eagle-x4": {
        "encoders": {
            "clip": "ViT-L-14-336/openai",  # 576 tokens
            "convnext": "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup",  # 64
            "eva": "EVA02-L-14-336/merged2b_s6b_b61k",  # 576
            "pix2struct": "google/pix2struct-large",  # 1024
        },
        "decoder": "lmsys/vicuna-7b-v1.5",
        "grid": [32, 32],
    },
}
# A preset's budget has the paper's proportions: 1193, 576 and 242 of four encoders' 1024 tokens
# each.
BUDGET_SHARES = [tokens / 4096 for tokens in PAPER_TOKENS]


def build_model(cls: type[T], name: str | Path = "toy", **hub) -> T:
    """A model of class `cls`, in eval mode; of our own files in float32.

    Args: name: see the head of this file; hub: of huggingface_hub's `hf_hub_download`, as revision,
        cache_dir, token; or arguments of `pretrained_parts`.
    Raises: ValueError for a directory without config.json or model.safetensors, or whose weights do
        not fit, and where the hub cannot be reached.
    """
    if name == "smol":
        if importlib.util.find_spec("peft") is None:
            raise ValueError('smol needs the package peft: pip install -e ".[train]"')
        from .smol.build import load_smol

        return load_smol()
    if name in PRESETS or "encoders" in hub:
        preset = name if name in PRESETS else None
        return from_parts(cls, preset, **hub)
    folder = str(CHECKPOINTS.get(str(name), name))
    config_file, weights_file = (find_file(folder, file, hub) for file in FILES)
    config = json.loads(Path(config_file).read_text())
    if not {"encoders", "decoder"} <= config.keys():
        raise ValueError(
            f"{config_file} is not the configuration of a Meteor: encoders or decoder is missing"
        )
    tokenizer = fetch(folder, lambda: AutoTokenizer.from_pretrained(folder, **hub))
    model = cls(config, tokenizer).float()  # a configuration of bfloat16 builds its decoder so
    try:
        load_model(model, weights_file)
    except (RuntimeError, SafetensorError) as error:  # other names or shapes; a file cut short
        raise ValueError(f"{weights_file} does not fit {config_file}: {error}") from error
    model.folder = Path(weights_file).parent  # what lies beside the weights, as eagle.safetensors
    return model.eval()


def write_model(model, folder: Path) -> None:
    """config.json, the tokenizer's files and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")
    model.tokenizer.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))


# ------------------------------------------------------------------------------ parts from a config


def build_encoders(encoders: dict[str, list]) -> dict[str, nn.Module]:
    """{name: [family, options]} of config.json -> {name: encoder with random weights}."""
    return {name: build_encoder(family, options) for name, (family, options) in encoders.items()}


def build_encoder(family: str, options: dict) -> nn.Module:
    """A vision encoder with random weights.

    Args: family: "clip", "convnext", "eva", "pix2struct", "dinov2" or "open_clip"; options:
        keywords of the library's class. A ConvNeXt has besides "input_size" [3, H, W], as it has no
        size of its own; "open_clip" has {"model_cfg": open_clip's own, "preprocess": {"mean",
        "std"}}.
    Raises: ValueError for another family.
    """
    if family == "clip":
        return VisionTransformer(**options)
    if family == "eva":
        return Eva(**options)
    if family == "convnext":
        options = dict(options)
        input_size = options.pop("input_size")
        model = ConvNeXt(**options)
        model.pretrained_cfg = {"input_size": input_size}  # where timm notes it
        return model
    if family == "pix2struct":
        return Pix2StructVisionModel(Pix2StructVisionConfig(**options))
    if family == "dinov2":
        return Dinov2Model(Dinov2Config(**options))
    if family == "open_clip":
        return build_open_clip(**options)
    raise ValueError(
        f"encoder must be one of clip, convnext, eva, pix2struct, dinov2, open_clip, got {family!r}"
    )


def build_open_clip(model_cfg: dict, preprocess: dict) -> nn.Module:
    """The image tower that `open_clip.create_model` would make, without its text tower."""
    vision = dict(model_cfg["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    smallest_text = {"vocab_size": 1, "context_length": 1, "width": 1, "heads": 1, "layers": 1}
    quick_gelu = model_cfg.get("quick_gelu", False)
    visual = open_clip.CLIP(model_cfg["embed_dim"], vision, smallest_text, quick_gelu).visual
    visual.preprocess_cfg = preprocess
    return visual


def build_decoder(options: dict) -> PreTrainedModel:
    """A decoder with random weights; options: its configuration's, a Llama's without
    "model_type".
    """
    config = AutoConfig.for_model(**{"model_type": "llama"} | options)
    return AutoModelForCausalLM.from_config(config)


# --------------------------------------------------------------------------------- pretrained parts


def from_parts(cls: type[T], preset: str | None = None, **choice) -> T:
    """A model of pretrained encoders and decoder; projectors random (seed 0), not calibrated.

    Args: preset: one of `PRESETS`; choice: of `pretrained_parts`.
    """
    chosen = dict(PRESETS[preset]) if preset else {}
    config, tokenizer, encoders, decoder = pretrained_parts(**chosen | choice)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config, tokenizer, encoders, decoder)
    shares = [round(share * model.num_tokens) for share in BUDGET_SHARES]
    model.config["budget"] = dict(zip(("stage1", "stage2", "stage3"), shares))
    for part in (model.encoders, model.projectors):
        part.to(device=decoder.device, dtype=decoder.dtype)
    return model.eval()


def pretrained_parts(
    encoders: list[str] | dict[str, str] | None = None,
    decoder: str | None = None,
    grid: list[int] | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map=None,
    **hub,
) -> tuple:
    """Config, tokenizer, {name: encoder} and decoder, the last two with pretrained weights.

    Args:
        encoders: names as `fetch_encoder` reads them; decoder: a hub id or directory.
        grid: patches (h, w) of Pix2Struct and DINOv2; dtype: of all parts, or its name.
        device_map: of the decoder, as transformers takes it (needs accelerate); encoders and
            projectors go where the decoder begins.
        hub: revision, cache_dir.
    Raises: ValueError for arguments not as above, and where something cannot be fetched.
    """
    named = encoders or {}
    if not isinstance(named, dict):
        named = {short_name(name): name for name in named}
    if len(named) < 2 or not decoder:
        raise ValueError(
            "encoders must be 2 or more of different names, and decoder a hub id or directory, got "
            f"{encoders} and {decoder}"
        )
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ValueError('device_map needs accelerate: pip install -e ".[train]"')
    built, specs = {}, {}
    for short, name in named.items():
        built[short], specs[short] = fetch_encoder(name, grid, **hub)
    placed = {} if device_map is None else {"device_map": device_map}
    llm = fetch(
        decoder,
        lambda: AutoModelForCausalLM.from_pretrained(
            decoder, dtype=dtype, use_safetensors=True, **placed, **hub
        ),
    )
    tokenizer = fetch(decoder, lambda: AutoTokenizer.from_pretrained(decoder, **hub))
    config = {
        "encoders": specs,
        "decoder": llm.config.to_dict(),
        "ranks": None,
        "lambda_table": None,
        "budget": None,
        "trained": False,
    }
    config = json.loads(json.dumps(config, default=str))  # as it will be read again
    return config, tokenizer, built, llm


def fetch_encoder(name: str, grid: list[int] | None = None, **hub) -> tuple[nn.Module, list]:
    """A vision encoder with its weights, and [family, options] that build it again without them.

    Args: name: "MODEL/TAG" or "hf-hub:OWNER/NAME" of open_clip, or the hub id or directory of a
        Pix2Struct or DINOv2; grid: (h, w) patches of these two; hub: cache_dir, and for these two
        revision.
    Raises: ValueError where it cannot be fetched, TypeError for a model of another kind.
    """
    if name.startswith("hf-hub:"):
        return fetch_from_hub_by_open_clip(name, hub.get("cache_dir"))
    if name.split("/")[0] in open_clip.list_models():
        return fetch_by_tag_of_open_clip(name, hub.get("cache_dir"))
    config = fetch(name, lambda: AutoConfig.from_pretrained(name, **hub))
    if config.model_type == "pix2struct":
        # Pix2StructVisionModel.from_pretrained would load nothing from a whole model, silently.
        whole = Pix2StructForConditionalGeneration
        load_whole = partial(whole.from_pretrained, name, use_safetensors=True, **hub)
        model = fetch(name, load_whole).encoder
    elif config.model_type == "dinov2":
        model = fetch(name, partial(Dinov2Model.from_pretrained, name, use_safetensors=True, **hub))
    else:
        raise TypeError(
            f"{name} must be a Pix2Struct or a DINOv2, or a model of open_clip, "
            f"got {config.model_type}"
        )
    if grid is not None:
        model.config.meteor_grid = list(grid)
    return model, [config.model_type, model.config.to_diff_dict()]


def fetch_from_hub_by_open_clip(name: str, cache_dir: str | None) -> tuple[nn.Module, list]:
    """ "hf-hub:OWNER/NAME": configuration and weights lie in one repository."""
    repository = name.removeprefix("hf-hub:")
    download = partial(download_pretrained_from_hf, repository, cache_dir=cache_dir)

    def both() -> tuple[str, str]:
        return download(filename="open_clip_config.json"), download()

    config_file, weights_file = fetch(name, both, repository)
    model_cfg = json.loads(Path(config_file).read_text())["model_cfg"]
    return open_clip_tower(name, weights_file, model_cfg, {"cache_dir": cache_dir})


def fetch_by_tag_of_open_clip(name: str, cache_dir: str | None) -> tuple[nn.Module, list]:
    """ "MODEL/TAG": open_clip knows the model's configuration, and where the tag's weights lie."""
    architecture, _, tag = name.partition("/")
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise ValueError(f"open_clip knows no weights {tag!r} of {architecture}, but {tags}")
    repository = "/".join(known.get("hf_hub", name).split("/")[:2])
    download = partial(open_clip.download_pretrained, known, cache_dir=cache_dir)
    weights_file = fetch(name, download, repository)
    quick_gelu = known.get("quick_gelu", False)
    model_cfg = open_clip.get_model_config(architecture) | {"quick_gelu": quick_gelu}
    options = {
        "pretrained": str(weights_file),
        "force_quick_gelu": quick_gelu,
        "force_preprocess_cfg": {key: known[key] for key in ("mean", "std") if key in known},
    }
    return open_clip_tower(architecture, weights_file, model_cfg, options)


def open_clip_tower(
    name: str, weights_file: str, model_cfg: dict, options: dict
) -> tuple[nn.Module, list]:
    if not str(weights_file).endswith(".safetensors"):
        raise ValueError(f"{weights_file} is not a safetensors file, and nothing else is read")
    with hub_or_cache(name):  # of "hf-hub:" it asks once more for what has just come
        visual = open_clip.create_model(name, **options).visual
    preprocess = {key: list(visual.preprocess_cfg[key]) for key in ("mean", "std")}
    keys = ("embed_dim", "vision_cfg", "quick_gelu")
    model_cfg = {key: model_cfg[key] for key in keys if key in model_cfg}
    return visual, ["open_clip", {"model_cfg": model_cfg, "preprocess": preprocess}]


def short_name(name: str) -> str:
    """ "ViT-B-16/openai" -> "ViT-B-16", "facebook/dinov2-small" -> "dinov2-small"; without dots."""
    architecture = name.split("/")[0]
    if architecture not in open_clip.list_models():
        architecture = Path(name).name
    return architecture.replace(".", "-")


# ------------------------------------------------------------------------------------------ the hub


def fetch(name: str, load_it: Callable[[], T], repository: str | None = None) -> T:
    """load_it(), or one sentence that says what could not be fetched and how to bring it here."""
    if Path(name).is_dir():
        return load_it()
    try:
        with hub_or_cache(name):
            return load_it()
    except (ImportError, RuntimeError):  # a missing package or device, out of memory: not the hub
        raise
    except Exception as error:  # offline, unknown name, no such revision: a dozen kinds
        raise ValueError(
            f"{name} could not be fetched from the hub: on a machine with a network run "
            f"`hf download {repository or name}` and copy the cache folder here (HF_HOME, by "
            "default ~/.cache/huggingface), or give a directory that holds it"
        ) from error


@contextlib.contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Within, only the cache is read where the hub does not answer one request.

    Without this, the hub would be tried for minutes, file by file.

    Args: name: what is loaded; a directory asks for nothing.
    """
    before = constants.HF_HUB_OFFLINE
    try:
        if not Path(name).is_dir():
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library huggingface_hub is on
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find_file(model_id: str, file: str, hub: dict) -> str:
    """The file in a directory, or fetched from the hub (its cache where that is warm)."""
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ValueError(
                f"model directory {model_id} has no {file}; one that save_pretrained wrote has"
            )
        return str(folder / file)
    if not HUB_ID.fullmatch(model_id):
        known = ", ".join([*CHECKPOINTS, *PRESETS])
        raise ValueError(f"model {model_id!r} is no preset ({known}), directory or hub id")
    return fetch(model_id, lambda: hf_hub_download(model_id, file, **hub))

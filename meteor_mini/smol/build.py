"""What `smol` is made of: the toy's encoders, new projectors, SmolLM2-135M-Instruct with LoRA.

    load("smol")            the trained model
    build_smol()            the same with random projectors and adapters, as training begins

A checkpoint holds what was trained, 14 MB. SmolLM2 comes from docs/real_parts.md.
"""

import copy
import json
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..baselines import ChannelFusion, channel_fusion
from ..model import Meteor
from ..real_parts import REAL_PARTS
from ..weights import fetch

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKPOINT = Path(__file__).parent / "checkpoint"
ADAPTER, EAGLE = "adapter.safetensors", "eagle.safetensors"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def fetch_smollm2() -> tuple[PreTrainedModel, AutoTokenizer]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer: from `REAL_PARTS`, else from the hub.

    Raises: ValueError where neither has it.
    """
    folder = REAL_PARTS / "smollm2"
    name = str(folder) if folder.is_dir() else HUB_ID
    load_decoder = partial(AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32)
    try:
        return fetch(name, load_decoder), fetch(name, partial(AutoTokenizer.from_pretrained, name))
    except ValueError as error:
        raise ValueError(f"{error}; or install its package: docs/real_parts.md") from error


def build_smol() -> tuple[Meteor, ChannelFusion]:
    """`smol` as training begins, and EAGLE's fusion for the same encoders and Llama.

    Encoders and SmolLM2 are frozen. Gradients: the projectors, EAGLE's among them, and a LoRA on
    every linear layer of SmolLM2, which is nothing at first.
    """
    decoder, tokenizer = fetch_smollm2()
    torch.manual_seed(0)
    decoder = get_peft_model(decoder, LoraConfig(**LORA)).base_model.model
    config = {"decoder": json.loads(json.dumps(decoder.config.to_dict(), default=str))}
    model, eagle = compose(config, decoder, tokenizer)
    for project in (*model.projectors.values(), eagle):
        project.requires_grad_(True)
    return model, eagle


def compose(config: dict, decoder: PreTrainedModel, tokenizer) -> tuple[Meteor, ChannelFusion]:
    """The toy's encoders, frozen, with their ranks; new projectors; a decoder."""
    toy = Meteor.from_pretrained("toy")
    of_encoders = {"encoders": toy.config["encoders"], "ranks": toy.config["ranks"]}
    config = {"lambda_table": None, "budget": None} | config | of_encoders
    model = Meteor(config, tokenizer, dict(toy.encoders.items()), decoder)
    model.encoders.requires_grad_(False).eval()
    return model, channel_fusion(model)


def write_smol(model: Meteor, eagle: ChannelFusion, folder: Path) -> None:
    """What was trained, in half precision: adapter, projectors, EAGLE's fusion; and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = {name: p.half() for name, p in model.decoder.named_parameters() if p.requires_grad}
    save_file(lora, folder / ADAPTER)
    for module, file in ((model.projectors, "projectors.safetensors"), (eagle, EAGLE)):
        save_model(copy.deepcopy(module).half(), str(folder / file))
    (folder / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")


def load_smol(folder: Path = CHECKPOINT) -> Meteor:
    """What `write_smol` wrote, in eval mode, float32; the adapter is merged into SmolLM2's weights.

    Raises: ValueError where `folder` holds no such model, and where SmolLM2 cannot be had.
    """
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} holds no trained smol: docs/smol.md says how to train it")
    decoder, tokenizer = fetch_smollm2()
    adapted = get_peft_model(decoder, LoraConfig(**LORA))
    lora = load_file(folder / ADAPTER)
    _, unexpected = adapted.base_model.model.load_state_dict(lora, strict=False)
    if unexpected:  # peft has renamed its weights: without them the model would be untrained
        raise ValueError(f"{folder / ADAPTER} does not fit this release of peft: {unexpected[0]}")
    decoder = adapted.merge_and_unload()
    config = json.loads((folder / "config.json").read_text())
    model, _ = compose(config, decoder, tokenizer)
    load_model(model.projectors, folder / "projectors.safetensors")
    model.folder = folder  # where eagle.safetensors lies
    return model.float().requires_grad_(False).eval()

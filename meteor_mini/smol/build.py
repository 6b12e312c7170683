"""What `smol` is made of: the toy's encoders, new projectors, SmolLM2-135M-Instruct with LoRA.

    load("smol")            the trained model
    build_smol()            the same with random projectors and adapters, as training begins

A checkpoint holds what was trained, 14 MB. SmolLM2 comes from docs/real_parts.md.
"""

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..baselines import ChannelFusion, channel_fusion
from ..model import Meteor
from ..real_parts import REAL_PARTS
from ..toy import world
from ..weights import fetch

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKPOINT = Path(__file__).parent / "checkpoint"
ADAPTER, EAGLE = "adapter.safetensors", "eagle.safetensors"
RIDGE = 0.01  # of `map_words`, to the mean square of the toy's embeddings
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def fetch_smollm2() -> tuple[PreTrainedModel, AutoTokenizer]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer: from `REAL_PARTS`, else from the hub.

    Raises: ValueError where neither has it.
    """
    folder = REAL_PARTS / "smollm2"
    name = str(folder) if folder.is_dir() else HUB_ID
    decoder = fetch(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
    return decoder, fetch(name, lambda: AutoTokenizer.from_pretrained(name))


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
    start_projectors(model, eagle)
    for project in (*model.projectors.values(), eagle):
        project.requires_grad_(True)
    return model, eagle


@torch.no_grad()
def start_projectors(model: Meteor, eagle: ChannelFusion) -> None:
    """Projectors begin as the toy's, and a linear map from its words to SmolLM2's behind them.

    The toy's projectors turn a patch into the sum of its words' embeddings (toy/train.py, "align").
    Its hidden units are the first of the new ones; the others are random, and add nothing yet. The
    token of EAGLE's cell begins as the sum of what the four encoders say of it, halved, so that it
    is as large as one of theirs.
    """
    toy = Meteor.from_pretrained("toy")
    M = map_words(toy, model)  # (D, D_toy)
    nothing = model.decoder.get_input_embeddings().weight.mean(dim=0)  # of an empty patch
    column = unit = 0  # where EAGLE's channels and hidden units of an encoder begin
    nn.init.zeros_(eagle.project[-1].weight)
    eagle.project[-1].bias[:] = nothing
    for name, project in model.projectors.items():
        first, _, last = project
        toy_first, _, toy_last = toy.projectors[name]
        n, d = toy_first.weight.shape  # hidden units, width of the encoder
        first.weight[:n], first.bias[:n] = toy_first.weight, toy_first.bias
        nn.init.zeros_(last.weight)
        last.weight[:, :n] = M @ toy_last.weight
        last.bias[:] = M @ toy_last.bias

        first_of_eagle, _, last_of_eagle = eagle.project
        rows, columns = slice(unit, unit + n), slice(column, column + d)
        first_of_eagle.weight[rows] = 0
        first_of_eagle.weight[rows, columns] = toy_first.weight
        first_of_eagle.bias[rows] = toy_first.bias
        last_of_eagle.weight[:, rows] = M @ toy_last.weight / 2
        last_of_eagle.bias += (M @ toy_last.bias - nothing) / 2
        column, unit = column + d, unit + n


def map_words(toy: Meteor, model: Meteor) -> Tensor:
    """(D, D_toy) float: takes the toy's embedding of each word to SmolLM2's, by least squares.

    A word of several tokens has their mean. <pad>, which the toy says of an empty patch, becomes
    the mean of all SmolLM2's embeddings.
    """
    of_toy = toy.decoder.get_input_embeddings().weight
    of_smol = model.decoder.get_input_embeddings().weight
    words = sorted({word for slot in world.SLOTS.values() for word in slot})
    source, target = [of_toy[toy.tokenizer.pad_token_id]], [of_smol.mean(dim=0)]
    for word in words:
        source.append(of_toy[toy.tokenizer.convert_tokens_to_ids(word)])
        text = word if word.isdigit() else f" {word}"
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        target.append(of_smol[ids].mean(dim=0))
    A, B = torch.stack(source), torch.stack(target)  # (words, D_toy), (words, D)
    gram = A.T @ A
    ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, A.T @ B).T


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
    adapted.base_model.model.load_state_dict(load_file(folder / ADAPTER), strict=False)
    decoder = adapted.merge_and_unload()
    config = json.loads((folder / "config.json").read_text())
    model, _ = compose(config, decoder, tokenizer)
    load_model(model.projectors, folder / "projectors.safetensors")
    model.folder = folder  # where eagle.safetensors lies
    return model.float().requires_grad_(False).eval()

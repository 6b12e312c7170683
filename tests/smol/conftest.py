"""`smol` on a tiny random Llama with the toy's words, in place of SmolLM2."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meteor_mini.smol import build
from meteor_mini.toy.parts import build_tokenizer
from meteor_mini.toy.questions import WORDS


@pytest.fixture(autouse=True)
def tiny_llama(monkeypatch):
    tokenizer = build_tokenizer(WORDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,  # wider than the four hidden layers of the toy's projectors together
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )

    def fetch():
        torch.manual_seed(1)
        return LlamaForCausalLM(config), tokenizer

    monkeypatch.setattr(build, "fetch_smollm2", fetch)

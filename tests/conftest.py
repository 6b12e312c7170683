"""Tests run offline, from a checkout without installing."""

import os
import sys
from pathlib import Path

import pytest

# Before huggingface_hub is imported: no test may reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: as many processes as cores run tests, each on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

LAMBDA_TABLE = {
    "K": [8, 80, 576],
    "lam": [0, 5, 20, 200],  # about what `calibrate` measures on such a model
    "average": [[2, 7, 8, 8], [11, 29, 80, 80], [73, 91, 156, 576]],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A directory with an untrained model of the toy model's parts."""
    import torch

    from meteor_mini import Meteor
    from meteor_mini.toy import questions
    from meteor_mini.toy.parts import DECODER, ENCODERS, build_tokenizer

    tokenizer = build_tokenizer(questions.WORDS)
    config = {
        "encoders": {name: [name, options] for name, options in ENCODERS.items()},
        "decoder": DECODER | {"vocab_size": len(tokenizer)},
        "ranks": [[60, 50, 70, 80]] * 3,
        "lambda_table": LAMBDA_TABLE,
        "budget": {"stage1": 168, "stage2": 80, "stage3": 34},
    }
    torch.manual_seed(0)
    model = Meteor(config, tokenizer)
    path = tmp_path_factory.mktemp("models") / "untrained"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def untrained(folder):
    from meteor_mini import Meteor

    return Meteor.from_pretrained(folder)


@pytest.fixture(scope="module")
def one_word(untrained):
    """Answers of one token: an untrained model does not stop."""
    generate = type(untrained).generate

    def generate_one(model, *args, **options):
        return generate(model, *args, **options | {"max_new_tokens": 1})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(untrained), "generate", generate_one)
        yield

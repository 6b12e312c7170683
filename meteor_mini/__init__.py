"""meteor_mini: METEOR (ICCV 2025), three-stage visual token pruning for VLMs with several encoders.

The method is in three files at the top level, each of which stands alone: `stage1_encode`,
`stage2_fuse` and `stage3_decode`. `model.py` composes them. `baselines.py`, `evaluate.py`,
`tables.py`, `findings.py` and `bench.py` compare and measure; `toy/` is the embedded model and its
world.
"""

import stage1_encode
import stage2_fuse
import stage3_decode

from .budgets import Budget, budget_for, calibrate
from .model import Answer, Encoded, Meteor
from .weights import CHECKPOINTS

__all__ = [
    "CHECKPOINTS",
    "Answer",
    "Budget",
    "Encoded",
    "Meteor",
    "budget_for",
    "calibrate",
    "load",
    "stage1_encode",
    "stage2_fuse",
    "stage3_decode",
]
__version__ = "0.1.0"


def load(name: str = "toy") -> Meteor:
    """A trained model by name, directory or hub id: `Meteor.from_pretrained(name)`."""
    return Meteor.from_pretrained(name)

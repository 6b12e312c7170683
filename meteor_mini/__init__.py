"""meteor_mini: METEOR (ICCV 2025), three-stage visual token pruning for VLMs with several encoders.

The method is in three files at the top level, each of which stands alone: `stage1_encode`,
`stage2_fuse` and `stage3_decode`. Here:

    use       model.py composes the stages (budgets.py, pictures.py, weights.py); vlm.py: stage 3
              around other people's models; finetune.py: training on your dialogues
    data      toy/ draws the pictures and asks the questions that all is measured on; it also has
              the demo's model and its training
    measure   baselines.py: rivals; methods.py, evaluate.py: a method asked and compared; tables.py,
              findings.py: the paper's; smol/: a model with a pretrained Llama, and the table of
              methods on it; page.py, plots.py: results/; photographs.py: DINOv2 on photographs;
              bench.py, flops.py: what pruning costs and saves
    commands  cli.py, demo.py
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

"""meteor_mini: METEOR (ICCV 2025), three-stage visual token pruning for VLMs with several vision encoders.

The method is in three files at the top level, each of which stands alone: `stage1_encode`, `stage2_fuse` and
`stage3_decode`; here they are composed, trained, measured and shown.
"""

import stage1_encode
import stage2_fuse
import stage3_decode

from .calibration import calibrate
from .model import CHECKPOINTS, Answer, Budget, Encoded, Meteor

__all__ = [
    "CHECKPOINTS",
    "Answer",
    "Budget",
    "Encoded",
    "Meteor",
    "calibrate",
    "load",
    "stage1_encode",
    "stage2_fuse",
    "stage3_decode",
]
__version__ = "0.1.0"


def load(name: str = "glyph") -> Meteor:
    """A trained model by name, directory or hub id: `Meteor.from_pretrained(name)`."""
    return Meteor.from_pretrained(name)

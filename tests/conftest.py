"""Tests run offline, from a checkout without installing, on a fixed number of threads."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach a network
sys.path.insert(0, str(Path(__file__).parents[1]))

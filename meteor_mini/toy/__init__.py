"""The embedded model: the world that it lives in, how it was trained, its weights."""

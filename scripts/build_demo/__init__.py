"""Rebuilds the embedded default: the checkpoints and prompts in ``src/fourscore/demo``."""

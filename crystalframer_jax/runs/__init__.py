"""The run directory and its checkpoints."""

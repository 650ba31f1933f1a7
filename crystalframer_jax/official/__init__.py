"""The format of the official PyTorch project: hyperparameters, state dicts, checkpoint files."""

"""Training: loss, optimizer, weight averaging, checkpoints, the loop."""

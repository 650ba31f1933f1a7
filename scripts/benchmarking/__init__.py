"""Measurements of the input pipeline, of training steps, of predictions and of the attention alone."""

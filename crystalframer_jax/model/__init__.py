"""The model: bases, frames, lattice sums, attention, encoder, regressor. Pure functions and Flax modules."""

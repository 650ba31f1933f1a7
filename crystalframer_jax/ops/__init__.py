"""Lattice sums, frames and what they are made of: pure functions of arrays, the reference for the kernels."""

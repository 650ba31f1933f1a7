"""Batches: crystals with neighbor rows in one table, packed into padded arrays of few shapes."""

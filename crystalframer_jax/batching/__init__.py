"""Batches: crystals with neighbour rows in one table, packed into padded arrays of few shapes."""

"""CrystalFramer in JAX: property prediction for crystals with rotation-invariant dynamic frames."""

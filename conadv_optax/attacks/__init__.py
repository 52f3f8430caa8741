"""How inputs are perturbed."""

"""The step: wrapped, plain, and what it is made of."""

"""A training run: its stages, its loop, and what watches over it."""

"""What a run watches, and what it decides by that."""

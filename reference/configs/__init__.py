"""One run a file: `--config=reference/configs/NAME.py`."""

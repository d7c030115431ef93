"""Starts the ranks of a training run and ends them together. `python -m launch` is `__main__.py`."""

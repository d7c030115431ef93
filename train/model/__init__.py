"""The model, told as a list of layers: embedding, N equal layers, head. `build.py` is the place to start."""

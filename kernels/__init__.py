"""Fused operations of a GLM layer: one file an operation, the PyTorch reference first, the Triton kernel beside it.

Start at `kernels.resolve.resolve`, which picks an implementation per operation. Importing this package costs nothing:
transformers looks for a distribution called `kernels` and may import this one by mistake.
"""

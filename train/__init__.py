"""The trainer: config schema, model, parallel layers, engine, loop, checkpoints, evaluation, reports."""

import importlib.metadata
import importlib.util
import warnings

import kernels

if importlib.util.find_spec("kernels.resolve") is None:
    raise ImportError(
        f"another package called `kernels` ({kernels.__file__}) hides this project's own: run from the checkout with "
        "`python -m train`, or uninstall that package"
    )
try:
    _other = importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    warnings.warn(
        f"the package `kernels` {_other} is installed beside this project's own of that name; transformers will find "
        "this one in its place. Keep the two in separate environments.",
        stacklevel=2,
    )

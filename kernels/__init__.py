"""Triton kernels and their launchers. They know nothing of autograd; `mae_fast.ops` calls them.

The folder is importable as `mae_fast.kernels` only: the bare name belongs to another package.
"""

if __name__ != "mae_fast.kernels":
    raise ImportError(f"import mae_fast.kernels, not {__name__}", name=__name__)

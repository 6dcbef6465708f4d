"""What the tests of the kernels have in common."""

import interpreter  # noqa: F401  rounds, multiplies and counts as a GPU does

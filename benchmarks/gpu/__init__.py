"""Everything that a GPU has to tell, in one command: `make gpu`. Start reading at __main__.py.

Needs torch, triton and numpy, and nothing installed: it runs from a bare checkout, without pip and
without a network. pytest, nvidia-smi, compute-sanitizer and attention libraries are used where
they are.
"""

from pathlib import Path

import mae_fast
import mae_fast.bench

ROOT = Path(__file__).resolve().parents[2]
# Where nothing is installed, mae_fast.kernels is the folder kernels/ of the checkout, and
# mae_fast.bench.baselines benchmarks/baselines/, as setup.py's package_dir says; where mae_fast is
# installed, this checkout's go before the installed.
mae_fast.__path__.insert(1, str(ROOT))
mae_fast.bench.__path__.insert(1, str(ROOT / "benchmarks"))

"""`python -m mae_fast`: the mae-fast command, for launchers such as `torchrun -m mae_fast`."""

import sys

from mae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The state of the GPU while something is timed."""

import shutil
import subprocess
from typing import Any

SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def smi() -> dict[str, Any]:
    """Clocks, power and temperature as nvidia-smi tells them; {} where it is not."""
    command = shutil.which("nvidia-smi")
    if not command:
        return {}
    query = [command, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"nvidia-smi": str(e)}
    if run.returncode:
        return {"nvidia-smi": (run.stdout + run.stderr).strip()[:200]}
    return dict(zip(SMI_FIELDS, (x.strip() for x in run.stdout.split(",")), strict=False))

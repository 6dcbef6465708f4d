"""How everything is drawn, by matplotlib, in colours that read on light and dark."""

import io
from pathlib import Path
from typing import Any

from mae_fast.errors import ConfigError
from mae_fast.files import write

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
GRAY = "#808080"


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """(a figure, its panels [rows, columns]; of one the panel itself). ConfigError where there is
    no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(f"nothing is drawn: {e} (pip install matplotlib)") from e
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)  # it draws on what `made.canvas` then is
    return made, made.subplots(rows, columns, squeeze=rows * columns == 1)


def finish(axis: Any, fontsize: float = 8, **settings: Any) -> None:
    """Labels, title and limits, a grid and a legend."""
    axis.set(**settings)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=fontsize)


def write_figure(path: str | Path, figure: Any, dpi: int) -> None:
    """Write a figure in the format that the file's name ends in."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=Path(path).suffix[1:] or "png", dpi=dpi)
    except ValueError as e:  # no such format
        raise ConfigError(f"{path}: {e}") from e
    write(path, content.getvalue())

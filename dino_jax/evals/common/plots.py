"""Figures by matplotlib, an optional dependency that is imported when needed: `pip install 'dino_jax[plots]'`."""

from typing import TYPE_CHECKING

from dino_jax.errors import missing_extras

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure for `savefig`, with its size in inches. It needs no display and no pyplot state.

    Raises UserError if matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_matplotlib() -> None:
    """Raises UserError if matplotlib is missing. Call it before long work that ends with a figure."""
    with missing_extras():
        import matplotlib  # noqa: F401

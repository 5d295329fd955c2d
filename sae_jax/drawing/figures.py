"""Figures as PNG and SVG files."""

from collections.abc import Mapping
import io

from etils import epath
import matplotlib
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from sae_jax.storage import files

COLOURS = (
  '#4669a8', '#c26a2e', '#4a8f5a', '#8f4a8a', '#8a7a32', '#3a8f95', '#a84655',
  '#6b7280',
)  # fmt: skip
GREY = '#8a909c'


def png(figure: Figure) -> bytes:
  """A figure as a PNG file."""
  backend_agg.FigureCanvasAgg(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=120, bbox_inches='tight')
  return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
  """A figure as an SVG file, the same bytes each time.

  Args:
    figure: the figure.
    name: one of its own among those on a page: its marks are named by it.
  """
  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'none'}):
    figure.savefig(
      buffer, format='svg', bbox_inches='tight', metadata={'Date': None}
    )
  return buffer.getvalue()


def save(folder: epath.PathLike, figures: Mapping[str, Figure]) -> None:
  """Writes each figure as NAME.png and NAME.svg."""
  folder = epath.Path(folder)
  for name, figure in figures.items():
    files.write_bytes(folder / f'{name}.png', png(figure))
    files.write_text(folder / f'{name}.svg', svg(figure, name))

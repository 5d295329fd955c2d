"""Figures of evaluations: what has curves, as lines with their intervals."""

from typing import Any

from matplotlib.figure import Figure
import matplotlib.ticker
import numpy as np

from sae_jax.drawing.figures import COLOURS, GREY


def of_evaluation(name: str, record: dict[str, Any]) -> dict[str, Figure]:
  """The figures of an evaluation's record by their names."""
  return {
    f'{name}_{curve}': curve_figure(entry)
    for curve, entry in record.get('curves', {}).items()
  }


def curve_figure(entry: dict[str, Any]) -> Figure:
  """A statistic by its x, a line for each of what is scored."""
  figure = Figure(figsize=(6.5, 3.2))
  axes = figure.subplots()
  x = np.array(entry['x'], float)
  for place, (who, of) in enumerate(entry['of'].items()):
    colour = COLOURS[place] if place < len(COLOURS) else GREY
    value, low, high = (_numbers(of[end]) for end in ('value', 'low', 'high'))
    there = np.isfinite(value)
    if not there.any():
      continue
    axes.plot(
      x[there], value[there], 'o-' if place == 0 else '.-',
      color=colour, markersize=4, linewidth=1.6 if place == 0 else 1,
      label=who,
    )  # fmt: skip
    ends = there & np.isfinite(low) & np.isfinite(high)
    axes.fill_between(
      x[ends], low[ends], high[ends], color=colour, alpha=0.15, linewidth=0
    )
  if len(x) > 1 and x.min() > 0 and x.max() / x.min() >= 8:
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
  unit = f', {entry["unit"]}' if entry['unit'] else ''
  axes.set_xlabel(entry['points'])
  axes.set_ylabel(f'{entry["title"]}{unit}')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=8)
  return figure


def _numbers(of: list[float | None]) -> np.ndarray:
  return np.array([np.nan if v is None else v for v in of], float)

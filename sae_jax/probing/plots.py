"""Figures of a report."""

import itertools
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from sae_jax.autoencoder import metrics

# For controls; where there are more, some share one.
_MARKERS = 'x+v^sD<>'


def _number(value: float | None) -> float:
  """A number of a report, where null stands for none."""
  return np.nan if value is None else value


def density(report: dict[str, Any]) -> Figure:
  """Histogram of log10 density; silent latents are named, not drawn."""
  counts, silent = report['density']['latents'], report['density']['silent']
  figure = Figure(figsize=(6, 3.2))
  axes = figure.subplots()
  edges = metrics.DENSITY_EDGES
  axes.bar(edges[:-1], counts, np.diff(edges), align='edge', color='#4669a8')
  axes.set_xlabel('log10 of the share of test tokens a latent fires on')
  axes.set_ylabel('latents')
  axes.set_title(f'{report["n_latents"]:,} latents, {silent:,} silent')
  return figure


def reconstruction(report: dict[str, Any]) -> Figure:
  """FVU of the autoencoder beside its two controls."""
  pca = f'PCA, {report["pca_components"]} components'
  names = ['autoencoder', pca, 'untrained']
  values = [
    _number(report[name]) for name in ('fvu', 'fvu_pca', 'fvu_untrained')
  ]
  figure = Figure(figsize=(6, 2.2))
  axes = figure.subplots()
  bars = axes.barh(names, values, color=['#4669a8', '#b9bec8', '#b9bec8'])
  axes.bar_label(bars, fmt='%.3f', padding=3)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.15 * max(filter(np.isfinite, values), default=1))
  axes.set_xlabel('fraction of variance unexplained, test rows')
  return figure


def probe_aucs(report: dict[str, Any]) -> Figure:
  """Held-out AUC of each task's best latent, 95 % interval, and controls."""
  tasks = list(report['probes'])
  controls = itertools.chain.from_iterable(
    report['probes'][task]['controls'] for task in tasks
  )
  markers = dict(zip(dict.fromkeys(controls), itertools.cycle(_MARKERS)))
  unnamed = set(markers)
  figure = Figure(figsize=(6, 1 + 0.6 * len(tasks)))
  axes = figure.subplots()
  for place, task in enumerate(tasks):
    scores = report['probes'][task]
    score = scores['latent']
    auc, low, high = (
      _number(score[f'test_auc{end}']) for end in ('', '_low', '_high')
    )
    spread = [[auc - low], [high - auc]]
    label = 'best latent' if place == 0 else None
    axes.errorbar(
      auc, place, xerr=spread, fmt='o', color='#4669a8',
      capsize=3, label=label,
    )  # fmt: skip
    for name, control in scores['controls'].items():
      axes.plot(
        _number(control['test_auc']), place, markers[name], color='#8a909c',
        label=name if name in unnamed else None,
      )  # fmt: skip
      unnamed.discard(name)
  axes.axvline(0.5, color='#b9bec8', linewidth=0.8)
  axes.set_yticks(range(len(tasks)), tasks)
  axes.invert_yaxis()
  axes.set_xlabel('held-out AUC')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  return figure


def of_report(report: dict[str, Any]) -> dict[str, Figure]:
  """density, reconstruction and, where there are tasks, probes.

  Args:
    report: from `report.probe`.
  """
  figures = {
    'density': density(report),
    'reconstruction': reconstruction(report),
  }
  if report['probes']:
    figures['probes'] = probe_aucs(report)
  return figures

"""Figures of fits."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
import matplotlib.ticker
import numpy as np

from sae_jax.drawing.figures import COLOURS, GREY
from sae_jax.scaling import cells as cells_lib
from sae_jax.scaling import forms, frontier
from sae_jax.scaling.record import PlaceFits
from sae_jax.scaling.study import Study


def of_places(places: Sequence[PlaceFits], metric: str) -> dict[str, Figure]:
  """All figures by name, those of later places with a number."""
  figures = {}
  for number, fits in enumerate(places, 1):
    end = f'_{number}' if len(places) > 1 else ''
    for study in fits.studies:
      if study.law is None:
        continue
      name = study.question.name
      if name == 'surface':
        figures[f'surface{end}'] = surface(study, metric)
        figures[f'floor{end}'] = floor(study, metric)
      elif study.question.form is forms.COMPUTE:
        d_model = fits.cells[0].d_model
        figures[f'{name}{end}'] = compute(study, d_model, metric)
      elif study.question.form is forms.POWER:
        figures[f'{name}{end}'] = power(study)
  for k in sorted({cell.k for fits in places for cell in fits.cells}):
    studies = {
      cells_lib.place_name(fits.place): fits.study(f'width_k{k}')
      for fits in places
    }
    there = {name: study for name, study in studies.items() if study}
    if len(there) > 1:
      figures[f'places_k{k}'] = across(there, k, metric)
  return figures


def _logarithmic(axes, label: str, y_label: str) -> None:
  axes.set_xscale('log', base=2)
  axes.set_yscale('log')
  axes.set_xlabel(label)
  axes.set_ylabel(y_label)
  # Ticks within a decade, which losses rarely leave.
  axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter('%.3g'))
  axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%.3g'))
  axes.tick_params(axis='y', which='minor', labelsize=8)


def surface(study: Study, metric: str) -> Figure:
  """Loss by n at each k; beside it the paper's surface at the same n and k."""
  variables, y_R = study.question.variables, study.question.y_R
  figure = Figure(figsize=(10, 4))
  ours, paper = figure.subplots(1, 2)
  predictions = [f for f in study.findings if f.kind == 'prediction']
  sizes = [int(f.name.split('_')[1][1:]) for f in predictions]
  n_line = np.geomspace(
    variables['n'].min(), max([variables['n'].max(), *sizes]), 80
  )
  for place, k in enumerate(sorted(set(variables['k']))):
    colour = COLOURS[place % len(COLOURS)]
    at = variables['k'] == k
    ours.plot(variables['n'][at], y_R[at], 'o', color=colour, markersize=4)
    measured = n_line <= variables['n'].max()
    line = study.law.value(n=n_line, k=k)
    ours.plot(
      n_line[measured], line[measured], color=colour, label=f'k {k:.0f}'
    )
    ours.plot(n_line, line, ':', color=colour)
    for finding, size in zip(predictions, sizes, strict=True):
      if finding.name.endswith(f'_k{k:.0f}') and np.isfinite(finding.high):
        low = max(finding.low, 0.01 * finding.estimate)
        spread = [[finding.estimate - low], [finding.high - finding.estimate]]
        ours.errorbar(
          size * 1.04**place, finding.estimate, yerr=spread, fmt='none',
          color=colour, capsize=3,
        )  # fmt: skip
    theirs = forms.value(forms.SURFACE, forms.PAPER.coefficients, n=n_line, k=k)
    paper.plot(n_line, theirs, '--', color=colour)
  _logarithmic(ours, 'latents, n', f'{metric}, held-out tokens')
  _logarithmic(paper, 'latents, n', 'normalised MSE of GPT-4 activations')
  ours.set_title('Measured (points), fitted (lines), predicted (bars)')
  paper.set_title("Gao et al.'s surface: another subject")
  ours.legend(fontsize=8)
  return figure


def floor(study: Study, metric: str) -> Figure:
  """The profile of the first floor: which values fit nearly as well."""
  finding = next(f for f in study.findings if f.kind == 'floor')
  value_V, excess_V, least = study.floor_curve
  # The root of the excess is nearly a line on each side of the best fit.
  line_V = np.linspace(value_V.min(), value_V.max(), 200)
  root_V = np.sqrt(excess_V) * np.sign(value_V - finding.estimate)
  curve_V = np.interp(line_V, value_V, root_V) ** 2
  figure = Figure(figsize=(6, 3.4))
  axes = figure.subplots()
  axes.plot(line_V, curve_V, color=COLOURS[0])
  axes.plot(value_V, excess_V, 'o', color=COLOURS[0], markersize=3)
  axes.axhline(1, color=GREY, linewidth=0.8)
  axes.axvline(least, color=COLOURS[1], linewidth=0.8, linestyle='--')
  axes.annotate(
    'least loss measured', (least, 0.98), xycoords=('data', 'axes fraction'),
    rotation=90, ha='right', va='top', fontsize=8, color=COLOURS[1],
  )  # fmt: skip
  axes.set_xlim(0, 1.1 * least)
  axes.set_ylim(0, 4)
  axes.set_xlabel(f'{finding.words}, {metric}')
  axes.set_ylabel('worse than the best fit,\nin units of what noise explains')
  state = 'not identified' if finding.refusal else 'identified'
  axes.set_title(f'The interval is where the curve is below 1: {state}')
  return figure


def compute(study: Study, d_model: int, metric: str) -> Figure:
  """Loss by FLOPs of each n, and the compute-optimal frontier."""
  variables, y_R = study.question.variables, study.question.y_R
  flops_R = 6.0 * variables['n'] * variables['tokens'] * d_model
  figure = Figure(figsize=(6, 4))
  axes = figure.subplots()
  for place, n in enumerate(sorted(set(variables['n']))):
    at = variables['n'] == n
    colour = COLOURS[place % len(COLOURS)]
    axes.plot(flops_R[at], y_R[at], 'o', color=colour, markersize=4)
    line = np.geomspace(flops_R[at].min(), flops_R[at].max(), 30)
    tokens = line / (6.0 * n * d_model)
    axes.plot(
      line, study.law.value(n=n, tokens=tokens), color=colour,
      label=f'n {n:,.0f}',
    )  # fmt: skip
  line = np.geomspace(flops_R.min(), 8 * flops_R.max(), 60)
  best = [frontier.optimum(study.law, flops, d_model) for flops in line]
  if all(best):
    axes.plot(line, [b.loss for b in best], '--', color='black', label='best n')
  _logarithmic(axes, '', f'{metric}, held-out tokens')
  axes.set_xscale('log', base=10)
  axes.set_xlabel('FLOPs, dense-equivalent: 6 n d T')
  axes.set_title(f'Fixed FLOPs at k {study.question.k}')
  axes.legend(fontsize=8)
  return figure


def power(study: Study) -> Figure:
  """A power law of n, its points, and its exponent with interval."""
  n_R, y_R = study.question.variables['n'], study.question.y_R
  (finding,) = study.findings
  figure = Figure(figsize=(6, 3.4))
  axes = figure.subplots()
  axes.plot(n_R, y_R, 'o', color=COLOURS[0], markersize=4)
  line = np.geomspace(n_R.min(), n_R.max(), 20)
  axes.plot(line, study.law.value(n=line), color=COLOURS[0])
  is_rate = study.question.name == 'rate'
  _logarithmic(
    axes,
    'latents, n',
    'best learning rate' if is_rate else 'tokens to convergence',
  )
  value = 'not identified' if finding.refusal else f'{finding.estimate:.3f}'
  axes.set_title(
    f'exponent {value} ({finding.low:.3f} to {finding.high:.3f})',
    fontsize=10,
  )
  return figure


def across(studies: Mapping[str, Study], k: int, metric: str) -> Figure:
  """L(N) of several places at one k."""
  figure = Figure(figsize=(6, 4))
  axes = figure.subplots()
  for place, (name, study) in enumerate(studies.items()):
    colour = COLOURS[place % len(COLOURS)]
    n_R = study.question.variables['n']
    axes.plot(n_R, study.question.y_R, 'o', color=colour, markersize=4)
    line = np.geomspace(n_R.min(), n_R.max(), 40)
    axes.plot(line, study.law.value(n=line), color=colour, label=name)
  _logarithmic(axes, 'latents, n', f'{metric}, held-out tokens')
  axes.set_title(f'Several subjects, sites or layers at k {k}')
  axes.legend(fontsize=8)
  return figure

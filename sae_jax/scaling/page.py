"""The report: one HTML file that needs no other and no network."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sae_jax.drawing import page
from sae_jax.scaling import cells as cells_lib
from sae_jax.scaling import forms, words
from sae_jax.scaling.config import FitConfig
from sae_jax.scaling.findings import number
from sae_jax.scaling.record import PlaceFits
from sae_jax.scaling.study import Study

_METRICS = {
  'nmse': 'squared error over the squared size of the activations',
  'fvu': 'fraction of variance unexplained: squared error over the squared '
  'distance of the activations from their mean',
}


def html(
  places: Sequence[PlaceFits],
  figures: Mapping[str, Figure],
  metric: str,
  config: FitConfig,
) -> str:
  """The report of fits.

  Args:
    places: the fits.
    figures: from `plots.of_places`.
    metric: what the losses are.
    config: what the fit was told.
  """
  parts = [_summary(places, metric)]
  for place, fits in enumerate(places, 1):
    end = f'_{place}' if len(places) > 1 else ''
    parts.append(f'<h2>{page.text(cells_lib.place_name(fits.place))}</h2>')
    parts += [_study(study, figures, end) for study in fits.studies]
    parts += _advice(fits)
  for name, figure in figures.items():
    if name.startswith('places_'):
      parts.append('<h2>Several subjects, sites or layers</h2>')
      parts.append(page.picture(name, figure))
  parts += [_definitions(metric, config), _cells(places)]
  return page.document('Scaling laws', parts)


def _summary(places, metric) -> str:
  studies = [study for fits in places for study in fits.studies]
  findings = [item for study in studies for item in study.findings]
  still_open = sum(bool(item.refusal) for item in findings)
  runs = sum(len(fits.cells) for fits in places)
  unfitted = sum(study.law is None for study in studies)
  return (
    f'<p>{runs} runs; {len(studies) - unfitted} laws were fitted, '
    f'{unfitted} were not. Of {len(findings)} figures, {still_open} are not '
    'identified by these cells: they are marked, with the cells that would '
    f'identify them. The loss is {page.text(metric)}: '
    f'{page.text(_METRICS[metric])}, on held-out tokens.</p>'
  )


def _study(study: Study, figures, end: str) -> str:
  question = study.question
  parts = [
    f'<h3>{page.text(question.title)}</h3>',
    f'<p><code>{page.text(question.form.text)}</code>, '
    f'{len(question.cell_R)} runs of {len(set(question.cell_R))} cells.</p>',
  ]
  if study.law is None:
    parts.append(f'<p class="open">Not fitted: {page.text(study.refusal)}.</p>')
    return '\n'.join(parts)
  for name in (question.name, 'floor'):
    is_own = name == question.name or question.name == 'surface'
    if is_own and f'{name}{end}' in figures:
      parts.append(page.picture(f'{name}{end}', figures[f'{name}{end}']))
  parts += [_coefficients(study), _noise(study), _findings(study)]
  parts += [f'<p>With the {page.text(words.of_holdout(x))}.</p>'
            for x in study.holdouts]  # fmt: skip
  return '\n'.join(parts)


def _coefficients(study: Study) -> str:
  names = [c.name for c in study.question.form.coefficients]
  rows = [
    ['these cells', *(f'{value:.4f}' for value in study.law.coefficients_P)]
  ]
  if study.question.form is forms.SURFACE:
    rows.append(
      ['Gao et al. 2024', *(f'{v:.3f}' for v in forms.PAPER.coefficients)]
    )
  if len(study.question.form.terms) == 1:
    return page.table(['', *names], rows)
  note = (
    '<p>Single coefficients of a sum trade off against each other; the table '
    'of figures below has what they say together, with intervals.'
  )
  if len(rows) > 1:
    note += f' The second row: {page.text(forms.PAPER.domain)}.'
  return page.table(['', *names], rows) + note + '</p>'


def _noise(study: Study) -> str:
  noise, lack = study.noise, study.misfit
  text = (
    f'Noise of a run around the law: {study.law.scale:.2%}, '
    f'{study.law.freedom} degrees of freedom. '
  )
  if noise.cells:
    text += (
      f'Between seeds of {noise.cells} cells: {noise.scale:.2%}, '
      f'{noise.freedom} degrees of freedom. '
    )
  else:
    text += 'No cell has two seeds: whether the form fits cannot be told. '
  if lack.p < 0.05:
    text += (
      f'The form misses more than seeds explain (p {lack.p:.3g}): intervals '
      'rest on what it misses, cells counting once.'
    )
  return f'<p>{page.text(text)}</p>'


def _findings(study: Study) -> str:
  rows = []
  for item in study.findings:
    mark = '!' if item.refusal else ''
    plan = study.further.get(item.name)
    remedy = f' And {words.of_further(plan)}.' if plan else ''
    verdict = f'{item.refusal}.{remedy}' if item.refusal else 'identified'
    rows.append([
      item.words,
      f'{mark}{"" if item.refusal else number(item.estimate)}',
      f'{number(item.low)} to {number(item.high)}',
      f'{number(item.drawn_low)} to {number(item.drawn_high)}',
      f'{mark}{verdict}',
    ])  # fmt: skip
  return page.table(
    ['figure', 'value', 'interval', 'bootstrap', 'identified?'], rows
  )


def _advice(fits: PlaceFits) -> list[str]:
  if not fits.advice:
    return []
  flops = max(row.flops for row in fits.advice)
  parts = [f'<h3>Advice for {flops:.3g} FLOPs, dense-equivalent</h3>']
  parts += [f'<p>{page.text(words.of_advice(row))}.</p>' for row in fits.advice]
  if fits.spent_share is not None:
    low, high = fits.spent_share
    parts.append(
      f'<p>The cells spent {low:.2f} to {high:.2f} times their dense-equivalent'
      ' FLOPs.</p>'
    )
  return parts


def _definitions(metric: str, config: FitConfig) -> str:
  entries = {
    'interval': f'{config.confidence:.0%} by profile likelihood: values with '
    'which the law, its other coefficients fitted anew, is worse by no more '
    "than the noise explains (Fisher's distribution, so that few cells make "
    'it wide).',
    'bootstrap': f'percentiles over {config.draws} tables drawn from this one, '
    'cells with replacement and for each its seeds. It shows what rests on '
    'single cells; on small grids it is too narrow or far too wide, and '
    'decides nothing.',
    'identified': 'an irreducible loss whose interval holds neither 0 nor the '
    'least loss measured at its k; an exponent whose interval does not hold '
    f'0; and no interval wider than {config.widest:.0%} of the value.',
    'irreducible loss': 'what the law leaves where n grows without bound; '
    'nothing that was measured.',
    'expected to be': 'by the derivatives of the law at its best fit, with the '
    'cheapest cells that make the interval narrow enough, or with 40 runs; at '
    'most 4 seeds of a cell.',
    'dense-equivalent FLOPs': '6 n d T: what a dense trainer spends on T '
    'tokens. A sparse one spends less.',
    'left out': 'the law is fitted without the largest n or k and predicts it.',
    metric: _METRICS[metric],
  }
  items = ''.join(
    f'<dt>{page.text(k)}</dt><dd>{page.text(v)}</dd>'
    for k, v in entries.items()
  )
  return f'<h2>Definitions</h2><dl>{items}</dl>'


def _cells(places: Sequence[PlaceFits]) -> str:
  cells = [cell for fits in places for cell in fits.cells]
  rows = [
    [
      f'{c.n_latents:,}', str(c.k), str(c.seed), f'{c.tokens:,}', c.stop,
      f'{c.loss:.5f}', f'{c.learning_rate:.3g}', f'{c.learning_rate_factor:g}',
      f'{c.dense_flops:.3g}', f'{c.spent_flops:.3g}', f'{c.dead_share:.1%}',
      cells_lib.place_name(c.place),
    ]
    for c in cells
  ]  # fmt: skip
  head = (
    'n', 'k', 'seed', 'tokens', 'stopped by', 'loss', 'learning rate',
    'over the rule', 'dense FLOPs', 'spent', 'dead', 'of',
  )  # fmt: skip
  return f'<h2>Cells</h2>{page.table(head, rows)}'

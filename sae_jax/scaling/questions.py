"""The laws that a table of cells is asked for."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sae_jax.scaling import forms, frontier, profile, rates, study
from sae_jax.scaling.cells import Cell
from sae_jax.scaling.config import FitConfig
from sae_jax.scaling.findings import Asked
from sae_jax.scaling.study import Question


def of_rule(cells: Sequence[Cell]) -> list[Cell]:
  """Cells at the learning rate of the rule, factor 1."""
  return [cell for cell in cells if abs(cell.learning_rate_factor - 1) < 1e-9]


def of_losses(cells: Sequence[Cell]) -> tuple[list[Cell], str]:
  """Cells whose losses are comparable across n, and how they were stopped.

  Those that ran to convergence if there are any, otherwise those with the
  commonest number of tokens, of equally common ones the largest.
  """
  converged = [cell for cell in cells if cell.stop == 'convergence']
  if converged:
    return converged, 'trained to convergence'
  counts = Counter(cell.tokens for cell in cells)
  if not counts:
    return [], ''
  tokens = max(counts, key=lambda number: (counts[number], number))
  chosen = [cell for cell in cells if cell.tokens == tokens]
  return chosen, f'trained on {tokens:,} tokens'


def all_of(cells: Sequence[Cell], config: FitConfig) -> list[Question]:
  """The questions that cells of one place can be asked, and those they can't.

  A question whose cells are too few is there too: its study says so.
  """
  ruled = of_rule(cells)
  losses, stopped = of_losses(ruled)
  questions = []
  ks = sorted({cell.k for cell in losses})
  if losses:
    questions.append(_surface(losses, stopped, ks, config))
  for k in ks:
    at_k = [cell for cell in losses if cell.k == k]
    questions.append(_width(at_k, stopped, k, config))
  for k in sorted({cell.k for cell in ruled}):
    fixed = [c for c in ruled if c.k == k and c.stop == 'tokens']
    if len({cell.tokens for cell in fixed}) > 1:
      questions.append(_compute(fixed, k))
  for k in sorted({cell.k for cell in ruled}):
    converged = [c for c in ruled if c.k == k and c.stop == 'convergence']
    if len({cell.n_latents for cell in converged}) > 1:
      questions.append(_convergence(converged, k))
  best = [entry for entry in rates.best_rates(cells) if entry.is_inside]
  if len({entry.n_latents for entry in best}) > 1:
    questions.append(_rate(best))
  return questions


def predicted(cells: Sequence[Cell], config: FitConfig) -> tuple[int, ...]:
  """Numbers of latents whose loss is predicted."""
  largest = max(cell.n_latents for cell in cells)
  return config.predicted() or (4 * largest, 16 * largest)


def _surface(cells, stopped, ks, config) -> Question:
  sizes = predicted(cells, config)

  def asked(law):
    items = []
    for k in ks:
      items += [
        Asked(
          f'slope_k{k}', f'the exponent of n at k {k}', 'exponent',
          profile.slope(law, 0, 'n', k=k),
        ),
        Asked(
          f'floor_k{k}', f'the irreducible loss at k {k}', 'floor',
          profile.term_size(law, 1, k=k),
          min(cell.loss for cell in cells if cell.k == k),
        ),
      ]  # fmt: skip
      items += [
        Asked(
          f'loss_n{n}_k{k}', f'the loss at n {n:,}, k {k}', 'prediction',
          profile.prediction(law, n=n, k=k),
        )
        for n in sizes
      ]  # fmt: skip
    return items

  return Question(
    'surface',
    f'Loss by latents and active latents, {stopped}',
    forms.SURFACE,
    {'n': study.column(cells, 'n_latents'), 'k': study.column(cells, 'k')},
    study.column(cells, 'loss'),
    study.rows_of(cells),
    asked,
    ('n', 'k'),
    study.candidates(cells, ks),
  )


def _width(cells, stopped, k, config) -> Question:
  sizes = predicted(cells, config)

  def asked(law):
    return [
      Asked(
        'slope', f'the exponent of n at k {k}', 'exponent',
        profile.slope(law, 0, 'n'),
      ),
      Asked(
        'floor', f'the irreducible loss at k {k}', 'floor',
        profile.term_size(law, 1), min(cell.loss for cell in cells),
      ),
      *(
        Asked(
          f'loss_n{n}', f'the loss at n {n:,}, k {k}', 'prediction',
          profile.prediction(law, n=n),
        )
        for n in sizes
      ),
    ]  # fmt: skip

  return Question(
    f'width_k{k}',
    f'Loss by latents at k {k} alone, {stopped}',
    forms.WIDTH,
    {'n': study.column(cells, 'n_latents')},
    study.column(cells, 'loss'),
    study.rows_of(cells),
    asked,
    ('n',),
    study.candidates(cells, [k]),
    k,
  )


_SHARES = {
  'n': 'the exponent of FLOPs in the best n',
  'tokens': 'the exponent of FLOPs in the best number of tokens',
  'loss': 'the exponent of FLOPs in the least loss above its floor',
}


def _compute(cells, k) -> Question:
  def asked(law):
    items = [
      Asked(f'frontier_{name}', f'{words} at k {k}', 'exponent', figure)
      for (name, figure), words in zip(
        frontier.exponents(law).items(), _SHARES.values(), strict=True
      )
    ]
    floor = Asked(
      'floor', f'the loss at k {k} with any n and tokens', 'floor',
      profile.term_size(law, 2), min(cell.loss for cell in cells),
    )  # fmt: skip
    return [*items, floor]

  return Question(
    f'compute_k{k}',
    f'Loss by latents and tokens at k {k}, for fixed FLOPs',
    forms.COMPUTE,
    {
      'n': study.column(cells, 'n_latents'),
      'tokens': study.column(cells, 'tokens'),
    },
    study.column(cells, 'loss'),
    study.rows_of(cells),
    asked,
    ('n', 'tokens'),
    k=k,
  )


def _convergence(cells, k) -> Question:
  return Question(
    f'convergence_k{k}',
    f'Tokens to convergence at k {k}; Gao et al. found exponents of 0.6 (GPT-2)'
    ' and 0.65 (GPT-4)',
    forms.POWER,
    {'n': study.column(cells, 'n_latents')},
    study.column(cells, 'tokens'),
    [(cell.n_latents, cell.k) for cell in cells],
    lambda law: [
      Asked(
        'exponent', f'the exponent of n in tokens to convergence at k {k}',
        'exponent', profile.coefficient(law, 'b'),
      )
    ],
    ('n',),
    k=k,
  )  # fmt: skip


def _rate(best) -> Question:
  return Question(
    'rate',
    'Best learning rate by latents; the rule has an exponent of -0.5',
    forms.POWER,
    {'n': np.array([entry.n_latents for entry in best], float)},
    np.array([entry.rate for entry in best]),
    [(entry.n_latents, entry.k) for entry in best],
    lambda law: [
      Asked(
        'exponent', 'the exponent of n in the best learning rate', 'exponent',
        profile.coefficient(law, 'b'),
      )
    ],
    ('n',),
  )  # fmt: skip

"""Noise, what is left out, what is refused, which cells would identify it."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize

from sae_jax.scaling import (
  bootstrap,
  findings,
  forms,
  frontier,
  further,
  holdout,
  law,
  noise,
  profile,
  questions,
  rates,
  study,
)
from sae_jax.scaling.config import FitConfig
from tests.support import scaling_cells

PAPER = scaling_cells.COEFFICIENTS['paper']


def surface(powers=range(10, 15), ks=(16, 32, 64), scale=0.01, bend=0.0):
  n_R, k_R = scaling_cells.grid(powers, ks)
  n_R, k_R = np.tile(n_R, 2), np.tile(k_R, 2)
  y_R = scaling_cells.losses(PAPER, n_R, k_R, scale)
  y_R = y_R * np.exp(bend * np.cos(3 * np.log2(n_R)))
  fitted = law.fit(forms.SURFACE, {'n': n_R, 'k': k_R}, y_R)
  return fitted, list(zip(n_R, k_R, strict=True)), y_R


def test_noise_is_pooled_over_cells_that_have_two_seeds():
  cells = ['a', 'a', 'b', 'c', 'c', 'c']
  logs = [0.1, 0.3, 5.0, 1.0, 1.2, 1.4]
  pooled = noise.between_seeds(cells, logs)
  assert (pooled.freedom, pooled.cells) == (3, 2)
  np.testing.assert_allclose(pooled.scale, np.sqrt((0.02 + 0.08) / 3))
  assert noise.between_seeds(['a', 'b'], [1, 2]).cells == 0


def test_a_form_that_does_not_fit_is_seen_and_widens_intervals():
  for bend, is_seen in ((0.0, False), (0.03, True)):
    fitted, cells, y_R = surface(scale=0.005, bend=bend)
    pooled = noise.between_seeds(cells, np.log(y_R))
    assert 0.003 < pooled.scale < 0.008
    lack = noise.misfit(fitted, cells, pooled)
    wider = noise.with_misfit(fitted, lack)
    assert (lack.p < 0.05) == is_seen
    assert (wider.scale > fitted.scale) == is_seen
    assert wider.freedom == (9 if is_seen else 24)


def test_the_bootstrap_draws_cells_and_their_seeds():
  fitted, cells, _ = surface(scale=0.002)
  draws = bootstrap.draws(fitted, cells, 60, seed=0)
  np.testing.assert_array_equal(
    draws, bootstrap.draws(fitted, cells, 60, seed=0)
  )
  figure = profile.prediction(fitted, n=2**16, k=32)
  low, high = bootstrap.interval(figure, draws)
  walked = profile.profile(fitted, figure)
  assert low < walked.estimate < high
  assert 0.3 < (high - low) / (walked.high - walked.low) < 2
  # Control: of a table without noise all draws are the law.
  clean, cells, _ = surface(scale=0.0)
  same = bootstrap.draws(clean, cells, 5, seed=0)
  np.testing.assert_allclose(
    same, np.broadcast_to(clean.theta_P, same.shape), atol=1e-5
  )


def finding(kind, estimate, low, high):
  return findings.Finding('x', 'x', kind, estimate, low, high, 0, 0, '')


@pytest.mark.parametrize(
  ('kind', 'numbers', 'part'),
  [
    ('floor', (0.2, 0.18, 0.22), ''),
    ('floor', (0.2, 0.0, 0.25), 'holds 0'),
    ('floor', (0.2, 0.15, 0.31), 'reaches the least loss measured, 0.3000'),
    ('floor', (0.2, 0.14, 0.25), 'is wider than 50% of its value, 0.2000'),
    ('exponent', (-0.16, -0.18, -0.14), ''),
    ('exponent', (-0.1, -0.2, 0.01), 'holds 0'),
    ('exponent', (-0.1, -0.14, -0.08), 'is wider than 50%'),
    ('prediction', (0.4, 0.39, 0.41), ''),
    ('prediction', (0.4, 0.39, np.inf), '0.3900 to no upper bound, is wider'),
  ],
)
def test_what_is_not_identified_is_refused_with_the_numbers(
  kind, numbers, part
):
  reason = findings.refusal_of(finding(kind, *numbers), 0.3, 0.5)
  assert (part in reason) if part else (reason == '')


def test_the_largest_left_out_is_predicted():
  n_R, k_R = scaling_cells.grid(range(9, 15), (16, 32, 64))
  y_R = scaling_cells.losses(PAPER, n_R, k_R)
  variables = {'n': n_R, 'k': k_R}
  left = holdout.leave_largest_out(forms.SURFACE, variables, y_R, 'n')
  assert (left.value, left.rows) == (2.0**14, 3)
  assert left.error < 1e-6
  # Control: a loss that does not go on falling.
  y_R[n_R == n_R.max()] *= 1.1
  bent = holdout.leave_largest_out(forms.SURFACE, variables, y_R, 'n')
  np.testing.assert_allclose(bent.bias, 1 / 1.1 - 1, atol=1e-6)
  assert bent.covered == 0
  few = holdout.leave_largest_out(forms.WIDTH, {'n': n_R[:4]}, y_R[:4], 'n')
  assert 'run 4 cells or more' in few.refusal


def test_cells_that_are_advised_make_the_interval_as_narrow_as_was_said():
  fitted, _, _ = surface(scale=0.004)
  figure = profile.term_size(fitted, 1, k=32)
  before = profile.profile(fitted, figure)
  wanted = 0.35 * (before.high - before.low)
  options = further.candidates(
    [2**i for i in range(10, 15)], (16, 32, 64), lambda n, k: float(n)
  )
  plan = further.choose(fitted, figure, options, wanted)
  assert plan.is_enough and plan.width <= wanted
  added = [(n, k) for n, k, seeds in plan.runs for _ in range(seeds)]
  assert plan.flops == sum(n for n, _ in added)
  n_R, k_R = scaling_cells.grid(range(10, 15), (16, 32, 64))
  n_all = np.concatenate([n_R, n_R, [n for n, _ in added]])
  k_all = np.concatenate([k_R, k_R, [k for _, k in added]])
  y_R = scaling_cells.losses(PAPER, n_all, k_all, 0.004, seed=5)
  after = law.fit(forms.SURFACE, {'n': n_all, 'k': k_all}, y_R)
  after = dataclasses.replace(after, scale=fitted.scale)
  walked = profile.profile(after, profile.term_size(after, 1, k=32))
  assert 0.6 < (walked.high - walked.low) / plan.width < 1.6
  # A width that no cells of the list reach is said to be out of reach.
  assert not further.choose(fitted, figure, options[:2], 1e-4).is_enough


def test_the_best_n_is_where_the_loss_of_its_flops_is_least():
  n_R, t_R = scaling_cells.grid(range(8, 13), (1e5, 3e5, 1e6, 3e6))
  y_R = np.exp(0.3) * n_R**-0.4 + np.exp(1.5) * t_R**-0.3 + np.exp(-2)
  fitted = law.fit(forms.COMPUTE, {'n': n_R, 'tokens': t_R}, y_R)
  best = frontier.optimum(fitted, 1e13, 64)
  np.testing.assert_allclose(6 * best.n_latents * 64 * best.tokens, 1e13)

  def loss(log_n):
    n = np.exp(log_n)
    return float(fitted.value(n=n, tokens=1e13 / (6 * n * 64)))

  searched = optimize.minimize_scalar(loss, bounds=(3, 20), method='bounded')
  np.testing.assert_allclose(best.n_latents, np.exp(searched.x), rtol=1e-3)
  np.testing.assert_allclose(best.loss, searched.fun, rtol=1e-9)
  # The exponents are those of ten times the FLOPs.
  more = frontier.optimum(fitted, 1e14, 64)
  for name, before, after in (
    ('n', best.n_latents, more.n_latents), ('tokens', best.tokens, more.tokens),
    ('loss', best.loss - np.exp(-2), more.loss - np.exp(-2)),
  ):  # fmt: skip
    figure = frontier.exponents(fitted)[name]
    value, gradient = figure.measure(fitted.theta_P[None])
    np.testing.assert_allclose(value, np.log10(after / before), atol=1e-5)
    for at in range(5):
      step = 1e-6 * np.eye(5)[at]
      ahead, behind = (
        figure.measure((fitted.theta_P + s * step)[None])[0] for s in (1, -1)
      )
      np.testing.assert_allclose(
        gradient[0, at], (ahead - behind)[0] / 2e-6, atol=1e-7
      )


def test_best_rates_are_inside_or_said_to_be_at_an_end():
  def rated(n, best, factors):
    rule = 2e-3 * (2**14 / n) ** 0.5
    return [
      scaling_cells.cell(
        n, loss=0.3 * np.exp(0.1 * np.log(factor * rule / best) ** 2),
        learning_rate=factor * rule, learning_rate_factor=factor,
      )
      for factor in factors
    ]  # fmt: skip

  factors = (0.25, 0.5, 1.0, 2.0, 4.0)
  runs = [
    *rated(1024, 7e-3, factors), *rated(4096, 5e-3, factors),
    *rated(16384, 1.0, factors), *rated(2048, 6e-3, factors[:2]),
  ]  # fmt: skip
  best = rates.best_rates(runs)
  assert [(b.n_latents, b.is_inside) for b in best] == [
    (1024, True), (4096, True), (16384, False),
  ]  # fmt: skip
  np.testing.assert_allclose([b.rate for b in best[:2]], [7e-3, 5e-3])


def test_questions_are_of_cells_that_can_be_compared():
  runs = [
    *scaling_cells.table(PAPER, range(8, 12), (16, 32), tokens=1_000_000),
    *scaling_cells.table(PAPER, range(8, 12), (32,), tokens=300_000),
    *scaling_cells.table(PAPER, (8, 9), (32,), learning_rate_factor=2.0),
  ]
  asked = {q.name: q for q in questions.all_of(runs, FitConfig())}
  assert set(asked) == {'surface', 'width_k16', 'width_k32', 'compute_k32'}
  # Neither other tokens nor other rates.
  assert len(asked['surface'].y_R) == 8
  assert len(asked['compute_k32'].y_R) == 8
  assert '1,000,000 tokens' in asked['surface'].title
  converged = scaling_cells.table(
    PAPER, range(8, 11), (32,), stop='convergence'
  )
  names = {
    q.name: len(q.y_R) for q in questions.all_of(runs + converged, FitConfig())
  }
  assert names['surface'] == names['convergence_k32'] == 3


def test_a_floor_is_compared_with_losses_at_its_own_k():
  """With more active latents the loss is below the floor of few."""
  config = FitConfig(draws=20)
  cells = scaling_cells.table(PAPER, range(10, 22), (4, 512), 0.001)
  question = questions.all_of(cells, config)[0]
  answer = study.run(question, config)
  floor = answer.finding('floor_k4')
  least = min(cell.loss for cell in cells)
  assert floor.high > least and not floor.refusal
  assert answer.floor_curve[-1] == min(c.loss for c in cells if c.k == 4)
  # Control: all runs' least loss would have had it refused.
  assert 'reaches the least' in findings.refusal_of(floor, least, 0.5)

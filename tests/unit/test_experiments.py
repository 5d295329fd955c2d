"""The experiments run small on planted activations and report what they say."""

import math
import shutil
import types

import numpy as np
import pytest

from experiments import dead_latents, learning_rate, topk_vs_relu
from experiments import runs as runs_lib
from experiments.benchmarks import train
from sae_jax import checkpoint, errors
from sae_jax import store as store_lib
from tests.support import probed


def test_dead_latents_are_fewer_with_auxk_and_the_transposed_start(
  store, tmp_path
):
  config = dead_latents.DeadLatentsConfig(
    n_tokens=16_000, n_latents=256, k=2, batch_size=64, window=1000,
    learning_rate=3e-3,
  )  # fmt: skip
  found = dead_latents.measure(config, store, str(tmp_path))
  with_both, neither = found['auxk_and_transposed'], found['neither']
  assert with_both['dead_share'] < neither['dead_share'] - 0.05
  test = runs_lib.test(str(tmp_path / 'neither'), store)
  assert (neither['test_nmse'], neither['test_l0']) == (test.nmse, test.l0)
  # Finished runs are reused: the same figures at once.
  assert dead_latents.measure(config, store, str(tmp_path)) == found


@pytest.fixture(name='rated', scope='module')
def rated_fixture(store, tmp_path_factory):
  """Runs of 30 steps by their rate."""
  workdir = tmp_path_factory.mktemp('rated')
  config = runs_lib.short_run(1920, 64, n_latents=32, k=4)
  return runs_lib.train_rates(config, (1e-2, 1e-4), store, str(workdir))


def test_each_rate_is_a_run_with_its_validation_metrics(rated):
  assert set(rated) == {1e-2, 1e-4}
  rows = {rate: runs_lib.validation(where) for rate, where in rated.items()}
  assert rows[1e-2]['step'] == rows[1e-4]['step'] == 30
  # A rate far too small is seen to be worse.
  assert rows[1e-4]['validation_nmse'] > 1.2 * rows[1e-2]['validation_nmse']


@pytest.mark.parametrize('average', [True, False])
def test_a_run_is_reported_by_the_test_rows(rated, store, average):
  figures = runs_lib.test(rated[1e-2], store, average)
  trained = checkpoint.load(rated[1e-2], average=average)
  data = store_lib.open_store(store)

  def fvu(rows):
    """By the definition, in float64."""
    x_RD, _ = probed.inputs(trained, data.read_rows(rows.start, rows.stop))
    output_RD = probed.decoded(trained, probed.latents(trained, x_RD))
    error = ((x_RD - output_RD) ** 2).sum()
    return error / ((x_RD - x_RD.mean(0)) ** 2).sum()

  assert figures.tokens == len(data.test_rows)
  want = fvu(data.test_rows)
  np.testing.assert_allclose(figures.fvu, want, rtol=1e-4)
  # Controls: other rows, and other weights.
  for rows in (
    data.validation_rows,
    range(data.n_train, data.manifest.n_rows),
    range(data.n_train),
  ):
    assert abs(fvu(rows) / want - 1) > 5e-4
  other = runs_lib.test(rated[1e-2], store, not average)
  assert abs(other.fvu / want - 1) > 1e-3


def canned(monkeypatch, row):
  """Runs have metrics that a function of config, rate and split gives."""
  monkeypatch.setattr(
    runs_lib,
    'train_rates',
    lambda config, rates, *_: {rate: (config, rate) for rate in rates},
  )
  monkeypatch.setattr(
    runs_lib,
    'validation',
    lambda where: {
      f'validation_{name}': value
      for name, value in row(*where, 'validation').items()
    },
  )
  monkeypatch.setattr(
    runs_lib,
    'test',
    lambda where, store: types.SimpleNamespace(**row(*where, 'test')),
  )


def test_learning_rates_are_scaled_from_the_smallest_size(monkeypatch):
  def row(config, rate, split):
    # Twice as far from the best as 1 / sqrt(n) would have it.
    best = 2e-2 * 32 / config.sae.n_latents
    # The test would choose half of it.
    best /= 2 if split == 'test' else 1
    return {'nmse': 0.1 + math.log(rate / best) ** 2}

  canned(monkeypatch, row)
  config = learning_rate.LearningRateConfig(
    n_tokens=4000, n_latents=('32', '128'), rates=('2e-2', '1e-2', '5e-3'),
    k=4, batch_size=64,
  )  # fmt: skip
  found = learning_rate.measure(config, 'store', 'workdir')
  assert found['best'] == {32: 2e-2, 128: 5e-3}
  for size, rates in found['validation_nmse'].items():
    assert set(rates) == {2e-2, 1e-2, 5e-3}
    assert found['best'][size] == min(rates, key=rates.get)
  # Control: chosen on the rows that are reported it would be another.
  of_test = found['test_nmse'][32]
  assert min(of_test, key=of_test.get) == 1e-2
  large = found['scaled'][128]
  assert math.isclose(large['predicted'], 1e-2)
  assert large['nearest_of_grid'] == 1e-2
  over = found['test_nmse'][128][1e-2] / found['test_nmse'][128][5e-3]
  assert math.isclose(large['nmse_over_best'], over) and over > 1


def test_topk_and_relu_are_compared_at_the_same_l0(monkeypatch):
  def row(config, rate, split):
    l0 = config.sae.k
    if config.sae.activation == 'relu':
      l0 = 0.4 / config.objective.sparsity_weight + 0.4 * config.seed
    # The test would choose the other rate, and shows other figures.
    best = {'validation': 1e-2, 'test': 3e-3}[split]
    nmse = 1 / (1 + l0) + math.log(rate / best) ** 2
    l0 += {'validation': 0, 'test': 0.25}[split]
    if config.sae.activation == 'relu':
      nmse += 0.05 + 0.01 * config.seed
    return {'l0': l0, 'nmse': nmse}

  canned(monkeypatch, row)
  config = topk_vs_relu.TopkVsReluConfig(
    n_tokens=16_000, n_latents=64, seeds=2, weights=('0.02', '0.08'),
    rates=('1e-2', '3e-3'), batch_size=64,
  )  # fmt: skip
  found = topk_vs_relu.measure(config, 'store', 'workdir')
  assert len(found['pairs']) == 4
  for pair in found['pairs']:
    assert abs(pair['relu_l0'] - pair['topk_l0']) <= 0.51
    # On test rows, at the rate and with the k that validation rows chose.
    assert pair['topk_l0'] == round(pair['relu_l0'] - 0.25) + 0.25
    assert pair['topk_nmse'] > math.log(1e-2 / 3e-3) ** 2
  # The heavier penalty leaves fewer latents.
  light, heavy = found['pairs'][0], found['pairs'][-1]
  assert heavy['relu_l0'] < light['relu_l0']
  for weight, summary in found['gain_of_topk'].items():
    gains = [
      pair['relu_nmse'] - pair['topk_nmse']
      for pair in found['pairs']
      if pair['weight'] == weight
    ]
    assert math.isclose(summary['gain'], np.mean(gains))
    low, high = summary['interval']
    # Two seeds: Student's t with one degree of freedom.
    half = 12.706 * abs(gains[0] - gains[1]) / 2
    np.testing.assert_allclose((high - low) / 2, half, rtol=1e-3)


def test_a_run_that_was_stopped_has_no_figures(rated, store, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(rated[1e-2], run)
  assert runs_lib.validation(str(run))['step'] == 30
  path = run / 'config.json'
  path.write_text(path.read_text().replace('"steps": 30', '"steps": 39'))
  for figures in (runs_lib.validation, lambda run: runs_lib.test(run, store)):
    with pytest.raises(
      errors.UserError, match='stopped before step 39: run it again'
    ):
      figures(str(run))


def test_a_short_run_takes_fields_in_place_of_its_own():
  run = runs_lib.short_run(1001, 10, k=4, n_latents=64)
  assert (run.steps, run.optimizer.warmup_steps) == (101, 5)
  assert (run.sae.k, run.sae.n_latents) == (4, 64)
  run = runs_lib.short_run(1001, 10, warmup_steps=0, on_nonfinite='skip')
  assert (run.optimizer.warmup_steps, run.on_nonfinite) == (0, 'skip')
  with pytest.raises(TypeError, match='a run has no n_latent, rate'):
    runs_lib.short_run(1001, 10, rate=1e-3, n_latent=64)
  with pytest.raises(errors.UserError, match='k 65 exceeds n_latents 64'):
    runs_lib.short_run(1001, 10, k=65, n_latents=64)


def test_the_benchmark_times_every_part_and_the_step_learns(monkeypatch):
  whole, losses = train.step.make_step, []

  def make_step(*args):
    do = whole(*args)

    def recorded(state, raw_BD):
      state, values = do(state, raw_BD)
      losses.append(float(values['loss']))
      return state, values

    return recorded

  monkeypatch.setattr(train.step, 'make_step', make_step)
  shape = train.BenchmarkConfig(d=32, n=256, k=4, batch=64, steps=30)
  found = train.measure(shape)
  names = ('encoder_matmul', 'topk', 'decode', 'backward', 'optimizer')
  for name in (*(f'{part}_s' for part in names), 'step_s_median', 'step_s_min'):
    assert found[name] >= 0, name
  assert found['step_s_min'] <= found['step_s_median']
  assert found['peak_memory_gib'] > 0.05
  assert len(losses) == 2 + shape.steps
  assert found['loss'] == losses[-1] < losses[4]

"""The experiments run small on planted activations and report what they say."""

import shutil

import numpy as np
import pytest

from experiments import runs as runs_lib
from experiments import steering
from experiments.benchmarks import train
from sae_jax import checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.training import train as training
from tests.support import probed


@pytest.fixture(name='rated', scope='module')
def rated_fixture(store, tmp_path_factory):
  """Runs of 30 steps by their rate."""
  workdir = tmp_path_factory.mktemp('rated')
  config = runs_lib.short_run(1920, 64, n_latents=32, k=4)
  runs = training.sweep(config, str(workdir), learning_rate=(1e-2, 1e-4))
  training.train_many(runs, store)
  return {run.optimizer.learning_rate: where for where, run in runs.items()}


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


def test_steering_takes_numbers_of_latents_and_strengths():
  config = steering.SteeringConfig(latents=('3', '5'), strengths=('0.5',))
  assert (config.numbers, config.multiples) == ([3, 5], [0.5])
  for wrong in ({'latents': ('3', 'x')}, {'strengths': ('often',)}):
    with pytest.raises(errors.UserError, match='write --latents=719,700'):
      steering.SteeringConfig(**wrong)

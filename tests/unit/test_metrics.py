"""Metrics against their definitions in float64, and the writer."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder
from sae_jax.autoencoder import metrics
from sae_jax.training import log

# Their results are compared, not their speed.
compiled = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
batch_sums = compiled(metrics.batch_sums, static_argnums=4)


def batch(seed, size, offset=0.0, scale=1.0):
  rng = np.random.default_rng(seed)
  x_BD = (offset + scale * rng.standard_normal((size, 6))).astype(np.float32)
  output_BD = x_BD + 0.3 * scale * rng.standard_normal((size, 6))
  vals_BK = np.maximum(rng.standard_normal((size, 4)), 0).astype(np.float32)
  # Indices of a token are distinct; latent 9 never appears.
  idx_BK = np.stack([rng.permutation(9)[:4] for _ in range(size)])
  return x_BD, output_BD.astype(np.float32), vals_BK, idx_BK.astype(np.int32)


def test_metrics_over_batches_equal_their_definitions():
  # A mean a thousand times the spread: sums of raw squares in float32
  # would have no digit of the variance left.
  parts = [batch(seed, size, 100.0, 0.1) for seed, size in ((0, 50), (1, 7))]
  origin_D = np.full(6, 100, np.float32)
  total = None
  for part in parts:
    sums = batch_sums(*part, 10, origin_D, part[0])
    total = metrics.add_sums(total, sums)
  got = metrics.summarise(total, mse_of_mean=0.05)

  x, output, vals = (
    np.concatenate([p[i] for p in parts]).astype(np.float64) for i in range(3)
  )
  idx = np.concatenate([p[3] for p in parts])
  error = ((x - output) ** 2).sum()
  np.testing.assert_allclose(got.nmse, error / len(x) / 0.05, rtol=1e-5)
  np.testing.assert_allclose(
    got.fvu, error / ((x - x.mean(0)) ** 2).sum(), rtol=1e-4
  )
  cosine = (x * output).sum(1) / np.linalg.norm(x, axis=1)
  cosine /= np.linalg.norm(output, axis=1)
  np.testing.assert_allclose(got.cosine, cosine.mean(), rtol=1e-5)
  np.testing.assert_allclose(got.l0, (vals > 0).sum(1).mean(), rtol=1e-12)
  density_N = np.array([((idx == n) & (vals > 0)).sum() for n in range(10)])
  np.testing.assert_allclose(got.density_N, density_N / len(x), rtol=1e-12)
  assert got.dead_fraction == (density_N == 0).mean() > 0
  assert got.tokens == 57


def test_fvu_of_predicting_the_mean_is_one_and_of_perfection_zero():
  x_BD, _, vals_BK, idx_BK = batch(3, 200)
  for output_BD, want in ((x_BD.mean(0) + 0 * x_BD, 1.0), (x_BD, 0.0)):
    sums = batch_sums(x_BD, output_BD, vals_BK, idx_BK, 10, x_BD[0], x_BD)
    got = metrics.summarise(metrics.add_sums(None, sums), 1.0)
    np.testing.assert_allclose(got.fvu, want, atol=1e-5)


@pytest.mark.parametrize('preprocessing', autoencoder.PREPROCESSING)
def test_rows_that_rounding_alone_tells_apart_do_not_vary(preprocessing):
  rng = np.random.default_rng(0)
  row_D = (1 + rng.standard_normal(32)).astype(np.float32)
  equal_BD = np.repeat(row_D[None], 400, 0)
  nearly_BD = equal_BD.copy()
  nearly_BD[::2] = np.nextafter(nearly_BD[::2], np.float32(9))
  # Far from 0, but no farther than digits tell.
  far_BD = 1000 + 0.1 * rng.standard_normal((400, 32)).astype(np.float32)
  config = autoencoder.SaeConfig(
    d_model=32, n_latents=64, k=4, preprocessing=preprocessing
  )
  # Compiled as runs compile them, since they are to round as those do.
  fit = jax.jit(functools.partial(autoencoder.fit_inputs, config))
  evaluate = jax.jit(functools.partial(metrics.evaluate_batch, config))
  fresh = compiled(functools.partial(autoencoder.init_weights, config))(
    jax.random.key(1)
  )
  # Held-out rows are met with weights of a sample that varies.
  sae, _ = fit(fresh, far_BD)
  for rows_BD, varies in ((equal_BD, 0), (nearly_BD, 0), (far_BD, 1)):
    assert (fit(fresh, rows_BD)[1] > 0) == varies
    total = None
    for part_BD in np.split(rows_BD, 4):
      total = metrics.add_sums(total, evaluate(sae, part_BD))
    assert math.isfinite(metrics.summarise(total, 1.0).fvu) == varies


def test_evaluate_batch_is_encode_decode_and_sums():
  config = autoencoder.SaeConfig(d_model=6, n_latents=12, k=3)
  raw_BD = batch(4, 30)[0]

  @compiled
  def start(raw_BD):
    sae = autoencoder.init_weights(config, jax.random.key(1))
    return autoencoder.fit_inputs(config, sae, raw_BD)[0]

  @compiled
  def by_parts(sae, raw_BD):
    x_BD, _ = autoencoder.preprocess(config, sae, raw_BD)
    vals_BK, idx_BK = autoencoder.encode(config, sae, x_BD)
    return x_BD, vals_BK, autoencoder.decode(sae, vals_BK, idx_BK)

  sae = start(raw_BD)
  got = compiled(metrics.evaluate_batch, static_argnums=0)(config, sae, raw_BD)
  x_BD, vals_BK, output_BD = map(np.asarray, by_parts(sae, raw_BD))
  np.testing.assert_allclose(
    got.error, ((x_BD - output_BD) ** 2).sum(), rtol=1e-5
  )
  assert int(np.sum(got.fired_N)) == int(got.active) == int((vals_BK > 0).sum())


def test_density_histogram_counts_the_living_and_the_silent():
  counts, silent = metrics.density_histogram(
    np.array([0, 0, 1e-3, 1.5e-3, 0.5, 1.0, 1e-12])
  )
  assert silent == 2
  assert counts.sum() == 5
  # Beyond the edges counts in the outer bins.
  assert counts[0] == 1
  record = metrics.density_record(np.array([0, 0.5]))
  assert json.loads(json.dumps(record))['silent'] == 1


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_writer_drops_what_was_written_beyond_the_resumed_step(tmp_path):
  writer = log.Writer(str(tmp_path), 0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': jnp.asarray(step / 2)}, {'tokens_per_s': 9.0})
  writer.close()
  assert [row['step'] for row in lines(tmp_path / 'metrics.jsonl')] == [1, 2, 3]
  writer = log.Writer(str(tmp_path), 2)
  writer.write(3, {'loss': 7.0})
  writer.close()
  rows = lines(tmp_path / 'metrics.jsonl')
  assert rows == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': 1.0},
    {'step': 3, 'loss': 7.0},
  ]
  assert list((tmp_path / 'tensorboard').iterdir())


@pytest.mark.parametrize(
  'damaged',
  [
    b'{"st',
    b'{"step": 2, "loss": "\xff"}',
    b'[1]',
    b'{"step": "2"}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"loss": 1.0}',
    b'{"step": 1, "loss": "2.5"}',
    b'{"step": 1, "loss": false}',
    b'{"step": 1, "loss": [[]]}',
    b'{"step": 1, "loss": {"a": 1}}',
    b'[' * 200_000,
    b'\0' * 1000,
  ],
)
def test_writer_leaves_out_damaged_lines_and_writes_no_nan(
  tmp_path, caplog, damaged
):
  path = tmp_path / 'metrics.jsonl'
  before = b'{"step": 1, "loss": 2.5e-07}\n'
  path.write_bytes(before + damaged + b'\n' + before.replace(b'1', b'2'))
  writer = log.Writer(str(tmp_path), 5)
  writer.write(6, {'loss': float('nan')})
  writer.close()
  assert path.read_bytes() == (
    before + before.replace(b'1', b'2') + b'{"step": 6, "loss": null}\n'
  )
  assert caplog.text.count('1 lines of') == 1

"""Reconstruction scores against float64, and what they are compared with."""

import jax
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.probing import reconstruction
from tests.support import probed


def expected(trained, raw_BD):
  """All metrics from their definitions, in float64."""
  x_BD, _ = probed.inputs(trained, raw_BD)
  latents_BN = probed.latents(trained, x_BD)
  output_BD = probed.decoded(trained, latents_BN)
  error = ((x_BD - output_BD) ** 2).sum(1).mean()
  norms_B = np.linalg.norm(x_BD, axis=1) * np.linalg.norm(output_BD, axis=1)
  return {
    'nmse': error / trained.mse_of_mean,
    'fvu': error / ((x_BD - x_BD.mean(0)) ** 2).sum(1).mean(),
    'cosine': ((x_BD * output_BD).sum(1) / norms_B).mean(),
    'l0': (latents_BN > 0).sum(1).mean(),
    'dead_fraction': (~(latents_BN > 0).any(0)).mean(),
    'tokens': len(raw_BD),
  }, (latents_BN > 0).mean(0)


@pytest.mark.parametrize('batch_rows', [7, 1000])
def test_measure_equals_the_definitions(data, trained, batch_rows):
  start, stop = data.n_train, data.manifest.n_rows
  assert (stop - start) % 7
  quality = reconstruction.measure(
    trained, data, start, stop, batch_rows, 'test'
  )
  want, density_N = expected(trained, data.read_rows(start, stop))
  assert quality.scalars().keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(getattr(quality, name), value, rtol=2e-5)
  np.testing.assert_allclose(quality.density_N, density_N)
  assert 2 / 24 <= want['dead_fraction'] < 0.5 and 1 < want['l0'] < 4


def test_control_a_lost_batch_would_show(data, trained, monkeypatch):
  start, stop = data.n_train, data.manifest.n_rows
  want, _ = expected(trained, data.read_rows(start, stop))
  whole = reconstruction.batches
  monkeypatch.setattr(
    reconstruction,
    'batches',
    lambda *args: (b for b in whole(*args) if len(b) == args[-1]),
  )
  quality = reconstruction.measure(trained, data, start, stop, 7, 'test')
  assert quality.tokens != want['tokens']
  assert abs(quality.fvu / want['fvu'] - 1) > 1e-3


def test_rows_without_a_score_are_named(data, trained, monkeypatch):
  start, stop = data.n_train, data.manifest.n_rows
  rows_RD = data.read_rows(start, stop)
  stored = {'rows': np.repeat(rows_RD[:1], len(rows_RD), 0)}
  monkeypatch.setattr(
    data,
    'read_rows',
    lambda first, last: stored['rows'][first - start : last - start],
  )
  with pytest.raises(errors.UserError, match='no more than rounding'):
    reconstruction.measure(trained, data, start, stop, 7, 'test')
  rows_RD[9, 0] = np.inf
  stored['rows'] = rows_RD
  with pytest.raises(errors.UserError, match=f'row {start + 9} of store'):
    reconstruction.measure(trained, data, start, stop, 7, 'test')


def test_untrained_is_the_start_of_a_run(data):
  config = autoencoder.SaeConfig(probed.D_MODEL, 24, 4)
  sample_BD = data.read_rows(0, data.n_train)
  fresh = reconstruction.untrained(config, sample_BD, 3)
  start = autoencoder.init_weights(config, jax.random.key(3))
  np.testing.assert_allclose(fresh.sae.w_dec_ND, start.w_dec_ND, rtol=1e-6)
  ratio_ND = np.asarray(fresh.sae.w_enc_ND) / np.asarray(start.w_enc_ND)
  np.testing.assert_allclose(ratio_ND, ratio_ND.flat[0], rtol=1e-4)
  assert not np.asarray(fresh.sae.b_lat_N).any()
  x_BD, _ = probed.inputs(fresh, sample_BD)

  def distance(point_D):
    return np.linalg.norm(x_BD - point_D, axis=1).sum()

  best = distance(np.asarray(fresh.sae.b_pre_D, np.float64))
  rng = np.random.default_rng(0)
  for _ in range(20):
    other_D = np.asarray(fresh.sae.b_pre_D) + 0.02 * rng.standard_normal(16)
    assert distance(other_D) > best
  spread = ((x_BD - x_BD.mean(0)) ** 2).sum(1).mean()
  np.testing.assert_allclose(fresh.mse_of_mean, spread, rtol=1e-5)
  other = reconstruction.untrained(config, sample_BD, 4)
  assert (other.sae.w_dec_ND != fresh.sae.w_dec_ND).any()

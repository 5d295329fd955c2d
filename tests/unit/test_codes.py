"""The codes of a store's rows against a dense float64 encoder."""

import dataclasses

import numpy as np
import pytest

from sae_jax.autoencoder import nonlinearity
from sae_jax.probing import codes
from tests.support import probed


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return probed.write_store(str(tmp_path_factory.mktemp('made') / 'store'))


def dense(found, n_latents):
  out_RN = np.zeros((len(found.vals_RK), n_latents))
  rows = np.arange(len(out_RN))[:, None]
  np.add.at(out_RN, (rows, found.idx_RK), found.vals_RK)
  return out_RN


@pytest.mark.parametrize('k', [1, 4, 24])
def test_codes_equal_the_dense_encoder(data, k):
  trained = probed.make_trained(data, k=k)
  start, stop = 11, 70
  found = codes.encode_rows(trained, data, start, stop, 16)
  x_RD, _ = probed.inputs(trained, data.read_rows(start, stop))
  want_RN = probed.latents(trained, x_RD)
  np.testing.assert_allclose(dense(found, 24), want_RN, rtol=1e-4, atol=1e-5)
  assert found.start == start and found.vals_RK.shape == (stop - start, k)
  assert found.vals_RK.dtype == np.float32 and found.idx_RK.dtype == np.int32
  # Fewer than k are above 0 somewhere, and dead latents nowhere.
  assert k == 1 or (found.vals_RK == 0).any()
  assert not want_RN[:, list(probed.DEAD)].any()
  # Control: another autoencoder's codes, or those of the next row.
  assert np.abs(dense(found, 24)[1:] - want_RN[:-1]).max() > 0.01


@pytest.mark.parametrize('activation', nonlinearity.NAMES[1:])
def test_codes_with_any_number_of_latents_hold_what_fired(data, activation):
  trained = probed.make_trained(data, k=1, activation=activation)
  n_rows = data.manifest.n_rows
  found = codes.encode_rows(trained, data, 0, n_rows, 16)
  x_RD, _ = probed.inputs(trained, data.read_rows(0, n_rows))
  want_RN = probed.latents(trained, x_RD)
  np.testing.assert_allclose(dense(found, 24), want_RN, rtol=1e-4, atol=1e-5)
  active_R = (want_RN > 0).sum(1)
  np.testing.assert_array_equal((found.vals_RK > 0).sum(1), active_R)
  # Tokens differ in how many latents are active, and k does not limit it.
  assert active_R.min() == 0 and active_R.max() > 2 * trained.config.k
  assert active_R.max() <= found.vals_RK.shape[1] < 2 * active_R.max()
  # Control: as many as the mean would lose some.
  assert (active_R > max(1, round(active_R.mean()))).any()


def test_codes_of_a_run_that_never_fires_are_empty(data):
  trained = probed.make_trained(data, activation='relu')
  silent_N = np.full(24, -100, np.float32)
  trained = dataclasses.replace(
    trained, sae=trained.sae.replace(b_lat_N=silent_N)
  )
  found = codes.encode_rows(trained, data, 0, 20, 8)
  assert found.vals_RK.shape == (20, 1) and not found.vals_RK.any()


@pytest.mark.parametrize('activation', nonlinearity.NAMES)
def test_the_batch_does_not_matter(data, activation):
  trained = probed.make_trained(data, activation=activation)
  whole = codes.encode_rows(trained, data, 0, data.manifest.n_rows, 10_000)
  parts = codes.encode_rows(trained, data, 0, data.manifest.n_rows, 13)
  np.testing.assert_allclose(
    dense(parts, 24), dense(whole, 24), rtol=1e-5, atol=1e-6
  )


def test_activations_that_are_not_numbers_do_not_spread(tmp_path, monkeypatch):
  data = probed.write_store(str(tmp_path / 'store'))
  trained = probed.make_trained(data)
  good = codes.encode_rows(trained, data, 0, 20, 20)
  rows_RD = data.read_rows(0, 20)
  rows_RD[3] = np.nan
  monkeypatch.setattr(data, 'read_rows', lambda start, stop: rows_RD)
  found = codes.encode_rows(trained, data, 0, 20, 20)
  others = np.arange(20) != 3
  np.testing.assert_array_equal(found.vals_RK[others], good.vals_RK[others])
  # No comparison with 0 holds, so nothing downstream takes it for active.
  assert not (found.vals_RK[3] > 0).any()

"""Small scans: a store, an autoencoder, and what a scan must give."""

import dataclasses

import jax
import numpy as np

from sae_jax import autoencoder, store
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import metrics
from sae_jax.checkpoint import Trained
from sae_jax.probing.scan import codes, rows, run
from sae_jax.probing.scan.config import ScanConfig
from tests.support import planted

N_LATENTS, K = 64, 4


def config(**kwargs):
  """A scan of seconds; keyword arguments replace its fields."""
  values = {
    'feature_rows': 900,
    'eval_rows': 250,
    'pca_rows': 700,
    'batch_rows': 128,
    'top_examples': 4,
    'random_examples': 3,
    'near_examples': 2,
    'save_every_rows': 10**9,
  }
  return ScanConfig(**(values | kwargs))


def small_shards(patch):
  """Makes shards of codes small while a patch lasts."""
  patch.setattr(codes, 'SHARD_ROWS', 256)
  patch.setattr(codes, '_CHUNK_ROWS', 64)
  patch.setattr(codes, '_COLUMNS', 4)


def data(folder, **kwargs):
  """An opened store of 1,140 rows, the last 380 of them held out."""
  url = str(folder / 'store')
  planted.write_store(url, n_rows=1140, holdout_documents=4, **kwargs)
  return store.open_store(url)


def trained(data, seed=0, **kwargs):
  """An autoencoder that is fitted to a store and not trained."""
  values = {
    'd_model': planted.D_MODEL,
    'n_latents': N_LATENTS,
    'k': K,
    'decoder_init': 'random',
    'encoder_gain': 'norm',
  }
  sae_config = autoencoder.SaeConfig(**(values | kwargs))
  sae, mse_of_mean = jax.jit(
    lambda key, x_BD: autoencoder.fit_inputs(
      sae_config, autoencoder.init_weights(sae_config, key), x_BD
    )
  )(jax.random.key(seed), data.read_rows(0, 300))
  if 'threshold' in sae.extra:
    # It is the value of a row, which rounding would put on either side.
    sae = sae.replace(extra={'threshold': sae.extra['threshold'] * 1.0001})
  return Trained(sae_config, sae, float(mse_of_mean), step=1)


def scan(scan_config, of, data, workdir, shape=(1, 1), **kwargs):
  """A scan on the first devices."""
  n_devices = shape[0] * shape[1]
  mesh = mesh_lib.make_mesh(*shape, devices=jax.devices()[:n_devices])
  return run.scan(scan_config, of, data, str(workdir), mesh, **kwargs)


def columns(result, latents=24):
  """The columns of all latents of a scan."""
  (parts,) = result.held_latents.values()
  n_latents = parts[-1][1]
  blocks = [
    result.columns(first, min(first + latents, n_latents))
    for first in range(0, n_latents, latents)
  ]
  return {
    name: np.concatenate([block[name] for block in blocks])
    for name in blocks[0]
  }


def numbers(result):
  """All numbers of a scan by name, as arrays."""
  values = columns(result)
  for name, of in result.quality.items():
    for field in dataclasses.fields(of):
      values[f'{name} {field.name}'] = np.asarray(getattr(of, field.name))
    values[f'{name} norm_ratio'] = np.asarray(result.norm_ratio[name])
    for curve, of_T in result.curves[name].items():
      values[f'{name} {curve} by position'] = of_T
  values['fvu_pca'] = np.asarray(result.fvu_pca(3))
  values['tied'] = np.asarray(result.tied)
  values['most_active'] = np.asarray(result.most_active)
  return values


def assert_same(got, want, rtol=1e-6, but=()):
  """Integers are equal, and floats to a relative tolerance."""
  assert got.keys() == want.keys()
  for name in want.keys() - set(but):
    a, b = got[name], want[name]
    if b.dtype.kind in 'iub':
      np.testing.assert_array_equal(a, b, err_msg=name)
    else:
      # What is a difference, such as a skewness, has the digits of its terms.
      np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=name)


def naive(scan_config, of, data):
  """What some columns and the codes must be, from dense codes in float64.

  Returns:
    columns by name, and vals_RN in descending order with idx_RN.
  """
  n_rows = min(scan_config.feature_rows, data.manifest.n_rows)
  x_RD, _ = autoencoder.preprocess(of.config, of.sae, data.read_rows(0, n_rows))
  if of.config.activation == 'topk':
    z_RN = np.asarray(autoencoder.pre_activations(of.config, of.sae, x_RD))
    most = of.config.k
  else:
    z_RN = np.asarray(autoencoder.encode(of.config, of.sae, x_RD)[0])
    most = z_RN.shape[1]
  z_RN = z_RN.astype(np.float64)
  idx_RN = np.argsort(-z_RN, axis=1, kind='stable')
  vals_RN = np.take_along_axis(z_RN, idx_RN, 1)
  rank_RN = np.argsort(idx_RN, axis=1)
  active_RN = (z_RN > 0) & (rank_RN < most)
  near_RN = (z_RN > 0) & (rank_RN >= most) & (rank_RN < 2 * most)
  last_R = vals_RN[:, most - 1]
  if of.config.activation != 'topk':
    last_R = np.where(active_RN, z_RN, np.inf).min(1)
  count_N = active_RN.sum(0)
  document_R, _ = rows.documents_and_positions(data, 0, n_rows)

  def mean(of_RN):
    return np.where(active_RN, of_RN, 0).sum(0) / np.maximum(count_N, 1)

  def best(wanted_RN, examples):
    rows_NM = np.full((z_RN.shape[1], examples), -1)
    for n in range(len(rows_NM)):
      own = np.flatnonzero(wanted_RN[:, n])
      own = own[np.argsort(-z_RN[own, n], kind='stable')]
      _, first = np.unique(document_R[own], return_index=True)
      own = own[np.sort(first)][:examples]
      rows_NM[n, : len(own)] = own
    return rows_NM

  values = {
    'count': count_N,
    'max': np.where(active_RN, z_RN, 0).max(0),
    'mean': mean(z_RN),
    'rank_mean': mean(rank_RN),
    'margin_mean': mean(z_RN - last_R[:, None]),
  }
  if scan_config.top_examples:
    values['top_rows'] = best(active_RN, scan_config.top_examples)
  if scan_config.near_examples:
    values['near_rows'] = best(near_RN, scan_config.near_examples)
    values['near_count'] = near_RN.sum(0)
  vals_RN = np.where(np.arange(z_RN.shape[1]) < most, vals_RN, 0)
  vals_RN = np.maximum(vals_RN, 0)
  return values, vals_RN, np.where(vals_RN > 0, idx_RN, 0)


def naive_quality(of, data, span):
  """Metrics of rows, summed by what training sums with."""
  raw_RD = data.read_rows(span.start, span.stop)
  sums = metrics.evaluate_batch(of.config, of.sae, raw_RD)
  return metrics.summarise(metrics.add_sums(None, sums), of.mse_of_mean)

"""Transcoders: one site's activations from another's, and a skip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.autoencoder import metrics
from sae_jax.autoencoder import raw as raw_lib
from sae_jax.feed.from_store import StoreFeed, train_order
from sae_jax.probing.suite import scored
from sae_jax.training import train as training
from tests.support import dense_reference, planted
from tests.support.objective_checks import (
  CONFIG,
  largest_difference,
  MSE_OF_MEAN,
  ours,
  problem,
)

READ, WRITTEN = 'blocks.0.mlp_in', 'blocks.0.mlp_out'
PLAIN = dataclasses.replace(CONFIG, target_site=WRITTEN)
SKIP = dataclasses.replace(PLAIN, skip=True)


def made(config, seed=0):
  """A transcoder, rows of both sites and dead latents, in float64."""
  sae, x_BD, dead_N = problem(seed)
  rng = np.random.default_rng(seed + 1)
  d = config.d_model
  target = {
    'target_mean_D': jnp.asarray(rng.standard_normal(d)),
    'target_scale': jnp.asarray(2.5),
  }
  if config.skip:
    target['w_skip_DD'] = jnp.asarray(0.3 * rng.standard_normal((d, d)))
  extra = {}
  if config.activation == 'gated':
    extra = {n: 0.1 * jnp.arange(48.0) / 48 for n in ('r_mag_N', 'b_mag_N')}
  rows_BX = jnp.concatenate(
    [x_BD, jnp.asarray(rng.standard_normal(x_BD.shape))], axis=1
  )
  return sae.replace(target=target, extra=extra), rows_BX, dead_N


@pytest.mark.parametrize(
  ('config', 'implementation', 'micro_batches'),
  [(PLAIN, 'gather', 4), (SKIP, 'gather', 1), (SKIP, 'dense', 4)],
)
def test_gradients_equal_dense_autodiff(config, implementation, micro_batches):
  with jax.enable_x64(True):
    sae, rows_BX, dead_N = made(config)
    value, _, grads = ours(
      sae,
      rows_BX,
      dead_N,
      sae_config=config,
      implementation=implementation,
      micro_batches=micro_batches,
    )
    want, want_grads = by_autodiff(config, sae, rows_BX, dead_N)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert largest_difference(grads, want_grads) < 1e-10
    # Controls: another target, and the input itself.
    for other_BX in (
      jnp.roll(rows_BX, 1, axis=1),
      jnp.tile(rows_BX[:, : config.d_model], 2),
    ):
      other, _ = by_autodiff(config, sae, other_BX, dead_N)
      assert abs(other / want - 1) > 1e-3


@pytest.mark.parametrize('activation', ['relu', 'gated', 'groupmax'])
def test_baselines_gradients_equal_dense_autodiff(activation):
  config = dataclasses.replace(SKIP, activation=activation, k=6)
  weight = 0.3 * (activation != 'groupmax')
  with jax.enable_x64(True):
    sae, rows_BX, dead_N = made(config)
    options = {'sparsity_weight': weight} if weight else {}
    value, _, grads = ours(sae, rows_BX, dead_N, sae_config=config, **options)
    want, want_grads = by_autodiff(config, sae, rows_BX, dead_N, weight)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert largest_difference(grads, want_grads) < 1e-10


def by_autodiff(config, sae, rows_BX, dead_N, weight=0.0):
  def of(params):
    return dense_reference.loss_of(
      config,
      autoencoder.with_arrays(sae, params),
      rows_BX,
      dead_N,
      MSE_OF_MEAN,
      weight,
      k_aux=7,
    )

  return jax.jit(jax.value_and_grad(of))(autoencoder.trained(sae))


@pytest.mark.parametrize('preprocessing', ['none', 'center_unit_norm'])
@pytest.mark.parametrize('config', [PLAIN, SKIP], ids=['plain', 'skip'])
def test_output_is_of_the_other_site(config, preprocessing):
  config = dataclasses.replace(config, preprocessing=preprocessing)
  sae, rows_BX, _ = made(config)
  sae = jax.tree.map(lambda a: np.asarray(a, np.float32), sae)
  raw_BD = np.asarray(rows_BX, np.float32)[:, : config.d_model]
  codes = raw_lib.encode(config, sae, raw_BD)
  x_BD = np.asarray(raw_BD, np.float64)
  if preprocessing != 'none':
    x_BD = x_BD - x_BD.mean(1, keepdims=True)
    x_BD /= np.linalg.norm(x_BD, axis=1, keepdims=True)
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), sae)
  z_BN = np.asarray(dense_reference.codes_of(config, wide, x_BD))
  np.testing.assert_allclose(codes.dense(), z_BN, rtol=1e-4, atol=1e-4)
  own_BD = z_BN @ wide.w_dec_ND + wide.b_pre_D
  if config.skip:
    own_BD += x_BD @ wide.target['w_skip_DD']
  want_BD = own_BD * 2.5 + wide.target['target_mean_D']
  for got_BD in (
    raw_lib.decode(config, sae, codes),
    raw_lib.reconstruct(config, sae, raw_BD),
    autoencoder.reconstruct(config, sae, raw_BD),
  ):
    np.testing.assert_allclose(got_BD, want_BD, rtol=1e-4, atol=1e-4)
  # Control: without the skip it is another.
  if config.skip:
    without = own_BD - x_BD @ wide.target['w_skip_DD']
    assert np.abs(without * 2.5 - want_BD).max() > 0.1


def test_metrics_are_of_what_is_reconstructed():
  config = dataclasses.replace(SKIP, preprocessing='none')
  sae, rows_BX, _ = made(config)
  sae = jax.tree.map(lambda a: np.asarray(a, np.float32), sae)
  rows_BX = np.asarray(rows_BX, np.float32)
  sums = metrics.evaluate_batch(config, sae, jnp.asarray(rows_BX))
  got = metrics.summarise(metrics.add_sums(None, sums), 1.0)
  x_BD, target_BD = np.split(rows_BX, 2, axis=1)
  output_BD = np.float64(autoencoder.reconstruct(config, sae, x_BD))
  away_BD = target_BD - target_BD.mean(0, dtype=np.float64)
  fvu = ((target_BD - output_BD) ** 2).sum() / (away_BD**2).sum()
  np.testing.assert_allclose(got.fvu, fvu, rtol=1e-4)


def test_latents_must_add_what_bias_and_skip_do_not():
  config = dataclasses.replace(SKIP, preprocessing='none')
  sae, rows_BX, _ = made(config)
  sae = jax.tree.map(lambda a: np.asarray(a, np.float32), sae)
  shape = scored.Shape(config, None, config.k)
  target_BD, left_BD = scored.wanted(shape, sae, jnp.float32(rows_BX))
  x_BD, y_BD = np.split(np.asarray(rows_BX), 2, axis=1)
  want_BD = (y_BD - sae.target['target_mean_D']) / 2.5
  np.testing.assert_allclose(target_BD, want_BD, rtol=1e-5, atol=1e-5)
  want_BD -= sae.b_pre_D + x_BD @ sae.target['w_skip_DD']
  np.testing.assert_allclose(left_BD, want_BD, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """A store of what a planted block reads and writes."""
  url = str(tmp_path_factory.mktemp('both') / 'store')
  rows_RD = planted.activations(6080)
  planted.write_store(
    url,
    6080,
    rows_RD=rows_RD,
    site=READ,
    target_site=WRITTEN,
    targets_RD=planted.targets(rows_RD),
  )
  return url


def test_rows_of_two_sites_are_beside_each_other(both):
  data = store_lib.open_store(both, READ, target_site=WRITTEN)
  parts = [store_lib.open_store(both, site) for site in (READ, WRITTEN)]
  assert (data.width, data.manifest.d_model) == (32, 16)
  # Over the border of a shard of 256.
  want_RX = np.concatenate([p.read_rows(200, 600) for p in parts], axis=1)
  np.testing.assert_array_equal(data.read_rows(200, 600), want_RX)
  rows = np.array([599, 3, 300])
  want_RX = np.concatenate([p.gather(rows) for p in parts], axis=1)
  np.testing.assert_array_equal(data.gather(rows), want_RX)
  feeds = [StoreFeed(d, train_order(d, 3), 64) for d in (data, *parts)]
  batch_BX, *halves = (feed.batch(5) for feed in feeds)
  np.testing.assert_array_equal(batch_BX, np.concatenate(halves, axis=1))
  assert data.about['target_site'] == WRITTEN
  with pytest.raises(errors.UserError, match='harvest both sites in one pass'):
    store_lib.open_store(both, READ, target_site='blocks.1.mlp_out')


def transcoder(**fields):
  config = planted.train_config(site=READ, steps=60, mesh_latent=1)
  sae = dataclasses.replace(config.sae, target_site=WRITTEN, **fields)
  return dataclasses.replace(config, sae=sae)


@pytest.mark.parametrize('skip', [False, True])
def test_a_transcoder_is_trained_and_goes_on(both, tmp_path, skip):
  config = transcoder(skip=skip)
  whole = training.train(config, both, str(tmp_path / 'whole'))
  half = dataclasses.replace(config, steps=30)
  training.train(half, both, str(tmp_path / 'parts'))
  again = training.train(config, both, str(tmp_path / 'parts'))
  for a, b in zip(jax.tree.leaves(whole.sae), jax.tree.leaves(again.sae)):
    np.testing.assert_array_equal(a, b)
  trained = checkpoint.load(str(tmp_path / 'whole'))
  assert trained.config.target_site == WRITTEN
  data = store_lib.open_store(both, READ, target_site=WRITTEN)
  rows = data.test_rows
  x_RD, target_RD = np.split(data.read_rows(rows.start, rows.stop), 2, axis=1)
  away_RD = target_RD - target_RD.mean(0)
  missed_RD = target_RD - trained.reconstruct(x_RD)
  fvu = (missed_RD**2).sum() / (away_RD**2).sum()
  assert fvu < 0.6
  # Control: what it reconstructs is not what it reads.
  assert ((x_RD - trained.reconstruct(x_RD)) ** 2).sum() > (x_RD**2).sum() / 2
  if skip:
    assert np.abs(trained.sae.target['w_skip_DD']).max() > 1e-3


@pytest.mark.parametrize('preprocessing', autoencoder.PREPROCESSING)
def test_what_is_written_begins_with_the_length_of_what_is_read(preprocessing):
  config = autoencoder.SaeConfig(
    d_model=16, n_latents=32, k=4, preprocessing=preprocessing,
    target_site=WRITTEN, encoder_gain='norm', decoder_init='random',
  )  # fmt: skip
  rows_RD = planted.activations(400)
  rows_RX = np.concatenate([rows_RD, 1e3 * planted.targets(rows_RD)], axis=1)
  sae = autoencoder.init_weights(config, jax.random.key(0))
  sae, mse_of_mean = jax.jit(autoencoder.fit_inputs, static_argnums=0)(
    config, sae, rows_RX
  )
  x_RD, _ = autoencoder.preprocess(config, sae, rows_RX)
  away_RD = np.asarray(x_RD) - np.asarray(x_RD).mean(0)
  np.testing.assert_allclose(mse_of_mean, (away_RD**2).sum(1).mean(), rtol=1e-3)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(errors.UserError, match='skip is for a transcoder'):
    dataclasses.replace(CONFIG, skip=True)
  with pytest.raises(errors.UserError, match='a store that holds both'):
    dataclasses.replace(transcoder(), stream=True)

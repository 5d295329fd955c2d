"""Directions beside channels, fewer directions, and other runs' directions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.autoencoder import SaeConfig
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import figures, meta
from sae_jax.probing.suite.evaluations import neurons, structure
from tests.support import probed, suites


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


@pytest.fixture(scope='module')
def trained(data):
  return probed.make_trained(data)


def figure(evaluation, outcome, name, who='trained'):
  return figures.figure(evaluation.STATISTICS[name], outcome.samples[who]).value


@pytest.mark.parametrize('activation', ['topk', 'relu'])
def test_correlations_are_those_of_their_definition(
  data, monkeypatch, activation
):
  """Beside float64 over the same rows, and of other rows much lower."""
  suites.shrink(monkeypatch, neurons, latents=3, rows=60, batch_rows=16)
  monkeypatch.setattr(neurons, '_LEAST_FIRINGS', 4)
  trained = probed.make_trained(data, activation=activation)
  context = suites.context(trained, data, scored={'trained': trained})
  outcome = neurons.measure(context)
  drawn = context.rows(60, 'neurons')
  sample = outcome.samples['trained']
  assert len(sample.unit_U) == 15 and set(sample.draw_U) == set(range(5))
  for latent, draw, got, counted in zip(
    sample.unit_U, sample.draw_U, sample.sums['correlation'],
    sample.sums['latents'],
  ):  # fmt: skip
    raw_BD = np.float64(drawn.raw_BD[drawn.draw_B == draw])
    x_BD, _ = probed.inputs(trained, raw_BD)
    a_B = probed.latents(trained, x_BD)[:, latent]
    assert counted == ((a_B > 0).sum() >= 4)
    if counted:
      every = np.corrcoef(np.column_stack([a_B, raw_BD]).T)[0, 1:]
      assert got == pytest.approx(np.abs(every).max(), abs=1e-4)
  assert 7 < sample.sums['latents'].sum() < 15
  got, chance = (
    figure(neurons, outcome, 'correlation', who)
    for who in ('trained', neurons.SHUFFLED)
  )
  assert got > chance + 0.1


def test_a_copy_of_a_channel_is_one(data, trained, monkeypatch):
  """Latents that are channels, and one of all channels alike."""
  suites.shrink(monkeypatch, neurons, latents=9, rows=60, batch_rows=64)
  config = SaeConfig(
    d_model=16, n_latents=16, k=4, activation='relu', preprocessing='none'
  )
  sae = trained.sae.replace(
    w_enc_ND=jnp.eye(16),
    w_dec_ND=jnp.eye(16),
    b_lat_N=jnp.full(16, 10.0),
    b_pre_D=jnp.zeros(16),
  )
  copies = dataclasses.replace(trained, config=config, sae=sae)
  outcome = neurons.measure(suites.context(copies, data, scored={'c': copies}))
  assert figure(neurons, outcome, 'correlation', 'c') == pytest.approx(
    1, abs=1e-4
  )
  assert figure(neurons, outcome, 'copies', 'c') == 1
  silent = dataclasses.replace(
    copies, sae=sae.replace(b_lat_N=-100.0 * jnp.ones(16))
  )
  with pytest.raises(
    context_lib.CannotMeasure, match='fires on 10 of its rows'
  ):
    neurons.measure(suites.context(silent, data, scored={'c': silent}))


def test_rows_of_few_directions_are_explained_by_fewer():
  """Of 200 rows, sums of two of 20 directions, a meta-autoencoder has nearly
  all; of rows at random, what chance gives."""
  rng = np.random.default_rng(0)
  atoms_MD = rng.standard_normal((20, 32))
  pairs = np.stack([rng.permutation(20)[:2] for _ in range(200)])
  planted_ND = atoms_MD[pairs].sum(1)
  random_ND = rng.standard_normal((200, 32))
  shares = []
  for rows_ND in (planted_ND, random_ND):
    left_N, total_N = meta.left(rows_ND, 400, 64, np.random.default_rng(1))
    unit_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
    want_N = ((unit_ND - unit_ND.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(total_N, want_N, rtol=1e-5)
    shares.append(1 - left_N.sum() / total_N.sum())
  assert shares[0] > 0.8 > 0.65 > shares[1] > 0.3
  # Lengths of rows count nothing.
  longer_N, _ = meta.left(
    planted_ND * rng.uniform(0.5, 2, (200, 1)), 5, 64, np.random.default_rng(1)
  )
  same_N, _ = meta.left(planted_ND, 5, 64, np.random.default_rng(1))
  np.testing.assert_allclose(longer_N, same_N, rtol=1e-4)


@pytest.mark.parametrize('is_larger', [True, False])
def test_splitting_is_counted_from_the_smaller_one(
  data, trained, monkeypatch, is_larger
):
  """Of 8 latents one has become three, one is lost, and six are whole."""
  suites.shrink(monkeypatch, structure, matched=64, meta_steps=2)
  rng = np.random.default_rng(0)
  small_ND = np.linalg.qr(rng.standard_normal((16, 16)))[0][:8]
  near = 0.1 * rng.standard_normal((8, 16))
  large_ND = np.concatenate([small_ND[[0, 0, 0, 2, 3, 4, 5, 6]] + near,
                             small_ND[7:] - 0.1 * small_ND[:1],
                             rng.standard_normal((3, 16))])  # fmt: skip
  # Rows at random are near to none.
  large_ND[9:] -= large_ND[9:] @ small_ND.T @ small_ND
  made = {}
  for name, rows_ND in (('small', small_ND), ('large', large_ND)):
    sae = trained.sae.replace(
      w_enc_ND=jnp.float32(rows_ND),
      w_dec_ND=jnp.float32(3 * rows_ND),
      b_lat_N=jnp.zeros(len(rows_ND)),
    )
    config = dataclasses.replace(trained.config, n_latents=len(rows_ND), k=2)
    made[name] = dataclasses.replace(trained, config=config, sae=sae)
  names = ('small', 'large') if is_larger else ('large', 'small')
  scored = {name: made[name] for name in names}
  outcome = structure.measure(
    suites.context(made[names[0]], data, scored=scored)
  )
  got = {
    name: figure(structure, outcome, name, names[1])
    for name in ('pieces', 'no_piece', 'one_piece', 'more_pieces')
  }
  assert got == {
    'pieces': 9 / 8, 'no_piece': 1 / 8, 'one_piece': 6 / 8,
    'more_pieces': 1 / 8,
  }  # fmt: skip
  # What is of the other's latents is as without it.
  assert figure(structure, outcome, 'nearest', names[1]) is not None
  assert figure(structure, outcome, 'pieces', names[0]) is None
  # Too many are not compared, and it says so.
  suites.shrink(monkeypatch, structure, matched=64, meta_steps=2, split=10)
  outcome = structure.measure(
    suites.context(made[names[0]], data, scored=scored)
  )
  assert figure(structure, outcome, 'pieces', names[1]) is None
  assert '12 latents are more than the 10' in outcome.remarks[0]

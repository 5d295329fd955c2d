"""The objective against a dense one in float64, term by term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.training import auxk, objective
from sae_jax.training.objective import terms as terms_lib
from sae_jax.training.shards import Shards
from tests.support import dense_reference
from tests.support.objective_checks import (
  CONFIG,
  dense,
  gradients_equal_dense_autodiff,
  largest_difference,
  MSE_OF_MEAN,
  ours,
  problem,
)

encode = jax.jit(autoencoder.encode, static_argnums=0)


@pytest.mark.parametrize('implementation', ['gather', 'dense'])
@pytest.mark.parametrize('weight', [0.0, 1 / 32, 100.0])
@pytest.mark.parametrize('multi_topk', [0, 4])
def test_gradients_equal_dense_autodiff(weight, implementation, multi_topk):
  gradients_equal_dense_autodiff(weight, implementation, multi_topk)


@pytest.mark.parametrize('parts', [2, 5, 20])
def test_micro_batches_change_nothing_but_rounding(parts):
  with jax.enable_x64(True):
    args = problem()
    want = ours(*args, 3.0, multi_topk=4)
    got = ours(*args, 3.0, multi_topk=4, micro_batches=parts)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert largest_difference(got[2], want[2]) < 1e-11
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1])):
      np.testing.assert_allclose(a, b, rtol=1e-12)


def test_relu_and_its_penalty_equal_dense_autodiff():
  config = dataclasses.replace(CONFIG, activation='relu')
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()

    @jax.jit
    @jax.value_and_grad
    def by_autodiff(params, weight):
      return dense_reference.relu_loss(
        sae.replace(**params), x_BD, MSE_OF_MEAN, weight
      )

    for weight in (0.0, 0.3):
      # k_aux is of no consequence: AuxK goes with TopK.
      value, terms, grads = ours(
        sae, x_BD, dead_N, sae_config=config, k_aux=7, sparsity_weight=weight
      )
      want, want_grads = by_autodiff(autoencoder.trained(sae), weight)
      np.testing.assert_allclose(value, want, rtol=1e-12)
      assert largest_difference(grads, want_grads) < 1e-10
    _, other = by_autodiff(autoencoder.trained(sae), 0.31)
    assert largest_difference(grads, other) > 1e-4
    vals_BN, _ = encode(config, sae, x_BD)
    vals_BN = np.asarray(vals_BN)
    np.testing.assert_allclose(terms.l0, (vals_BN > 0).sum(1).mean())
    np.testing.assert_array_equal(terms.fired_N, (vals_BN > 0).any(0))


@pytest.mark.parametrize('bandwidth', [0.1, 1.0])
def test_jump_relu_and_its_estimates_equal_those_by_hand(bandwidth):
  config = dataclasses.replace(CONFIG, activation='jumprelu')
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    thresholds_N = np.linspace(0.1, 2, CONFIG.n_latents)
    log_N = jnp.asarray(np.log(thresholds_N))
    sae = sae.replace(extra={'log_threshold_N': log_N})
    value, terms, grads = ours(
      sae, x_BD, dead_N, sae_config=config, k_aux=0, sparsity_weight=0.02,
      jump_bandwidth=bandwidth,
    )  # fmt: skip
    want, want_grads = jax.jit(dense_reference.jump_gradients)(
      sae, x_BD, MSE_OF_MEAN, 0.02, bandwidth * MSE_OF_MEAN**0.5
    )
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert largest_difference(grads, want_grads) < 1e-10
    assert np.abs(grads['log_threshold_N']).max() > 0
    vals_BN, _ = encode(config, sae, x_BD)
    vals_BN = np.asarray(vals_BN)
    np.testing.assert_allclose(terms.penalty, (vals_BN > 0).sum(1).mean())
    assert (vals_BN > 0).sum() < x_BD.shape[0] * 48 / 2


def aux_gradients(args, **kwargs):
  """The gradient of AuxK alone: with it, minus without it."""
  _, _, grads = ours(*args, 1.0, k_aux=48, **kwargs)
  _, _, plain = ours(*args, 1.0, k_aux=0, **kwargs)
  return jax.tree.map(np.subtract, grads, plain)


def touched(grad_ND):
  return np.flatnonzero(np.abs(np.asarray(grad_ND)).max(axis=1) > 0)


# Latents that are dead or alive, as the size AuxK works on grows past them.
@pytest.mark.parametrize('dead', [range(0, 48, 4), [3], [47], range(20)])
@pytest.mark.parametrize('sizes', [(), (1, 12, 20)])
def test_aux_reaches_exactly_the_dead_latents(monkeypatch, dead, sizes):
  monkeypatch.setattr(auxk, '_sizes', lambda n: [*sizes, n])
  with jax.enable_x64(True):
    args = problem(dead=dead)
    grads = aux_gradients(args)
    np.testing.assert_array_equal(touched(grads['w_enc_ND']), list(dead))
    np.testing.assert_array_equal(touched(grads['w_dec_ND']), list(dead))
    np.testing.assert_array_equal(np.flatnonzero(grads['b_lat_N']), list(dead))
    assert not np.any(grads['b_pre_D'])
    _, _, want = dense(*args)
    _, _, got = ours(*args)
    assert largest_difference(got, want) < 1e-10


def test_no_dead_latent_means_no_aux():
  with jax.enable_x64(True):
    args = problem(dead=[])
    _, terms, grads = ours(*args, 1.0)
    assert terms.aux == 0
    _, _, plain = ours(*args, k_aux=0)
    assert largest_difference(grads, plain) == 0


def test_fewer_dead_latents_than_k_aux():
  with jax.enable_x64(True):
    args = problem(dead=[3, 11])
    got, want = ours(*args, 2.0), dense(*args, 2.0)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert largest_difference(got[2], want[2]) < 1e-10


@jax.jit
def aux_error(sae, x_BD, error_BD, dead_N):
  settings = auxk.Aux(k=7, weight=1.0)
  zeros = jax.tree.map(jnp.zeros_like, sae)
  return auxk.aux_error(
    settings, sae, zeros, x_BD, error_BD, dead_N, 48, Shards()
  )


@pytest.mark.parametrize('spoilt', ['nothing is missed', 'error', 'latent'])
def test_aux_that_is_not_finite_counts_as_nothing(spoilt):
  sae, x_BD, dead_N = problem()
  error_BD = np.ones_like(x_BD)
  # Control: what follows would count otherwise.
  value, grads = aux_error(sae, x_BD, error_BD, dead_N)
  assert value > 0 and np.any(grads.w_dec_ND)
  if spoilt == 'nothing is missed':
    error_BD[:] = 0
  elif spoilt == 'error':
    error_BD[0, 0] = np.inf
  else:
    b_lat_N = np.array(sae.b_lat_N)
    b_lat_N[4] = np.inf
    sae = sae.replace(b_lat_N=b_lat_N)
  value, grads = aux_error(sae, x_BD, error_BD, dead_N)
  assert value == 0
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_terms_count_what_fired():
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    _, terms, _ = ours(sae, x_BD, dead_N)
    vals_BK, idx_BK = encode(CONFIG, sae, x_BD)
  vals_BK, idx_BK = np.asarray(vals_BK), np.asarray(idx_BK)
  fired = np.unique(idx_BK[vals_BK > 0])
  np.testing.assert_array_equal(np.flatnonzero(terms.fired_N), fired)
  np.testing.assert_allclose(terms.l0, (vals_BK > 0).sum(1).mean(), rtol=1e-6)


def test_silent_winners_did_not_fire():
  # All pre-activations negative: TopK picks latents, ReLU silences them.
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    sae = dataclasses.replace(sae, b_lat_N=np.full(48, -1e4))
    _, terms, _ = ours(sae, x_BD, dead_N)
    assert terms.l0 == 0
    assert not np.any(terms.fired_N)


def test_counts_do_not_overflow():
  # 2^31 pairs and more, as a large batch of a baseline has them.
  active = jax.ShapeDtypeStruct((2**16, 2**16), bool)
  assert jax.eval_shape(terms_lib.count, active).dtype == jnp.float32
  wide_BN = jnp.ones((2**10, 2**10), bool)
  assert terms_lib.count(wide_BN) == 2**20
  # Its parts are counted over latents first.
  assert 'i32[1024]' in str(jax.make_jaxpr(terms_lib.count)(wide_BN))


def test_bfloat16_products_are_near_and_leave_float32():
  sae, x_BD, dead_N = problem()
  for implementation in ('gather', 'dense'):
    exact, rounded = (
      ours(
        sae, x_BD, dead_N, implementation=implementation,
        sae_config=dataclasses.replace(CONFIG, matmul=matmul, k=48),
        k_aux=0,
      )
      for matmul in ('float32', 'bfloat16')
    )  # fmt: skip
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(rounded[2]))
    np.testing.assert_allclose(rounded[0], exact[0], rtol=0.01)
    pairs = zip(jax.tree.leaves(rounded[2]), jax.tree.leaves(exact[2]))
    for got, want in (map(np.asarray, pair) for pair in pairs):
      assert (got != want).any()
      cosine = (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)
      assert cosine > 0.999


@pytest.mark.parametrize(
  ('sae_config', 'options', 'message'),
  [
    ({}, {'sparsity_weight': 0.1}, 'sparsity_weight 0.1 does nothing with'),
    ({}, {'multi_topk': 10}, 'multi_topk 10 times k 5 exceeds the 48 latents: '
     'use 9 or less'),
    ({'activation': 'relu'}, {'multi_topk': 4}, 'multi_topk 4 needs topk'),
    ({'activation': 'relu'}, {'topk_recall': 0.9}, 'recall 0.9 needs topk'),
  ],
)  # fmt: skip
def test_terms_that_do_not_fit_are_refused(sae_config, options, message):
  with pytest.raises(errors.UserError, match=message):
    objective.check(
      dataclasses.replace(CONFIG, **sae_config),
      objective.ObjectiveConfig(**options),
    )

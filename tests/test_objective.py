"""The objective against a dense one in float64, term by term."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, objective, sparse
from tests import dense_reference

pytestmark = pytest.mark.fast

CONFIG = autoencoder.SaeConfig(d_model=12, n_latents=48, k=5)
MSE_OF_MEAN = 0.7


def problem(seed=0, dead=range(0, 48, 4)):
  """A random float64 autoencoder, tokens and dead latents."""
  rng = np.random.default_rng(seed)
  n, d = CONFIG.n_latents, CONFIG.d_model
  sae = autoencoder.Sae(
    w_enc_ND=jnp.asarray(rng.standard_normal((n, d))),
    w_dec_ND=autoencoder.unit_rows(jnp.asarray(rng.standard_normal((n, d)))),
    b_lat_N=jnp.asarray(0.1 * rng.standard_normal(n)),
    b_pre_D=jnp.asarray(rng.standard_normal(d)),
    data_mean_D=jnp.zeros(d),
    data_scale=jnp.ones(()),
  )
  dead_N = np.zeros(n, bool)
  dead_N[list(dead)] = True
  return sae, jnp.asarray(rng.standard_normal((20, d))), jnp.asarray(dead_N)


def gradients(loss, sae, *args):
  """Value and gradients of what is trained."""
  names = ('w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D')

  def of(params):
    return loss(sae.replace(**params), *args)

  params = {name: getattr(sae, name) for name in names}
  (value, terms), grads = jax.value_and_grad(of, has_aux=True)(params)
  return value, terms, grads


def sparse_loss(weight, implementation=None):
  config = objective.ObjectiveConfig(k_aux=7, aux_weight=weight)
  return functools.partial(
    objective.loss,
    mse_of_mean=MSE_OF_MEAN,
    sae_config=CONFIG,
    config=config,
    implementation=implementation,
  )


def dense_loss(weight):
  return functools.partial(
    dense_reference.loss,
    mse_of_mean=MSE_OF_MEAN,
    k=CONFIG.k,
    k_aux=7,
    aux_weight=weight,
  )


def largest_difference(got, want):
  return max(
    float(abs(g - w).max() / (abs(w).max() + 1e-30))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want))
  )


@pytest.mark.parametrize('implementation', ['gather', 'dense'])
@pytest.mark.parametrize('weight', [0.0, 1 / 32, 100.0])
def test_gradients_equal_dense_autodiff(weight, implementation):
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    loss = sparse_loss(weight, implementation)
    value, terms, grads = gradients(loss, sae, x_BD, dead_N)
    want, (nmse, aux), want_grads = gradients(
      dense_loss(weight), sae, x_BD, dead_N
    )
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(terms.nmse, nmse, rtol=1e-12)
    np.testing.assert_allclose(terms.aux, aux, rtol=1e-12)
    assert float(aux) > 0
    assert largest_difference(grads, want_grads) < 1e-10


def aux_gradients(sae, x_BD, dead_N, aux=objective.aux_error, k_aux=48):
  def of(sae):
    vals_BK, idx_BK = autoencoder.encode(CONFIG, sae, x_BD)
    error_BD = x_BD - autoencoder.decode(sae, vals_BK, idx_BK)
    return aux(sae, x_BD, error_BD, dead_N, k_aux)

  return jax.grad(of)(sae)


def touched(grad_ND):
  return np.flatnonzero(np.abs(np.asarray(grad_ND)).max(axis=1) > 0)


def test_aux_reaches_exactly_the_dead_latents():
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    grads = aux_gradients(sae, x_BD, dead_N)
    dead = np.flatnonzero(dead_N)
    np.testing.assert_array_equal(touched(grads.w_enc_ND), dead)
    np.testing.assert_array_equal(touched(grads.w_dec_ND), dead)
    np.testing.assert_array_equal(np.flatnonzero(grads.b_lat_N), dead)
    assert not grads.b_pre_D.any()


def attached_target(sae, x_BD, error_BD, dead_N, k_aux):
  """Defect: the error is not detached, so AuxK trains the living too."""
  vals_BK, idx_BK = sparse.encode_topk(
    x_BD - sae.b_pre_D, sae.w_enc_ND, sae.b_lat_N, k_aux, mask_N=dead_N
  )
  model_BD = sparse.decode(jax.nn.relu(vals_BK), idx_BK, sae.w_dec_ND)
  return ((error_BD - model_BD) ** 2).sum() / (error_BD**2).sum()


def frozen_encoder(sae, x_BD, error_BD, dead_N, k_aux):
  """Defect: the dead latents' values carry no gradient to the encoder."""
  fixed = sae.replace(w_enc_ND=jax.lax.stop_gradient(sae.w_enc_ND))
  return objective.aux_error(fixed, x_BD, error_BD, dead_N, k_aux)


def test_control_defects_of_aux_are_seen():
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    dead = np.flatnonzero(dead_N)
    attached = aux_gradients(sae, x_BD, dead_N, attached_target)
    assert len(touched(attached.w_dec_ND)) > len(dead)
    frozen = aux_gradients(sae, x_BD, dead_N, frozen_encoder)
    assert len(touched(frozen.w_enc_ND)) == 0


def test_no_dead_latent_means_no_aux():
  sae, x_BD, dead_N = problem(dead=[])
  _, terms, grads = gradients(sparse_loss(1.0), sae, x_BD, dead_N)
  assert terms.aux == 0
  _, _, plain = gradients(sparse_loss(0.0), sae, x_BD, dead_N)
  assert largest_difference(grads, plain) == 0


def test_fewer_dead_latents_than_k_aux():
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem(dead=[3, 11])
    got = gradients(sparse_loss(2.0), sae, x_BD, dead_N)
    want = gradients(dense_loss(2.0), sae, x_BD, dead_N)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert largest_difference(got[2], want[2]) < 1e-10


def test_aux_that_is_not_finite_counts_as_nothing():
  sae, x_BD, dead_N = problem()
  flat_BD = jnp.zeros_like(x_BD)

  def of(sae, error_BD):
    return objective.aux_error(sae, x_BD, error_BD, dead_N, 7)

  for error_BD in (flat_BD, flat_BD.at[0, 0].set(jnp.inf)):
    value, grads = jax.value_and_grad(of)(sae, error_BD)
    assert value == 0
    assert all(
      np.isfinite(g).all() and not g.any() for g in jax.tree.leaves(grads)
    )


def test_terms_count_what_fired():
  sae, x_BD, dead_N = problem()
  _, terms = sparse_loss(0.0)(sae, x_BD, dead_N)
  vals_BK, idx_BK = autoencoder.encode(CONFIG, sae, x_BD)
  vals_BK, idx_BK = np.asarray(vals_BK), np.asarray(idx_BK)
  fired = np.unique(idx_BK[vals_BK > 0])
  np.testing.assert_array_equal(np.flatnonzero(terms.fired_N), fired)
  np.testing.assert_allclose(terms.l0, (vals_BK > 0).sum(1).mean(), rtol=1e-6)


def test_silent_winners_did_not_fire():
  # All pre-activations negative: TopK picks latents, ReLU silences them.
  sae, x_BD, dead_N = problem()
  sae = dataclasses.replace(sae, b_lat_N=jnp.full(48, -1e4))
  _, terms = sparse_loss(0.0)(sae, x_BD, dead_N)
  assert terms.l0 == 0
  assert not terms.fired_N.any()

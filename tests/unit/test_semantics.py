"""Ways of others to make an autoencoder, against float64: values, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.autoencoder.nonlinearity import groupmax
from sae_jax.training import optimizer
from tests.support import dense_reference
from tests.support.objective_checks import (
  CONFIG,
  largest_difference,
  MSE_OF_MEAN,
  ours,
  problem,
)

OUTPUT = dataclasses.replace(CONFIG, pre_bias='output')
# Of 48 latents.
GROUPS = dataclasses.replace(CONFIG, activation='groupmax', k=6)
GATED = dataclasses.replace(CONFIG, activation='gated')


def extra(config, seed=3):
  """Parameters of a nonlinearity that are not those it begins with."""
  rng = np.random.default_rng(seed)
  n = config.n_latents
  return {
    'gated': lambda: {
      'r_mag_N': jnp.asarray(0.3 * rng.standard_normal(n)),
      'b_mag_N': jnp.asarray(0.3 * rng.standard_normal(n)),
    },
    'jumprelu': lambda: {'threshold_N': jnp.asarray(rng.uniform(0.1, 2, n))},
  }.get(config.activation, dict)()


def by_autodiff(config, sae, x_BD, dead_N, weight=0.0, k_aux=7):
  def of(params):
    return dense_reference.loss_of(
      config,
      autoencoder.with_arrays(sae, params),
      x_BD,
      dead_N,
      MSE_OF_MEAN,
      weight,
      k_aux=k_aux,
    )

  return jax.jit(jax.value_and_grad(of))(autoencoder.trained(sae))


@pytest.mark.parametrize('implementation', ['gather', 'dense'])
def test_a_bias_that_the_encoder_does_not_read_with_topk(implementation):
  with jax.enable_x64(True):
    args = problem()
    value, _, grads = ours(
      *args, sae_config=OUTPUT, implementation=implementation
    )
    want, want_grads = by_autodiff(OUTPUT, *args)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert largest_difference(grads, want_grads) < 1e-10
    # Control: it is another loss.
    other, other_grads = by_autodiff(CONFIG, *args)
    assert abs(other / want - 1) > 1e-3
    assert largest_difference(grads, other_grads) > 1e-3


@pytest.mark.parametrize(
  'config',
  [
    dataclasses.replace(OUTPUT, activation='relu'),
    GATED,
    dataclasses.replace(GATED, pre_bias='output'),
    GROUPS,
  ],
  ids=lambda c: f'{c.activation}-{c.pre_bias}',
)
def test_gradients_equal_dense_autodiff(config):
  penalised = config.activation in ('relu', 'gated')
  weight = 0.3 if penalised else 0.0
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    sae = sae.replace(extra=extra(config))
    options = {'sparsity_weight': weight} if penalised else {}
    value, terms, grads = ours(
      sae, x_BD, dead_N, sae_config=config, k_aux=7, **options
    )
    args = config, sae, x_BD, dead_N
    want, want_grads = by_autodiff(*args, weight)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert largest_difference(grads, want_grads) < 1e-10
    codes_BN = dense_reference.codes_of(config, sae, x_BD)
    np.testing.assert_allclose(terms.l0, (codes_BN > 0).sum(1).mean())
    np.testing.assert_array_equal(terms.fired_N, (codes_BN > 0).any(0))
    # Controls: each term is seen.
    other = dict(weight=0.31) if penalised else dict(k_aux=3)
    _, other_grads = by_autodiff(*args, **{'weight': weight} | other)
    assert largest_difference(grads, other_grads) > 1e-6


def test_gates_learn_by_their_own_reconstruction_alone():
  """The gates' reconstruction teaches neither decoder nor b_pre."""
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    sae = sae.replace(extra=extra(GATED))
    _, terms, grads = ours(sae, x_BD, dead_N, sae_config=GATED)
    assert terms.multi > 0 and np.abs(grads['b_lat_N']).max() > 0
    z_BN = dense_reference.codes_of(GATED, sae, x_BD)

    def plain(w_dec_ND, b_pre_D):
      missed_BD = x_BD - z_BN @ w_dec_ND - b_pre_D
      return (missed_BD**2).sum(1).mean() / MSE_OF_MEAN

    want_ND = jax.grad(plain)(sae.w_dec_ND, sae.b_pre_D)
    np.testing.assert_allclose(grads['w_dec_ND'], want_ND, rtol=1e-9)


def test_the_first_of_equals_is_a_group_s_largest():
  config = dataclasses.replace(CONFIG, n_latents=6, k=2, activation='groupmax')
  pre_BN = jnp.array([[1.0, 2, 2, 0, 0, 0], [-1, -2, -3, 4, 5, 3]])
  want_BN = np.zeros((2, 6), bool)
  want_BN[[0, 0, 1, 1], [1, 3, 0, 4]] = True
  np.testing.assert_array_equal(groupmax.largest(config, pre_BN, None), want_BN)
  with pytest.raises(errors.UserError, match='use a multiple of 5'):
    autoencoder.init_weights(
      dataclasses.replace(config, n_latents=6, k=5), jax.random.key(0)
    )


@pytest.mark.parametrize('threshold', [0.5, 0.0, -1.0])
def test_a_threshold_is_trained_as_it_is(threshold):
  """Beside the same one as its logarithm; one below 0 is that of a ReLU."""
  config = dataclasses.replace(CONFIG, activation='jumprelu')
  value_config = dataclasses.replace(config, jump_threshold='value')
  options = {'k_aux': 0, 'sparsity_weight': 0.02, 'jump_bandwidth': 1.0}
  with jax.enable_x64(True):
    sae, x_BD, dead_N = problem()
    n = config.n_latents
    as_value = sae.replace(extra={'threshold_N': jnp.full(n, threshold)})
    value, _, grads = ours(
      as_value, x_BD, dead_N, sae_config=value_config, **options
    )
    if threshold <= 0:
      relu = dataclasses.replace(config, activation='relu')
      _, terms, _ = ours(sae, x_BD, dead_N, sae_config=relu, k_aux=0)
      np.testing.assert_allclose(value - 0.02 * terms.l0, terms.nmse)
      return
    as_log = sae.replace(
      extra={'log_threshold_N': jnp.full(n, np.log(threshold))}
    )
    want, _, want_grads = ours(
      as_log, x_BD, dead_N, sae_config=config, **options
    )
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(
      threshold * grads['threshold_N'],
      want_grads['log_threshold_N'],
      rtol=1e-9,
      atol=1e-15,
    )
    assert np.abs(grads['threshold_N']).max() > 0


def test_a_free_decoder_is_a_parameter_as_others():
  config = optimizer.OptimizerConfig(learning_rate=0.1, ema_decay=0.0)
  sae, *_ = problem()
  sae = jax.tree.map(lambda a: jnp.asarray(2 * a, jnp.float32), sae)
  grads = jax.tree.map(jnp.ones_like, sae)
  state = optimizer.init(config, sae)
  new, _, norm = optimizer.update(
    config, sae, state, grads, jnp.float32(0.1), unit_rows=False
  )
  # Adam's first step is the rate, whatever the gradient.
  np.testing.assert_allclose(new.w_dec_ND, sae.w_dec_ND - 0.1, atol=1e-5)
  elements = sum(a.size for a in autoencoder.trained(sae).values())
  np.testing.assert_allclose(norm, elements**0.5, rtol=1e-6)
  # Control: with unit rows it is none.
  unit, *_ = optimizer.update(config, sae, state, grads, jnp.float32(0.1))
  np.testing.assert_allclose(
    np.linalg.norm(unit.w_dec_ND, axis=1), 1, rtol=1e-5
  )


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
def test_unit_rms_is_of_each_token(scale):
  config = dataclasses.replace(CONFIG, preprocessing='unit_rms')
  sae, raw_BD, _ = problem()
  sae = jax.tree.map(jnp.float32, sae)
  raw_BD = scale * np.asarray(raw_BD, np.float32)
  raw_BD[0] = 0
  x_BD, affine = autoencoder.preprocess(config, sae, raw_BD)
  rms_B = np.sqrt((np.float64(raw_BD) ** 2).mean(1))
  np.testing.assert_allclose(x_BD[1:], raw_BD[1:] / rms_B[1:, None], rtol=1e-5)
  assert not np.any(x_BD[0])
  np.testing.assert_allclose(
    autoencoder.restore(affine, x_BD), raw_BD, rtol=1e-5
  )

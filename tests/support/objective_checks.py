"""The objective, and a dense one in float64 that it must equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder
from sae_jax.training import auxk, objective
from tests.support import dense_reference

CONFIG = autoencoder.SaeConfig(d_model=12, n_latents=48, k=5)
MSE_OF_MEAN = 0.7


def problem(seed=0, dead=range(0, 48, 4)):
  """A random float64 autoencoder, tokens and dead latents."""
  rng = np.random.default_rng(seed)
  n, d = CONFIG.n_latents, CONFIG.d_model
  w_enc_ND, w_dec_ND = rng.standard_normal((2, n, d))
  w_dec_ND /= np.linalg.norm(w_dec_ND, axis=1, keepdims=True)
  sae = autoencoder.Sae(
    w_enc_ND=jnp.asarray(w_enc_ND),
    w_dec_ND=jnp.asarray(w_dec_ND),
    b_lat_N=jnp.asarray(0.1 * rng.standard_normal(n)),
    b_pre_D=jnp.asarray(rng.standard_normal(d)),
    data_mean_D=jnp.asarray(np.zeros(d)),
    data_scale=jnp.asarray(np.ones(())),
  )
  dead_N = np.zeros(n, bool)
  dead_N[list(dead)] = True
  return sae, jnp.asarray(rng.standard_normal((20, d))), jnp.asarray(dead_N)


@dataclasses.dataclass(frozen=True)
class _Traced(objective.ObjectiveConfig):
  """Terms whose weights a compiled program takes as arguments."""

  def __post_init__(self):
    """Compares nothing: the value of a traced weight is not known yet."""


@functools.cache
def program(aux_sizes):
  """`objective.value_and_grad`, compiled; clear it when its code changes.

  Args:
    aux_sizes: what `auxk` is given as sizes of its copy while this is traced.
  """
  del aux_sizes

  def do(sae, x_BD, dead_N, weights, sae_config, options, others):
    config = _Traced(**weights, **dict(options))
    return objective.value_and_grad(
      sae, x_BD, dead_N, MSE_OF_MEAN, sae_config, config, **dict(others)
    )

  # Its results are compared, not its speed.
  return jax.jit(
    do,
    static_argnames=('sae_config', 'options', 'others'),
    compiler_options={'xla_backend_optimization_level': 0},
  )


def ours(sae, x_BD, dead_N, weight=1 / 32, sae_config=CONFIG, **kwargs):
  """Value, terms and gradients of what is trained."""
  weights = {'aux_weight': weight}
  for name in {'sparsity_weight', 'jump_bandwidth'} & set(kwargs):
    weights[name] = kwargs.pop(name)
  options = {'k_aux': 7}
  names = {
    field.name for field in dataclasses.fields(objective.ObjectiveConfig)
  }
  options |= {name: kwargs.pop(name) for name in names & set(kwargs)}
  objective.ObjectiveConfig(**weights, **options)
  aux_sizes = auxk._sizes(len(dead_N)) if options['k_aux'] else ()
  (value, terms), grads = program(tuple(aux_sizes))(
    sae,
    x_BD,
    dead_N,
    weights,
    sae_config=sae_config,
    options=tuple(sorted(options.items())),
    others=tuple(sorted(kwargs.items())),
  )
  return value, terms, autoencoder.trained(grads)


# Its operations would take longest to compile one by one.
@functools.partial(jax.jit, static_argnames=('codes', 'wide'))
def dense(sae, x_BD, dead_N, weight=1 / 32, **kwargs):
  def of(params):
    return dense_reference.loss(
      sae.replace(**params), x_BD, dead_N, MSE_OF_MEAN, CONFIG.k, 7, weight,
      **kwargs,
    )  # fmt: skip

  (value, terms), grads = jax.value_and_grad(of, has_aux=True)(
    autoencoder.trained(sae)
  )
  return value, terms, grads


def largest_difference(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
  return max(
    float(abs(g - w).max() / (abs(w).max() + 1e-30))
    for g, w in (map(np.asarray, pair) for pair in pairs)
  )


def gradients_equal_dense_autodiff(weight, implementation, multi_topk):
  with jax.enable_x64(True):
    args = problem()
    value, terms, grads = ours(
      *args, weight, multi_topk=multi_topk, implementation=implementation
    )
    want, (nmse, aux), want_grads = dense(
      *args, weight, wide=multi_topk * CONFIG.k, wide_weight=1 / 8
    )
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(terms.nmse, nmse, rtol=1e-12)
    np.testing.assert_allclose(terms.aux, aux, rtol=1e-12)
    assert float(aux) > 0
    multi = (want - nmse - weight * aux) * 8
    np.testing.assert_allclose(terms.multi, multi, rtol=1e-9, atol=1e-12)
    assert (multi > 0.01) == (multi_topk > 0)
    assert largest_difference(grads, want_grads) < 1e-10
    # Control: each term is seen.
    _, _, other = dense(*args, weight + 1)
    assert largest_difference(grads, other) > 1e-4
    if multi_topk:
      _, _, narrow = dense(*args, weight)
      assert largest_difference(grads, narrow) > 1e-4

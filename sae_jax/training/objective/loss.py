"""The loss over a batch and its gradients, whatever the nonlinearity."""

import functools

import jax
import jax.numpy as jnp

from sae_jax import autoencoder, ops
from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.ops import Diagnostics, varying
from sae_jax.training import auxk
from sae_jax.training.objective import registry, terms
from sae_jax.training.objective.config import ObjectiveConfig
from sae_jax.training.shards import Shards, zeros_like


def value_and_grad(
  sae: Sae,
  x_BD: jax.Array,
  dead_N: jax.Array,
  mse_of_mean: jax.Array,
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  *,
  micro_batches: int = 1,
  data_axis: str | None = None,
  latent_axis: str | None = None,
  implementation: str | None = None,
) -> tuple[tuple[jax.Array, terms.Terms], Sae]:
  """The loss over a batch and its gradients (Gao et al. 2024, section A.2).

  NMSE + alpha AuxK, + NMSE(4k) / 8 with Multi-TopK, or + lambda times the
  penalty of a baseline. Inside `jax.shard_map` the arguments are one shard's
  and the results the whole batch's.

  Args:
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations, from `autoencoder.tokens`.
    dead_N: which latents are dead.
    mse_of_mean: squared error of the mean predictor per token, a constant
      measured on a sample at the start of training.
    sae_config: the autoencoder's config.
    config: the terms.
    micro_batches: number of parts in which the shard's tokens are worked on,
      one after another, for less memory; the sums are those of all.
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    (loss, terms) and gradients shaped as `sae`.
  """
  shards = Shards(data_axis, latent_axis, micro_batches)
  setting = terms.Setting(
    sae_config=sae_config,
    config=config,
    shards=shards,
    tokens=x_BD.shape[0] * shards.token_shards,
    mse_of_mean=mse_of_mean,
    implementation=implementation,
  )
  method = registry.of(sae_config.activation)

  # The parameters are the same on all shards of the tokens. Marked as if they
  # were not, their gradients stay each device's own through all micro-batches
  # and are summed over the shards once, below, instead of in every backward
  # pass.
  own = jax.tree.map(lambda a: varying.match(a, x_BD), sae)
  prepared = method.prepare(setting, own, x_BD)

  # A scan over micro-batches must start from zeros of the very types that a
  # pass returns.
  sums = terms.Sums.zeros(x_BD, dead_N)
  zeros = (jnp.zeros_like(sums.error), zeros_like(own), sums)
  none_redone = Diagnostics(sums.active, sums.active)
  run = functools.partial(_run, setting, method, own, prepared)
  (total, diagnostics), (error_BD, observed) = method.fold(
    setting, run, (zeros, none_redone), x_BD
  )
  value, grads, sums = total

  # AuxK comes after all micro-batches, for two reasons: its norm is the error
  # of the whole batch, and it only reaches dead latents, so that its gradient
  # is computed for their rows alone and scattered into the others'. Its target,
  # the error, is a constant.
  aux = jnp.zeros((), x_BD.dtype)
  if config.k_aux and method.AUXK:
    bias_D = autoencoder.input_bias(sae_config, own)
    read_BD, _ = autoencoder.halves(sae_config, x_BD)
    aux, grads = auxk.add_gradient(
      _aux(setting),
      own.replace(b_pre_D=bias_D),
      grads,
      read_BD,
      error_BD,
      dead_N,
      shards,
    )

  loss = shards.over_tokens(value) + config.aux_weight * aux
  observed = {name: array[0] for name, array in observed.items()}
  return (
    (loss, _terms(setting, sums, diagnostics, aux, observed)),
    jax.tree.map(shards.over_tokens, grads),
  )


def _run(setting, method, own, prepared, x_BD, candidates):
  """A pass over some tokens: its sums, values of each token, `exhausted`."""
  share = functools.partial(_share, setting, method, prepared, x_BD, candidates)
  tally_N = jnp.zeros_like(own.b_lat_N)
  (value, result), (grads, used_N) = jax.value_and_grad(
    share, (0, 1), has_aux=True
  )(own, tally_N)
  # TopK's backward pass adds up by latent anyway, so it knows which fired. The
  # other nonlinearities have counted them, and their tally has no gradient.
  sums = result.sums.replace(fired_N=result.sums.fired_N + (used_N > 0))
  return (
    ((value, grads, sums), result.diagnostics),
    (result.error_BD, result.observed),
    result.exhausted,
  )


def _share(setting, method, prepared, x_BD, candidates, sae, tally_N):
  """These tokens' part of the loss without AuxK, and their `terms.Pass`."""
  config = setting.config
  result = method.sums(setting, sae, x_BD, prepared, tally_N, candidates)
  weight = method.second_weight(config)
  error = result.sums.error + weight * result.sums.multi
  total = error / setting.mse_of_mean
  total += config.sparsity_weight * result.sums.penalty
  return total / setting.tokens, result


def _aux(setting):
  sae_config, config = setting.sae_config, setting.config
  chosen = ops.choose(
    sae_config.n_latents,
    config.widest(sae_config.k),
    setting.implementation,
    sae_config.d_model,
  )
  return auxk.Aux(
    k=config.k_aux,
    weight=config.aux_weight,
    dtype=sae_config.matmul_dtype,
    # AuxK takes kernels if they are chosen for all latents: None would choose
    # by the number of dead ones.
    implementation='pallas' if chosen == 'pallas' else setting.implementation,
  )


def _terms(setting, sums, diagnostics, aux, observed):
  """The terms: sums of all devices, per token."""
  shards, tokens = setting.shards, setting.tokens
  active, diagnostics = shards.over_tokens(
    shards.over_latents((sums.active, diagnostics))
  )
  per_shard = tokens * shards.latent_shards
  return terms.Terms(
    nmse=shards.over_tokens(sums.error) / tokens / setting.mse_of_mean,
    aux=aux,
    multi=shards.over_tokens(sums.multi) / tokens / setting.mse_of_mean,
    penalty=shards.over_tokens(sums.penalty) / tokens,
    l0=active / tokens,
    fired_N=_fired(shards, sums.fired_N),
    diagnostics=jax.tree.map(lambda total: total / per_shard, diagnostics),
    observed=observed,
  )


def _fired(shards, fired_N):
  """Which latents fired for any token, of all shards."""
  return shards.over_tokens(fired_N) > 0

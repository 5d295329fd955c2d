"""Losses by dense products, of codes with any number of active latents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import autoencoder, errors, ops
from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.ops import Diagnostics, scopes, varying
from sae_jax.training.objective import terms
from sae_jax.training.objective.config import ObjectiveConfig


def check_topk_alone(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError for terms that only TopK has."""
  if config.topk_recall < 1:
    raise errors.UserError(
      f'topk_recall {config.topk_recall} needs topk, the activation is '
      f'{sae_config.activation}: leave it 1'
    )
  if config.multi_topk:
    raise errors.UserError(
      f'multi_topk {config.multi_topk} needs topk, the activation is '
      f'{sae_config.activation}: leave it 0'
    )


def check_no_penalty(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError for a penalty, which k makes needless."""
  if config.sparsity_weight:
    raise errors.UserError(
      f'sparsity_weight {config.sparsity_weight} does nothing with '
      f'{sae_config.activation}, whose k sets the sparsity: leave it 0, or use '
      'relu or jumprelu'
    )


def prepare(setting: terms.Setting, sae: Sae, x_BD: jax.Array) -> None:
  """Nothing: the codes of a token do not depend on other tokens."""
  del setting, sae, x_BD


def no_second(config: ObjectiveConfig) -> float:
  """`registry.Method.second_weight` of one with one reconstruction."""
  del config
  return 0.0


def pre_activations(
  setting: terms.Setting, sae: Sae, x_BD: jax.Array
) -> jax.Array:
  """Pre-activations of this shard's latents, with a gradient for b_pre."""
  return products(setting, sae, x_BD) + sae.b_lat_N


@jax.named_scope(scopes.ENCODER)
def products(setting: terms.Setting, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre) of this shard's latents, with a gradient for b_pre."""
  shard = sae.replace(b_pre_D=setting.shards.to_latents(sae.b_pre_D))
  x_BD, _ = autoencoder.halves(setting.sae_config, x_BD)
  return autoencoder.products(setting.sae_config, shard, x_BD)


def missed_by_none(
  setting: terms.Setting, sae: Sae, x_BD: jax.Array
) -> jax.Array:
  """What latents and b_pre are to reconstruct: what a skip has not."""
  config = setting.sae_config
  x_BD, target_BD = autoencoder.halves(config, x_BD)
  if not config.skip:
    return target_BD
  return target_BD - autoencoder.skipped(config, sae, x_BD)


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  z_BN: jax.Array,
  penalty: jax.Array | None = None,
  second_BN: jax.Array | None = None,
  observed: dict[str, jax.Array] | None = None,
) -> terms.Pass:
  """A pass with given codes.

  Args:
    setting: of the loss.
    sae: this device's parameters.
    x_BD: tokens.
    z_BN: their codes, of this shard's latents.
    penalty: the penalty, summed over tokens and this shard's latents; None for
      none.
    second_BN: other codes, which must reconstruct with a decoder and b_pre
      that they do not teach; None for none.
    observed: see `terms.Pass`.
  """
  shards = setting.shards
  target_BD = missed_by_none(setting, sae, x_BD)
  with jax.named_scope(scopes.DECODER):
    model_BD = ops.matmul(z_BN, sae.w_dec_ND, setting.sae_config.matmul_dtype)
    held_BD = None
    if second_BN is not None:
      held_ND = jax.lax.stop_gradient(sae.w_dec_ND)
      held_BD = ops.matmul(second_BN, held_ND, setting.sae_config.matmul_dtype)
  error_BD = target_BD - shards.over_latents(model_BD) - sae.b_pre_D
  zero = multi = varying.zeros((), x_BD.dtype, error_BD)
  if held_BD is not None:
    bias_D = jax.lax.stop_gradient(sae.b_pre_D)
    missed_BD = target_BD - shards.over_latents(held_BD) - bias_D
    multi = (missed_BD**2).sum()
  return terms.Pass(
    sums=terms.Sums(
      error=(error_BD**2).sum(),
      multi=multi,
      penalty=zero if penalty is None else shards.over_latents(penalty),
      active=terms.count(z_BN > 0).astype(x_BD.dtype),
      fired_N=(z_BN > 0).any(0).astype(jnp.int32),
    ),
    diagnostics=Diagnostics.exact(x_BD.shape[0], x_BD.dtype, z_BN),
    error_BD=error_BD,
    observed=observed or {},
    exhausted=varying.zeros((), bool, z_BN),
  )


def fold(
  setting: terms.Setting, run: Callable, start: Any, x_BD: jax.Array
) -> tuple[Any, Any]:
  """See `registry.Method`; runs over the configured micro-batches."""

  def with_all(x_BD):
    total, values, _ = run(x_BD, None)
    return total, values

  return setting.shards.fold(with_all, start, x_BD)


def penalty_logged(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  implementation: str | None,
  values: terms.Terms,
) -> dict[str, jax.Array]:
  """The penalty of a baseline."""
  del sae_config, config, implementation
  return {'penalty': values.penalty}

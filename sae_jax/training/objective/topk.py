"""The loss of TopK, and of Multi-TopK beside it."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import autoencoder, errors, ops
from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.ops import varying
from sae_jax.ops.autoencode import candidates as candidates_lib
from sae_jax.training.objective import dense, terms
from sae_jax.training.objective.config import ObjectiveConfig

AUXK = True
SPARSE = True
prepare = dense.prepare


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError for a penalty, or for a code wider than N."""
  dense.check_no_penalty(sae_config, config)
  if config.widest(sae_config.k) > sae_config.n_latents:
    raise errors.UserError(
      f'multi_topk {config.multi_topk} times k {sae_config.k} exceeds the '
      f'{sae_config.n_latents} latents: use '
      f'{sae_config.n_latents // sae_config.k} or less'
    )


def second_weight(config: ObjectiveConfig) -> float:
  """That of the wider code of Multi-TopK."""
  return config.multi_weight


def _kernels(sae_config, config, implementation):
  chosen = ops.choose(
    sae_config.n_latents,
    config.widest(sae_config.k),
    implementation,
    sae_config.d_model,
  )
  return chosen == 'pallas'


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  prepared: None,
  tally_N: jax.Array,
  candidates: int | None,
) -> terms.Pass:
  """A pass with one code, or the two of Multi-TopK."""
  del prepared
  sae_config, config, shards = (
    setting.sae_config,
    setting.config,
    setting.shards,
  )
  target_BD = dense.missed_by_none(setting, sae, x_BD)
  x_BD, _ = autoencoder.halves(sae_config, x_BD)
  ks = (sae_config.k,)
  if config.multi_topk:
    ks += (config.widest(sae_config.k),)
  coded = ops.autoencode(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    sae.w_dec_ND,
    ks,
    b_pre_D=shards.to_latents(autoencoder.input_bias(sae_config, sae)),
    axis=shards.latent_axis,
    dtype=sae_config.matmul_dtype,
    implementation=setting.implementation,
    candidates=candidates,
    recall=config.topk_recall,
    tally_N=tally_N,
  )
  # One sum for both reconstructions: collectives cost a wait each.
  models = shards.over_latents(coded.models)
  error_BD, *wide = (target_BD - (model + sae.b_pre_D) for model in models)
  zero = varying.zeros((), x_BD.dtype, error_BD)
  return terms.Pass(
    sums=terms.Sums(
      error=(error_BD**2).sum(),
      multi=sum(((wide_BD**2).sum() for wide_BD in wide), start=zero),
      penalty=zero,
      active=terms.count(coded.vals_BK > 0).astype(x_BD.dtype),
      fired_N=varying.zeros(sae.b_lat_N.shape, jnp.int32, error_BD),
    ),
    diagnostics=coded.diagnostics,
    error_BD=error_BD,
    observed={},
    exhausted=coded.exhausted,
  )


def fold(
  setting: terms.Setting, run: Callable, start: Any, x_BD: jax.Array
) -> tuple[Any, Any]:
  """See `registry.Method`; with kernels on few candidates of each shard."""
  sae_config, config, shards = (
    setting.sae_config,
    setting.config,
    setting.shards,
  )
  if not _kernels(sae_config, config, setting.implementation):
    return dense.fold(setting, run, start, x_BD)
  batch, k = x_BD.shape[0], config.widest(sae_config.k)
  # The kernels' lists of pairs must fit a small memory, and their length is the
  # number of candidates: that may take more micro-batches than configured.
  offered = candidates_lib.width(k, shards.latent_shards, batch)
  shards = shards.with_micro_batches(
    batch, ops.least_micro_batches(batch, offered)
  )
  once = functools.partial(
    ops.with_few_candidates,
    run,
    start,
    k=k,
    n_latents=sae_config.n_latents // shards.latent_shards,
    latent_axis=shards.latent_axis,
    data_axis=shards.data_axis,
  )
  return shards.fold(once, start, x_BD)


def logged(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  implementation: str | None,
  values: terms.Terms,
) -> dict[str, jax.Array]:
  """Multi-TopK's error, and diagnostics of the kernels' search."""
  out = {}
  if config.multi_topk:
    out['multi'] = values.multi
  if _kernels(sae_config, config, implementation):
    out['redone'] = values.diagnostics.redone
    if config.topk_recall < 1:
      out['expected_recall'] = values.diagnostics.recall
  return out

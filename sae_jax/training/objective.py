"""What training minimises: the reconstruction error, AuxK and penalties."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import autoencoder, errors, ops
from sae_jax import config as config_lib
from sae_jax.autoencoder import Sae, SaeConfig, thresholds
from sae_jax.ops import varying
from sae_jax.training import auxk
from sae_jax.training import shards as shards_lib


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(config_lib.Config):
  """Terms of the loss (Gao et al. 2024, sections 2.3, 4 and A.2)."""

  k_aux: int = config_lib.option(
    256,
    'dead latents that model the error of a token (AuxK); 0 for none. It goes '
    'with topk, the baselines have none',
    least=0,
  )
  aux_weight: float = config_lib.option(1 / 32, "AuxK's weight, alpha", least=0)
  dead_after_tokens: int = config_lib.option(
    10_000_000,
    'a latent that was silent for so many tokens is dead',
    least=1,
    most=2**30,
  )
  multi_topk: int = config_lib.option(
    0,
    'Multi-TopK: the loss also takes in the reconstruction from so many times '
    'k latents (the paper: 4); 0 for none',
    least=0,
  )
  multi_weight: float = config_lib.option(1 / 8, "Multi-TopK's weight", least=0)
  topk_recall: float = config_lib.option(
    1.0,
    "of training's top-k with TPU kernels: 1 is exact; below, a share of 1 - "
    'topk_recall of the active latents may be others than the top ones, which '
    'is less work. Evaluation is always exact',
    least=0.5,
    most=1,
  )
  sparsity_weight: float = config_lib.option(
    0.0,
    "weight of relu's L1 penalty (of z in units of the tokens' RMS distance "
    "from their mean) or of jumprelu's L0 penalty",
    least=0,
  )
  jump_bandwidth: float = config_lib.option(
    1e-3,
    "width of jumprelu's gradient estimate for thresholds, in units of the "
    "tokens' RMS distance from their mean",
    least=1e-12,
  )


@flax.struct.dataclass
class Terms:
  """What the objective saw of the whole batch.

  Attributes:
    nmse: mean squared error over the mean predictor's, which is a constant.
    aux: AuxK's normalised error, 0 where no latent is dead.
    multi: NMSE of the wider code of Multi-TopK, 0 without it.
    penalty: the baselines' L1 or L0 per token, 0 with TopK.
    l0: mean number of active latents per token.
    redone: share of tokens that a kernel encoded again, over the shards' mean,
      or 1 for a batch of which a shard's candidates were not enough.
    recall: what of a shard's top candidates is expected to be found, over the
      shards' mean; 1 if all are.
    fired_N: whether a latent was active for any token of the batch.
  """

  nmse: jax.Array
  aux: jax.Array
  multi: jax.Array
  penalty: jax.Array
  l0: jax.Array
  redone: jax.Array
  recall: jax.Array
  fired_N: jax.Array


@flax.struct.dataclass
class _Sums:
  """Sums over this shard's tokens, of its latents in `active` and `fired_N`."""

  error: jax.Array
  multi: jax.Array
  penalty: jax.Array
  active: jax.Array
  redone: jax.Array
  recall: jax.Array
  fired_N: jax.Array


def _count(active_BK: jax.Array) -> jax.Array:
  """How many are true, as a float: all of a large batch may pass an int32."""
  return active_BK.sum(-1).astype(jnp.result_type(float)).sum()


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError where objective and activation do not fit."""
  if sae_config.activation == 'topk':
    if config.sparsity_weight:
      raise errors.UserError(
        f'sparsity_weight {config.sparsity_weight} does nothing with topk, '
        'whose k sets the sparsity: leave it 0, or use relu or jumprelu'
      )
    wide = config.multi_topk * sae_config.k
    if wide > sae_config.n_latents:
      raise errors.UserError(
        f'multi_topk {config.multi_topk} times k {sae_config.k} exceeds the '
        f'{sae_config.n_latents} latents: use '
        f'{sae_config.n_latents // sae_config.k} or less'
      )
    return
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


def _topk_sums(
  sae, tally_N, x_BD, sae_config, config, split, implementation, candidates
):
  """Sums and error of a TopK autoencoder on some tokens.

  And whether the candidates of this shard were too few. Which latents fired is
  for the gradient of `tally_N` to tell, see `ops.autoencode`.
  """
  ks = (sae_config.k,)
  if config.multi_topk:
    ks += (sae_config.k * config.multi_topk,)
  coded = ops.autoencode(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    sae.w_dec_ND,
    ks,
    b_pre_D=split.to_latents(sae.b_pre_D),
    axis=split.latent_axis,
    dtype=sae_config.matmul_dtype,
    implementation=implementation,
    candidates=candidates,
    recall=config.topk_recall,
    tally_N=tally_N,
  )
  # One sum for both reconstructions: collectives cost a wait each.
  models = split.over_latents(coded.models)
  error_BD, *missed = (x_BD - (model + sae.b_pre_D) for model in models)
  multi = varying.zeros((), x_BD.dtype, error_BD)
  for missed_BD in missed:
    multi = (missed_BD**2).sum()
  active_BK = coded.vals_BK > 0
  sums = _Sums(
    error=(error_BD**2).sum(),
    multi=multi,
    penalty=varying.zeros((), x_BD.dtype, error_BD),
    active=_count(active_BK).astype(x_BD.dtype),
    redone=coded.failed * x_BD.shape[0],
    recall=coded.recall * x_BD.shape[0],
    fired_N=varying.zeros(sae.b_lat_N.shape, jnp.int32, error_BD),
  )
  return sums, error_BD, coded.exhausted


def _dense_sums(sae, x_BD, mse_of_mean, sae_config, config, split):
  """Sums and error of a ReLU or JumpReLU autoencoder on some tokens."""
  shard = sae.replace(b_pre_D=split.to_latents(sae.b_pre_D))
  pre_BN = autoencoder.pre_activations(sae_config, shard, x_BD)
  if sae_config.activation == 'relu':
    z_BN = jax.nn.relu(pre_BN)
    # Decoder rows have unit norm, so that L1 cannot be had by larger ones.
    penalty = z_BN.sum() / jnp.sqrt(mse_of_mean)
  else:
    bandwidth = config.jump_bandwidth * jnp.sqrt(mse_of_mean)
    jump = (sae.log_threshold_N, varying.match(bandwidth, pre_BN))
    z_BN = thresholds.trainable_jump_relu(pre_BN, *jump)
    penalty = thresholds.trainable_count(pre_BN, *jump)
  model_BD = ops.matmul(z_BN, sae.w_dec_ND, sae_config.matmul_dtype)
  error_BD = x_BD - split.over_latents(model_BD) - sae.b_pre_D
  sums = _Sums(
    error=(error_BD**2).sum(),
    multi=varying.zeros((), x_BD.dtype, error_BD),
    penalty=split.over_latents(penalty),
    active=_count(z_BN > 0).astype(x_BD.dtype),
    redone=varying.zeros((), x_BD.dtype, z_BN),
    recall=varying.zeros((), x_BD.dtype, z_BN) + x_BD.shape[0],
    fired_N=(z_BN > 0).any(0).astype(jnp.int32),
  )
  return sums, error_BD, varying.zeros((), bool, z_BN)


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
) -> tuple[tuple[jax.Array, Terms], Sae]:
  """The loss over a batch and its gradients (Gao et al. 2024, section A.2).

  NMSE + alpha AuxK, + NMSE(4k) / 8 with Multi-TopK, or + lambda times the
  penalty of a baseline. Inside `jax.shard_map` the arguments are one shard's
  and the results the whole batch's.

  AuxK has its gradient apart, since it reaches the dead latents alone: it is
  of their rows, and is added to the others' gradient in place.

  Args:
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    dead_N: which latents are dead.
    mse_of_mean: squared error of the mean predictor per token, a constant
      measured on a sample at the start of training.
    sae_config: the autoencoder's config.
    config: the terms.
    micro_batches: parts of the shard's tokens that are worked on one after
      another, for less memory; the sums are those of the whole batch.
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    (loss, terms) and gradients shaped as `sae`.
  """
  split = shards_lib.Shards(data_axis, latent_axis, micro_batches)
  tokens = x_BD.shape[0] * split.token_shards
  # Made varying over the data axis, so that gradients stay this shard's own
  # and are summed once, however many micro-batches there are.
  own = jax.tree.map(lambda a: varying.match(a, x_BD), sae)

  def share(sae: Sae, tally_N, x_BD, candidates):
    """This shard's part of the loss."""
    if sae_config.activation == 'topk':
      sums, error_BD, short = _topk_sums(
        sae,
        tally_N,
        x_BD,
        sae_config,
        config,
        split,
        implementation,
        candidates,
      )
    else:
      sums, error_BD, short = _dense_sums(
        sae, x_BD, mse_of_mean, sae_config, config, split
      )
    error = sums.error + config.multi_weight * sums.multi
    total = error / mse_of_mean + config.sparsity_weight * sums.penalty
    return total / tokens, (sums, jax.lax.stop_gradient(error_BD), short)

  def part(x_BD, candidates=None):
    tally_N = jnp.zeros_like(own.b_lat_N)
    (value, (sums, error_BD, short)), (grads, used_N) = jax.value_and_grad(
      share, (0, 1), has_aux=True
    )(own, tally_N, x_BD, candidates)
    fired_N = sums.fired_N + (used_N > 0)
    sums = sums.replace(fired_N=fired_N)
    return (value, sums, grads), (error_BD, short)

  def whole_part(x_BD):
    total, (error_BD, _) = part(x_BD)
    return total, error_BD

  most = sae_config.k * max(1, config.multi_topk)
  shards = split.latent_shards
  n_latents, width = sae.w_enc_ND.shape
  name = ops.choose(n_latents * shards, most, implementation, width)

  def least_part(x_BD):
    """`whole_part` with as few candidates of a shard as will do."""
    batch = x_BD.shape[0]
    offered = ops.candidates(most, shards, batch)
    if offered >= min(most, n_latents):
      return whole_part(x_BD)
    total, (error_BD, short) = part(x_BD, offered)

    def again():
      # Their lists of candidates are no longer than those of the whole.
      smaller = dataclasses.replace(split, micro_batches=1).in_parts(
        batch, -(-most // offered)
      )
      (value, sums, grads), error_BD = smaller.fold(whole_part, start, x_BD)
      redone = varying.match(jnp.full_like(sums.redone, batch), sums.redone)
      return (value, sums.replace(redone=redone), grads), error_BD

    # The same on all shards, since there are collectives in it.
    return jax.lax.cond(split.anywhere(short), again, lambda: (total, error_BD))

  kernels = sae_config.activation == 'topk' and name == 'pallas'
  zero = varying.zeros((), x_BD.dtype, x_BD)
  count_N = varying.zeros(dead_N.shape, jnp.int32, dead_N, x_BD)
  each = varying.match(zero, count_N)
  none = _Sums(zero, zero, zero, each, each, each, count_N)
  start = (zero, none, shards_lib.zeros_like(own))
  batch = x_BD.shape[0]
  if kernels:
    offered = ops.candidates(most, shards, batch)
    parts = split.in_parts(batch, ops.parts(batch, offered))
    total, error_BD = parts.fold(least_part, start, x_BD)
  else:
    total, error_BD = split.fold(whole_part, start, x_BD)
  value, sums, grads = total
  aux = jnp.zeros((), x_BD.dtype)
  if config.k_aux and sae_config.activation == 'topk':
    told = auxk.Aux(
      k=config.k_aux,
      weight=config.aux_weight,
      dtype=sae_config.matmul_dtype,
      # Not None, which would be chosen again, for fewer latents.
      implementation=name if kernels else implementation,
    )
    aux, grads = auxk.add_gradient(
      told, own, grads, x_BD, error_BD, dead_N, split
    )
  active, redone, recall = split.over_tokens(
    split.over_latents((sums.active, sums.redone, sums.recall))
  )
  terms = Terms(
    nmse=split.over_tokens(sums.error) / tokens / mse_of_mean,
    aux=aux,
    multi=split.over_tokens(sums.multi) / tokens / mse_of_mean,
    penalty=split.over_tokens(sums.penalty) / tokens,
    l0=active / tokens,
    redone=redone / tokens / split.latent_shards,
    recall=recall / tokens / split.latent_shards,
    fired_N=split.over_tokens(sums.fired_N) > 0,
  )
  total = split.over_tokens(value) + config.aux_weight * aux
  return (total, terms), jax.tree.map(split.over_tokens, grads)

"""What training minimises: the reconstruction error, AuxK and penalties."""

from collections.abc import Callable
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import activation, autoencoder, sparse
from sae_jax import config as config_lib
from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.sparse import varying

# AuxK works on a copy of the dead latents, of the first of these sizes that
# holds them all, or of all latents.
_DEAD_SIZES = tuple(256 * 4**power for power in range(12))


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
    fired_N: whether a latent was active for any token of the batch.
  """

  nmse: jax.Array
  aux: jax.Array
  multi: jax.Array
  penalty: jax.Array
  l0: jax.Array
  fired_N: jax.Array


@flax.struct.dataclass
class _Sums:
  """Sums over this shard's tokens, of its latents in `active` and `fired_N`."""

  error: jax.Array
  multi: jax.Array
  penalty: jax.Array
  active: jax.Array
  fired_N: jax.Array


@flax.struct.dataclass
class _Rows:
  """The rows of some latents."""

  w_enc_MD: jax.Array
  w_dec_MD: jax.Array
  b_lat_M: jax.Array


def _sum(x: jax.Array, *axes: str | None) -> jax.Array:
  axes = tuple(axis for axis in axes if axis is not None)
  return jax.lax.psum(x, axes) if axes else x


def _count(active_BK: jax.Array) -> jax.Array:
  """How many are true, as a float: all of a large batch may pass an int32."""
  return active_BK.sum(-1).astype(jnp.result_type(float)).sum()


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError where objective and activation do not fit."""
  if sae_config.activation == 'topk':
    if config.sparsity_weight:
      raise config_lib.UserError(
        f'sparsity_weight {config.sparsity_weight} does nothing with topk, '
        'whose k sets the sparsity: leave it 0, or use relu or jumprelu'
      )
    wide = config.multi_topk * sae_config.k
    if wide > sae_config.n_latents:
      raise config_lib.UserError(
        f'multi_topk {config.multi_topk} times k {sae_config.k} exceeds the '
        f'{sae_config.n_latents} latents: use '
        f'{sae_config.n_latents // sae_config.k} or less'
      )
  elif config.multi_topk:
    raise config_lib.UserError(
      f'multi_topk {config.multi_topk} needs topk, the activation is '
      f'{sae_config.activation}: leave it 0'
    )


def _topk_sums(sae, x_BD, sae_config, config, latent_axis, implementation):
  """Sums and error of a TopK autoencoder on some tokens."""
  wide = sae_config.k * max(1, config.multi_topk)
  found = autoencoder.candidates(
    sae_config, sae, x_BD, wide, implementation=implementation
  )
  decode = functools.partial(
    autoencoder.decode,
    sae,
    axis=latent_axis,
    dtype=sae_config.matmul_dtype,
    implementation=implementation,
  )
  vals_BK, idx_BK = autoencoder.select(*found, sae_config.k, latent_axis)
  error_BD = x_BD - decode(vals_BK, idx_BK)
  multi = varying.zeros((), x_BD.dtype, error_BD)
  if config.multi_topk:
    missed_BD = x_BD - decode(*autoencoder.select(*found, wide, latent_axis))
    multi = (missed_BD**2).sum()
  active_BK = vals_BK > 0
  fired_N = varying.zeros(sae.b_lat_N.shape, jnp.int32, vals_BK, idx_BK)
  fired_N = fired_N.at[idx_BK.reshape(-1)].max(
    active_BK.reshape(-1).astype(jnp.int32)
  )
  sums = _Sums(
    error=(error_BD**2).sum(),
    multi=multi,
    penalty=varying.zeros((), x_BD.dtype, error_BD),
    active=_count(active_BK).astype(x_BD.dtype),
    fired_N=fired_N,
  )
  return sums, error_BD


def _dense_sums(
  sae, x_BD, mse_of_mean, sae_config, config, latent_axis, implementation
):
  """Sums and error of a ReLU or JumpReLU autoencoder on some tokens."""
  del implementation  # Their codes are dense.
  pre_BN = autoencoder.pre_activations(sae_config, sae, x_BD)
  if sae_config.activation == 'relu':
    z_BN = jax.nn.relu(pre_BN)
    # Decoder rows have unit norm, so that L1 cannot be had by larger ones.
    penalty = z_BN.sum() / jnp.sqrt(mse_of_mean)
  else:
    bandwidth = config.jump_bandwidth * jnp.sqrt(mse_of_mean)
    jump = (sae.log_threshold_N, varying.match(bandwidth, pre_BN))
    z_BN = activation.trainable_jump_relu(pre_BN, *jump)
    penalty = activation.trainable_count(pre_BN, *jump)
  model_BD = sparse.matmul(z_BN, sae.w_dec_ND, sae_config.matmul_dtype)
  error_BD = x_BD - _sum(model_BD, latent_axis) - sae.b_pre_D
  sums = _Sums(
    error=(error_BD**2).sum(),
    multi=varying.zeros((), x_BD.dtype, error_BD),
    penalty=_sum(penalty, latent_axis),
    active=_count(z_BN > 0).astype(x_BD.dtype),
    fired_N=(z_BN > 0).any(0).astype(jnp.int32),
  )
  return sums, error_BD


def _fold(
  run: Callable, parts: int, start: tuple, *tokens: jax.Array
) -> tuple[tuple, jax.Array]:
  """Runs over equal parts of the tokens and adds up.

  Args:
    run: some tokens -> (what is added up, what is kept of each token).
    parts: how many; 1 is a plain call.
    start: zeros shaped as what is added up.
    *tokens: arrays [B, ...].

  Returns:
    The total, and what is kept of all tokens.
  """
  if parts == 1:
    return run(*tokens)

  def add(total, some):
    found, kept = run(*some)
    return jax.tree.map(jnp.add, total, found), kept

  split = [t.reshape(parts, -1, *t.shape[1:]) for t in tokens]
  total, kept = jax.lax.scan(add, start, split)
  return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept)


def _zeros_like(tree, *like):
  return jax.tree.map(lambda a: varying.zeros(a.shape, a.dtype, a, *like), tree)


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
    implementation: of the sparse products, see `sparse.decode`.

  Returns:
    (loss, terms) and gradients shaped as `sae`.
  """
  tokens = x_BD.shape[0] * (jax.lax.axis_size(data_axis) if data_axis else 1)
  # Made varying over the data axis, so that gradients stay this shard's own
  # and are summed once, however many micro-batches there are.
  own = jax.tree.map(lambda a: varying.match(a, x_BD), sae)
  common = (sae_config, config, latent_axis, implementation)

  def share(sae: Sae, x_BD):
    """This shard's part of the loss."""
    if sae_config.activation == 'topk':
      sums, error_BD = _topk_sums(sae, x_BD, *common)
    else:
      sums, error_BD = _dense_sums(sae, x_BD, mse_of_mean, *common)
    error = sums.error + config.multi_weight * sums.multi
    total = error / mse_of_mean + config.sparsity_weight * sums.penalty
    return total / tokens, (sums, jax.lax.stop_gradient(error_BD))

  def part(x_BD):
    (value, (sums, error_BD)), grads = jax.value_and_grad(share, has_aux=True)(
      own, x_BD
    )
    return (value, sums, grads), error_BD

  start = ()
  if micro_batches > 1:
    zero = varying.zeros((), x_BD.dtype, x_BD)
    count_N = varying.zeros(dead_N.shape, jnp.int32, dead_N, x_BD)
    start = (
      zero,
      _Sums(zero, zero, zero, varying.match(zero, count_N), count_N),
      _zeros_like(own),
    )
  (value, sums, grads), error_BD = _fold(part, micro_batches, start, x_BD)
  aux, grads = _add_aux(
    sae_config,
    config,
    own,
    grads,
    x_BD,
    error_BD,
    dead_N,
    micro_batches,
    data_axis,
    latent_axis,
    implementation,
  )
  grads = jax.tree.map(lambda g: _sum(g, data_axis), grads)
  terms = Terms(
    nmse=_sum(sums.error, data_axis) / tokens / mse_of_mean,
    aux=aux,
    multi=_sum(sums.multi, data_axis) / tokens / mse_of_mean,
    penalty=_sum(sums.penalty, data_axis) / tokens,
    l0=_sum(sums.active, data_axis, latent_axis) / tokens,
    fired_N=_sum(sums.fired_N, data_axis) > 0,
  )
  return (_sum(value, data_axis) + config.aux_weight * aux, terms), grads


def _add_aux(
  sae_config,
  config,
  sae,
  grads,
  x_BD,
  error_BD,
  dead_N,
  micro_batches,
  data_axis,
  latent_axis,
  implementation,
):
  """AuxK and the gradients with its own added, this data shard's part."""
  none = jnp.zeros((), x_BD.dtype)
  if not config.k_aux or sae_config.activation != 'topk':
    return none, grads
  n_latents = dead_N.shape[0]
  sizes = [size for size in _DEAD_SIZES if size < n_latents] + [n_latents]
  # The same branch on every shard, since there are collectives in it.
  most = dead_N.sum()
  if latent_axis is not None:
    most = jax.lax.pmax(most, latent_axis)

  def branch(size):
    def run(grads):
      return aux_error(
        sae_config,
        config,
        sae,
        grads,
        x_BD,
        error_BD,
        dead_N,
        size,
        micro_batches=micro_batches,
        data_axis=data_axis,
        latent_axis=latent_axis,
        implementation=implementation,
      )

    return run

  held = jnp.searchsorted(jnp.array(sizes), most)
  return jax.lax.switch(
    jnp.where(most > 0, held + 1, 0),
    [lambda grads: (none, grads), *map(branch, sizes)],
    grads,
  )


def aux_error(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  sae: Sae,
  grads: Sae,
  x_BD: jax.Array,
  error_BD: jax.Array,
  dead_N: jax.Array,
  size: int,
  *,
  micro_batches: int = 1,
  data_axis: str | None = None,
  latent_axis: str | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, Sae]:
  """AuxK: how badly the top dead latents model the reconstruction's error.

  ||e - W_dec z_aux||^2 / ||e||^2 over the batch, with z_aux = ReLU of the
  k_aux largest pre-activations among dead latents and no bias. e is a
  constant, and so is b_pre here: the gradient reaches the dead latents' rows
  and biases alone.

  Args:
    sae_config: gives the precision.
    config: gives k_aux and the weight.
    sae: the autoencoder, or this shard of it.
    grads: the other terms' gradients, of this data shard.
    x_BD: preprocessed activations.
    error_BD: e = x - x^, a constant.
    dead_N: which latents are dead; at least one on some shard.
    size: static; as many latents as are dead on any shard, or more.
    micro_batches: see `value_and_grad`.
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.
    implementation: see `sparse.decode`.

  Returns:
    The ratio, and grads with its gradient added, times the weight. Where it
    is not finite it counts as 0, and adds nothing.
  """
  place_M = jnp.nonzero(dead_N, size=size, fill_value=0)[0]
  real_M = jnp.arange(size) < dead_N.sum()
  rows = _Rows(
    w_enc_MD=sae.w_enc_ND[place_M],
    w_dec_MD=sae.w_dec_ND[place_M],
    b_lat_M=sae.b_lat_N[place_M],
  )
  shards = jax.lax.axis_size(latent_axis) if latent_axis else 1
  dtype = sae_config.matmul_dtype

  def missed(rows: _Rows, x_BD, error_BD):
    vals_BK, idx_BK = sparse.encode_topk(
      x_BD,
      rows.w_enc_MD,
      rows.b_lat_M,
      min(config.k_aux, size),
      b_pre_D=jax.lax.stop_gradient(sae.b_pre_D),
      mask_N=real_M,
      dtype=dtype,
      implementation=implementation,
    )
    vals_BK = sparse.global_top_k(
      vals_BK, latent_axis, min(config.k_aux, size * shards), -jnp.inf
    )
    model_BD = sparse.decode(
      jax.nn.relu(vals_BK),
      idx_BK,
      rows.w_dec_MD,
      dtype=dtype,
      implementation=implementation,
    )
    return ((error_BD - _sum(model_BD, latent_axis)) ** 2).sum()

  def part(x_BD, error_BD):
    return jax.value_and_grad(missed)(rows, x_BD, error_BD), ()

  start = (varying.zeros((), x_BD.dtype, error_BD), _zeros_like(rows, x_BD))
  (total, found), _ = _fold(part, micro_batches, start, x_BD, error_BD)
  total = _sum(total, data_axis)
  norm = _sum((error_BD**2).sum(), data_axis)
  usable = jnp.isfinite(total) & jnp.isfinite(norm) & (norm > 0)
  norm = jnp.where(usable, norm, 1)

  def add(grad, rows_grad):
    kept = real_M.reshape(-1, *[1] * (rows_grad.ndim - 1)) & usable
    # Places past the last dead latent repeat latent 0, and add 0 to it.
    return grad.at[place_M].add(
      jnp.where(kept, config.aux_weight / norm * rows_grad, 0)
    )

  grads = grads.replace(
    w_enc_ND=add(grads.w_enc_ND, found.w_enc_MD),
    w_dec_ND=add(grads.w_dec_ND, found.w_dec_MD),
    b_lat_N=add(grads.b_lat_N, found.b_lat_M),
  )
  return jnp.where(usable, total, 0) / norm, grads

"""The latents that a shard offers for each token, and their places."""

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import autoencoder, ops
from sae_jax.autoencoder import nonlinearity
from sae_jax.ops import pairs as pairs_lib
from sae_jax.ops import scopes
from sae_jax.ops.autoencode import candidates as few_lib

# A gap of this many roundings of a product is told from none.
_ROUNDINGS = 4


@flax.struct.dataclass
class Candidates:
  """The latents that a shard offers for its tokens.

  C is the number of them for a token, and E tokens are this device's share.

  Attributes:
    vals_BC: their values, in descending order.
    idx_BC: their numbers within the shard, int32.
    rank_BC: their places among the candidates of all shards, from 0.
    margin_BC: their values less the token's k-th value, or less its least
      active one where any number may be active.
    active_BC: those that are active.
    near_BC: near misses: positive, and next in order after k active latents.
    vals_EK: the codes in order: values, then zeros.
    idx_EK: their latents, of all shards; 0 where the value is.
    tied_E: whether rounding may have chosen the last active latent.
    needed_E: active latents.
    short: whether this shard's lists may lack some that belong in them.
  """

  vals_BC: jax.Array
  idx_BC: jax.Array
  rank_BC: jax.Array
  margin_BC: jax.Array
  active_BC: jax.Array
  near_BC: jax.Array
  vals_EK: jax.Array
  idx_EK: jax.Array
  tied_E: jax.Array
  needed_E: jax.Array
  short: jax.Array


def code_width(config: autoencoder.SaeConfig) -> int | None:
  """Most active latents of a token; None where any number may be active."""
  return nonlinearity.of(config.activation).active_per_token(config)


def list_length(
  config: autoencoder.SaeConfig,
  width: int,
  tokens: int,
  shards: int,
  few: bool,
) -> int:
  """How many latents of a token a shard offers, C.

  Args:
    config: the autoencoder's config.
    width: columns of the codes, K.
    tokens: of a data shard.
    shards: of the latents.
    few: see `candidates`.
  """
  n_own = config.n_latents // shards
  if code_width(config) is None:
    return min(width, n_own)
  offered = min(2 * width, n_own)
  if few:
    most = min(2 * width, config.n_latents)
    offered = min(offered, few_lib.width(most, shards, tokens))
  return offered


def pair_slots(
  config: autoencoder.SaeConfig,
  width: int,
  tokens: int,
  shards: int,
  few: bool,
) -> int:
  """Slots of a batch's pairs on a shard, for active ones or near misses.

  With `few` they are twice as many as are expected, since on some shards more
  win than on others. See `list_length` for the arguments.
  """
  offered = list_length(config, width, tokens, shards, few)
  if not few:
    return tokens * min(offered, width if shards == 1 else offered)
  return pairs_lib.slots(tokens, offered, width / shards / offered)


def of_ranks(
  config: autoencoder.SaeConfig,
  offers: Candidates,
  width: int,
  shards: int,
  near: bool,
) -> Candidates:
  """The columns that active latents, or near misses, may be in.

  With TopK, on one shard, the columns are the ranks.
  """
  if shards > 1 or code_width(config) is None:
    return offers
  columns = slice(width, None) if near else slice(width)
  names = 'vals_BC', 'idx_BC', 'rank_BC', 'margin_BC', 'active_BC', 'near_BC'
  return offers.replace(
    **{name: getattr(offers, name)[:, columns] for name in names}
  )


def longest_row(sae: autoencoder.Sae) -> jax.Array:
  """The greatest norm of the encoder's rows, which rounding grows with."""
  return jnp.linalg.norm(sae.w_enc_ND, axis=1).max()


def candidates(
  config: autoencoder.SaeConfig,
  sae: autoencoder.Sae,
  x_BD: jax.Array,
  longest: jax.Array,
  width: int,
  axis: str | None = None,
  few: bool = False,
) -> Candidates:
  """Encodes tokens as training does, inside `jax.shard_map`.

  With TopK a shard offers its 2 k largest, of which the first k are those of
  training, or as many as will mostly do. Where any number of latents may be
  active it offers the active ones, `width` at most; if `needed_E` is more the
  others are lost.

  Args:
    config: the autoencoder's config.
    sae: this shard of it.
    x_BD: preprocessed tokens, a multiple of the shards.
    longest: from `longest_row`, of all shards.
    width: columns of the codes, K.
    axis: mesh axis of the latents.
    few: whether lists have the length that mostly does, with TopK. The result
      is right unless one is `short`.
  """
  find = _of_all_active if code_width(config) is None else _of_top_k
  return find(config, sae, x_BD, longest, width, axis, few)


def codes(
  config: autoencoder.SaeConfig,
  sae: autoencoder.Sae,
  x_BD: jax.Array,
  axis: str | None,
  few: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes alone, of an autoencoder that is scored beside another.

  Args:
    config: the autoencoder's config.
    sae: this shard of it.
    x_BD: preprocessed tokens.
    axis: mesh axis of the latents.
    few: see `candidates`.

  Returns:
    Values of this shard's latents, 0 where one is not active, their numbers
    within the shard, and whether the lists may lack some.
  """
  short = jnp.zeros((), bool)
  k = code_width(config)
  if k is None or not few:
    return *autoencoder.encode(config, sae, x_BD, axis=axis), short
  n_own, d_model = sae.w_enc_ND.shape
  shards = jax.lax.axis_size(axis)
  offered = min(n_own, few_lib.width(k, shards, x_BD.shape[0]))
  vals_BC, idx_BC = ops.encode_topk(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    offered,
    b_pre_D=autoencoder.input_bias(config, sae),
    dtype=config.matmul_dtype,
    implementation=ops.choose(n_own * shards, k, None, d_model),
  )
  won_B = ops.winners(vals_BC, axis, k)
  if offered < min(k, n_own):
    # Where the last of a list wins, a next one might have.
    short = (won_B == offered).any()
  won_BC = jnp.arange(offered) < won_B[:, None]
  return jnp.where(won_BC, jax.nn.relu(vals_BC), 0), idx_BC, short


def _of_top_k(config, sae, x_BD, longest, width, axis, few) -> Candidates:
  n_own, d_model = sae.w_enc_ND.shape
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  most = min(2 * width, n_own * shards)
  offered = list_length(config, width, x_BD.shape[0], shards, few)
  # What training takes for the shape, of which lists are a part.
  name = ops.choose(n_own * shards, width, None, d_model)
  vals_BC, idx_BC = ops.encode_topk(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    offered,
    b_pre_D=autoencoder.input_bias(config, sae),
    dtype=config.matmul_dtype,
    implementation=name,
  )
  vals_BC, idx_BC = map(_as_a_whole, (vals_BC, idx_BC))
  ranked = ops.ranks(
    vals_BC, idx_BC + _first(n_own, axis), axis, most, name == 'pallas'
  )
  short = jnp.zeros((), bool)
  if offered < min(most, n_own):
    # Where the last of a list counts, a next one might have.
    short = (ranked.rank_BK[:, -1] < most).any()
  last_E = ranked.vals_EM[:, width - 1]
  tied_E = jnp.zeros(last_E.shape, bool)
  if most > width:
    bias_D = autoencoder.input_bias(config, sae)
    lengths_E = jnp.linalg.norm(own_share(x_BD - bias_D, axis), axis=-1)
    eps = jnp.finfo(last_E.dtype).eps
    gap_E = last_E - ranked.vals_EM[:, width]
    tied_E = (last_E > 0) & (gap_E <= _ROUNDINGS * eps * longest * lengths_E)
  positive_BC = vals_BC > 0
  return _complete(
    ranked,
    vals_BC,
    idx_BC,
    least_E=last_E,
    active_BC=positive_BC & (ranked.rank_BK < width),
    near_BC=positive_BC
    & (ranked.rank_BK >= width)
    & (ranked.rank_BK < 2 * width),
    width=width,
    tied_E=tied_E,
    needed_E=(ranked.vals_EM[:, :width] > 0).sum(-1, dtype=jnp.int32),
    short=short,
    axis=axis,
  )


def _of_all_active(config, sae, x_BD, longest, width, axis, few) -> Candidates:
  del longest, few
  n_own = sae.w_enc_ND.shape[0]
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  # Column n of such codes is latent n.
  vals_BN, _ = autoencoder.encode(config, sae, x_BD, axis=axis)
  needed_B = (vals_BN > 0).sum(-1, dtype=jnp.int32)
  vals_BC, idx_BC = map(_as_a_whole, ops.top_k(vals_BN, min(width, n_own)))
  most = min(width, n_own * shards)
  ranked = ops.ranks(vals_BC, idx_BC + _first(n_own, axis), axis, most)
  needed_E = scattered(needed_B, axis)
  last_E1 = jnp.clip(needed_E - 1, 0, most - 1)[:, None]
  active_BC = vals_BC > 0
  return _complete(
    ranked,
    vals_BC,
    idx_BC,
    least_E=jnp.take_along_axis(ranked.vals_EM, last_E1, axis=1)[:, 0],
    active_BC=active_BC,
    near_BC=jnp.zeros_like(active_BC),
    width=width,
    tied_E=jnp.zeros(needed_E.shape, bool),
    needed_E=needed_E,
    short=jnp.zeros((), bool),
    axis=axis,
  )


@jax.named_scope(scopes.CODES)
def _complete(ranked, vals_BC, idx_BC, *, least_E, width, axis, **others):
  least_B = least_E
  if axis is not None:
    least_B = jax.lax.all_gather(least_E, axis, tiled=True)
  vals_EK = jax.nn.relu(ranked.vals_EM[:, :width])
  idx_EK = jnp.where(vals_EK > 0, ranked.idx_EM[:, :width], 0)
  missing = [(0, 0), (0, width - vals_EK.shape[1])]
  return Candidates(
    vals_BC=vals_BC,
    idx_BC=idx_BC,
    rank_BC=ranked.rank_BK,
    margin_BC=vals_BC - least_B[:, None],
    vals_EK=jnp.pad(vals_EK, missing),
    idx_EK=jnp.pad(idx_EK, missing),
    **others,
  )


def _as_a_whole(of_top_k_BC: jax.Array) -> jax.Array:
  """A result of a top k, of which parts are used.

  XLA, on a CPU, would sort all latents for the parts. It crashes on a barrier
  that both results pass together.
  """
  return jax.lax.optimization_barrier(of_top_k_BC)


def _first(n_own: int, axis: str | None) -> jax.Array | int:
  """Number of this shard's first latent."""
  return 0 if axis is None else jax.lax.axis_index(axis) * n_own


def own_share(of_B: jax.Array, axis: str | None) -> jax.Array:
  """This device's share of tokens that all shards of the latents have."""
  if axis is None:
    return of_B
  size = of_B.shape[0] // jax.lax.axis_size(axis)
  first = jax.lax.axis_index(axis) * size
  return jax.lax.dynamic_slice_in_dim(of_B, first, size)


def scattered(of_B: jax.Array, axis: str | None) -> jax.Array:
  """This device's share of the tokens, summed over the shards."""
  if axis is None:
    return of_B
  return jax.lax.psum_scatter(of_B, axis, tiled=True)

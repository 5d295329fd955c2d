"""Active (token, latent) pairs as the kernels take them.

Blocks of neighbouring tokens each have a list of their active pairs, packed to
its front; the same pairs sorted by latent serve the weight gradients.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.ops.chip import LANES

# Most pairs that are sorted and summed at a time: their list of chunks must fit
# SMEM.
_MOST_PAIRS = 2**22


@flax.struct.dataclass
class Blocks:
  """The pairs of each block of tokens.

  Attributes:
    latent_GR: the pair's latent; any latent where it is not real.
    token_GR: its token within the block.
    vals_GR: its value, 0 where it is not real.
    count_G: how many pairs of the block are real, the first ones.
    place_GR: the slot it came from, token * K + k.
    tokens: of a block.
    k: slots of a token, K.
  """

  latent_GR: jax.Array
  token_GR: jax.Array
  vals_GR: jax.Array
  count_G: jax.Array
  place_GR: jax.Array
  tokens: int = flax.struct.field(pytree_node=False)
  k: int = flax.struct.field(pytree_node=False)

  def cut(self, start: jax.Array | int, slots: int) -> 'Blocks':
    """A window of each block's slots, of which the real ones come first.

    Args:
      start: of the window.
      slots: of the window; past the last slot there is nothing real.
    """
    return self.replace(
      latent_GR=window(self.latent_GR, start, slots),
      token_GR=window(self.token_GR, start, slots),
      vals_GR=window(self.vals_GR, start, slots),
      count_G=jnp.clip(self.count_G - start, 0, slots),
      place_GR=window(self.place_GR, start, slots),
    )


def window(of_GR: jax.Array, start: jax.Array | int, slots: int) -> jax.Array:
  """`slots` slots of each block from `start` on, zeros past the last."""
  of_GR = jnp.pad(of_GR, ((0, 0), (0, -of_GR.shape[1] % slots)))
  return jax.lax.dynamic_slice_in_dim(of_GR, start, slots, axis=1)


def slots(tokens: int, k: int, active: float) -> int:
  """Slots at the front of a packed block that mostly hold all its real pairs.

  Args:
    tokens: of a block.
    k: slots of a token.
    active: the share of slots that is expected to be real. The result has
      room for twice as many, since some shards of the latents are busier.
  """
  expected = tokens * k * active
  return min(tokens * k, max(1, math.ceil(2 * expected / LANES)) * LANES)


def least_micro_batches(batch: int, k: int) -> int:
  """The least number of micro-batches of which each has few enough pairs."""
  return -(-batch * k // _MOST_PAIRS)


def pad_tokens(array: jax.Array, tokens: int) -> jax.Array:
  """Adds rows of zeros up to whole blocks of tokens."""
  short = -array.shape[0] % tokens
  return jnp.pad(array, ((0, short), *[(0, 0)] * (array.ndim - 1)))


def blocks(
  vals_BK: jax.Array, idx_BK: jax.Array, tokens: int, pack: bool
) -> Blocks:
  """Cuts codes into blocks of tokens.

  Args:
    vals_BK: the codes; a pair with value 0 is not active.
    idx_BK: their latents.
    tokens: of a block, see `decode.tiles.block_tokens`.
    pack: whether active pairs are moved to the front and the others not
      counted. Where most are active that costs more than it saves.
  """
  k = vals_BK.shape[1]
  slots = tokens * k
  vals_GR = pad_tokens(vals_BK, tokens).reshape(-1, slots)
  latent_GR = pad_tokens(idx_BK, tokens).reshape(-1, slots)
  place_GR = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), vals_GR.shape)
  if pack:
    active_GR = vals_GR != 0
    key_GR = jnp.where(active_GR, place_GR, place_GR + slots)
    # All keys differ, and a stable sort would take four times as long on a TPU.
    key_GR, latent_GR, vals_GR = jax.lax.sort(
      (key_GR, latent_GR, vals_GR), num_keys=1, is_stable=False
    )
    place_GR = key_GR % slots
    count_G = active_GR.sum(1, dtype=jnp.int32)
  else:
    count_G = jnp.full_like(latent_GR[:, 0], slots)
  return Blocks(
    latent_GR=latent_GR,
    token_GR=place_GR // k,
    vals_GR=vals_GR,
    count_G=count_G,
    place_GR=place_GR,
    tokens=tokens,
    k=k,
  )


def by_latent(
  blocks: Blocks, n_latents: int, *payload_GR: jax.Array
) -> tuple[jax.Array, ...]:
  """The pairs sorted by latent, those that are not active last.

  Args:
    blocks: the pairs.
    n_latents: N, which stands for the latent of a pair that is not active.
    *payload_GR: arrays that are sorted along with the pairs.

  Returns:
    How many are active, latent_P, token_P (of the batch), and the payload in
    that order. Pairs of a latent keep the order of their tokens, so that a
    sum over them is always the same.
  """
  active_GR = blocks.vals_GR != 0
  key_GR = jnp.where(active_GR, blocks.latent_GR, n_latents)
  groups = key_GR.shape[0]
  first_G1 = jnp.arange(groups, dtype=jnp.int32)[:, None] * blocks.tokens
  operands = key_GR, first_G1 + blocks.token_GR, *payload_GR
  # The token as a second key costs a TPU less than a stable sort.
  arrays_P = jax.lax.sort(
    tuple(a.reshape(-1) for a in operands), num_keys=2, is_stable=False
  )
  return active_GR.sum(dtype=jnp.int32), *arrays_P

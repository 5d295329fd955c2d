"""Decoding by kernels: of pairs in blocks, and of codes [B, K]."""

import math

import jax
import jax.numpy as jnp

from sae_jax.ops import chip, pairs
from sae_jax.ops.decode import kernel, tiles


def sums(
  blocks: pairs.Blocks,
  vals_GR: jax.Array,
  w_ND: jax.Array,
  batch: int,
  dtype: jnp.dtype | None,
  expected: int | None = None,
) -> jax.Array:
  """sum of vals w[latent] over the pairs of each token, [B, D]."""
  total = kernel.gather_sum(
    blocks.latent_GR,
    blocks.token_GR,
    vals_GR,
    blocks.count_G,
    w_ND,
    block_tokens=blocks.tokens,
    dtype=dtype,
    expected=expected,
    interpret=chip.interpret(),
  )
  return total[:batch]


def products(
  blocks: pairs.Blocks,
  g_BD: jax.Array,
  w_ND: jax.Array,
  dtype: jnp.dtype | None,
  expected: int | None = None,
) -> jax.Array:
  """<g, w[latent]> of each pair, [G, R]."""
  return kernel.sampled_products(
    blocks.latent_GR,
    blocks.token_GR,
    blocks.count_G,
    pairs.pad_tokens(g_BD, blocks.tokens),
    w_ND,
    block_tokens=blocks.tokens,
    dtype=dtype,
    expected=expected,
    interpret=chip.interpret(),
  )


# Above this share of active pairs packing costs more than it saves.
_PACKED_BELOW = 0.5


def sums_of_codes(vals_BK, idx_BK, w_ND, dtype, active=1.0):
  """`reference.gather_sum` by the kernel, see `decode` for `active`."""
  if active > _PACKED_BELOW:
    blocks = _all_blocks(vals_BK, idx_BK, w_ND)
    return sums(blocks, blocks.vals_GR, w_ND, len(vals_BK), dtype)
  batch, k = idx_BK.shape
  tokens = tiles.block_tokens(batch, w_ND.shape[1], k, active)
  blocks = pairs.blocks(vals_BK, idx_BK, tokens, pack=True)
  expected = min(batch * k, math.ceil(batch * k * active))
  return sums(blocks, blocks.vals_GR, w_ND, batch, dtype, expected)


def products_of_codes(g_BD, idx_BK, w_ND, dtype):
  """`reference.sampled_products` by the kernel."""
  blocks = _all_blocks(jnp.ones(idx_BK.shape, w_ND.dtype), idx_BK, w_ND)
  products_GR = products(blocks, g_BD, w_ND, dtype)
  return products_GR.reshape(-1, idx_BK.shape[1])[: len(idx_BK)]


def _all_blocks(vals_BK, idx_BK, w_ND):
  """All pairs in blocks, zero values included."""
  tokens = tiles.block_tokens(len(idx_BK), w_ND.shape[1], idx_BK.shape[1])
  return pairs.blocks(vals_BK, idx_BK, tokens, pack=False)

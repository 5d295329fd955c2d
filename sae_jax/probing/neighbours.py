"""Nearest neighbours of decoder rows, exact, while the rows go round."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax.ops import varying
from sae_jax.probing import dots, row_blocks

# Rows that others are compared with at a time.
_MOST_OTHERS = 2**16


class Neighbours(NamedTuple):
  """The latents with the most similar decoder rows, the nearest first.

  Attributes:
    ids_NC: their numbers, int32.
    cosines_NC: cosines of the two rows.
  """

  ids_NC: jax.Array
  cosines_NC: jax.Array


def nearest(
  w_dec_ND: jax.Array | np.ndarray, count: int, block_rows: int = 0
) -> Neighbours:
  """The latents with the most similar decoder rows.

  All pairs are compared, in float32. Which latents are nearest does not depend
  on the mesh, and of equal cosines the lower latent comes first, unless more
  than some spare ones are equal to the last. A row of zeros has cosine 0 with
  all others.

  Args:
    w_dec_ND: decoder rows. On a mesh each shard's rows go round "latent", so
      that no device holds those of all.
    count: neighbours of each, fewer than N.
    block_rows: most rows at a time; 0 for what the memory allows.

  Returns:
    The neighbours, never itself, split over "latent" as the rows are.

  Raises:
    UserError: if a row is not finite.
  """
  w_dec_ND = row_blocks.on_mesh(w_dec_ND)
  if not count:
    latents = mesh_lib.sharding(w_dec_ND.sharding.mesh, 'N')
    shape = len(w_dec_ND), 0
    return Neighbours(
      jnp.zeros(shape, jnp.int32, device=latents),
      jnp.zeros(shape, jnp.float32, device=latents),
    )
  row_blocks.check_decoder(w_dec_ND)
  own = w_dec_ND.shape[0] // w_dec_ND.sharding.mesh.shape['latent']
  blocks = row_blocks.blocks_of(w_dec_ND, min(own, _MOST_OTHERS), block_rows)
  program = functools.partial(_nearest, count)
  return row_blocks.run(program, blocks, 'neighbours', w_dec_ND)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nearest(count, blocks, w_dec_ND, call):
  """Neighbours of the rows of one call."""

  def of_shard(own_ND, call):
    unit_ND = dots.unit(own_ND)
    shard = jax.lax.axis_index('latent')
    shards = jax.lax.axis_size('latent')
    place_GB = blocks.places(call)
    itself_GB = place_GB + shard * blocks.n_own
    rows_GBD = unit_ND[place_GB]
    shape = (*place_GB.shape, count)
    best = Neighbours(
      varying.match(jnp.full(shape, -1, jnp.int32), itself_GB),
      varying.match(jnp.full(shape, -jnp.inf, jnp.float32), itself_GB),
    )

    def turn(number, carry):
      best, others_ND = carry
      first = (shard - number) % shards * blocks.n_own
      met = _meet(best, rows_GBD, itself_GB, others_ND, first)
      if shards > 1:
        onward = [(i, (i + 1) % shards) for i in range(shards)]
        others_ND = jax.lax.ppermute(others_ND, 'latent', onward)
      return met, others_ND

    best, _ = jax.lax.fori_loop(0, shards, turn, (best, unit_ND))
    return jax.tree.map(lambda a: a.reshape(place_GB.size, count), best)

  return jax.shard_map(
    of_shard,
    mesh=blocks.mesh,
    in_specs=(mesh_lib.RULES.spec('N'), PartitionSpec()),
    out_specs=row_blocks.SHARES,
  )(w_dec_ND, call)


def _meet(best, rows_GBD, itself_GB, others_ND, first):
  """The nearest so far, after all others of a shard were compared.

  Args:
    best: nearest so far, [G, B, C]; -inf where there are fewer.
    rows_GBD: unit rows.
    itself_GB: the latents that they are.
    others_ND: unit rows of a shard.
    first: the latent of the first of them.
  """
  own = others_ND.shape[0]
  parts = -(-own // _MOST_OTHERS)
  width = -(-own // parts)

  def of_part(part, best):
    # The last part begins with rows that have been met.
    start = jnp.minimum(part * width, own - width)
    part_KD = jax.lax.dynamic_slice_in_dim(others_ND, start, width)
    place_K = start + jnp.arange(width, dtype=jnp.int32)
    is_new_K = place_K >= part * width

    def of_block(block):
      best, rows_BD, itself_B = block
      rough_BK = jnp.matmul(rows_BD, part_KD.T, precision=dots.EXACT)
      other_BK = first + place_K != itself_B[:, None]
      rough_BK = jnp.where(is_new_K & other_BK, rough_BK, -jnp.inf)
      count = best.ids_NC.shape[-1]
      cosines_BC, place_BC = dots.candidates(rough_BK, rows_BD, part_KD, count)
      cosines_NC, ids_NC = dots.largest(
        jnp.concatenate([best.cosines_NC, cosines_BC], 1),
        jnp.concatenate([best.ids_NC, first + start + place_BC], 1),
        count,
      )
      return Neighbours(ids_NC, cosines_NC)

    return jax.lax.map(of_block, (best, rows_GBD, itself_GB))

  return jax.lax.fori_loop(0, parts, of_part, best)

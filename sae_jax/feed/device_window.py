"""A window of activations on the devices, which rows are taken from."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax.harvesting import pools
from sae_jax.store.manifest import Mask
from sae_jax.text import contexts as contexts_lib


class DeviceWindow:
  """Activations of some pools of contexts, [data, rows of a device, D].

  The host reads only the norms of the activations, to choose the rows to keep.
  A row is named by its slot: its index in the array, over all devices.

  Attributes:
    n_pools: how many pools the window has room for.
    nonfinite: tokens whose activations `kept_slots` found not to be finite.
  """

  def __init__(
    self,
    forward: pools.Forward,
    site: str,
    n_pools: int,
    d_model: int,
  ):
    """An empty window.

    Args:
      forward: the subject, on the mesh that the window lies on.
      site: whose activations the window holds.
      n_pools: how many pools it has room for.
      d_model: D, width of the site.
    """
    self._forward, self._site = forward, site
    self.n_pools = n_pools
    config, mesh = forward.config, forward.mesh
    self._n_shards = mesh.shape['data']
    pool_rows = pools.size(config) * config.context_length
    self._shard_rows = n_pools * pool_rows // self._n_shards
    self._data = _zeros(
      (self._n_shards, self._shard_rows, d_model), config.dtype, mesh
    )
    self._rows_used, self.nonfinite = 0, 0
    self._pools = []

  @property
  def n_filled(self) -> int:
    """How many pools the window holds."""
    return len(self._pools)

  def append(self, pool: list[contexts_lib.Context]) -> None:
    """Starts the forward passes of a pool."""
    offsets = []
    batches = self._forward.dispatch(pool)
    for batch in batches:
      resid_CTD, _ = batch.outputs[self._site]
      offsets.append(self._rows_used)
      self._data = _append(
        self._data, resid_CTD, self._rows_used, self._forward.mesh
      )
      contexts, length, _ = resid_CTD.shape
      self._rows_used += contexts // self._n_shards * length
    norms = [
      [batch.outputs[name][1] for name in self._forward.names]
      for batch in batches
    ]
    indices = [batch.contexts for batch in batches]
    self._pools.append((pool, indices, norms, offsets))

  def first_slots(self) -> np.ndarray:
    """The slot of each context's first token, in the text's order, int64.

    Those of its other tokens follow.
    """
    slots = []
    for pool, indices, norms_of_batches, offsets in self._pools:
      of_context = np.empty(len(pool), np.int64)
      for batch, norms_CT, offset in zip(indices, norms_of_batches, offsets):
        contexts, length = norms_CT[0].shape
        shard, row = np.divmod(
          np.arange(len(batch)), contexts // self._n_shards
        )
        of_context[batch] = shard * self._shard_rows + offset + row * length
      slots.append(of_context)
    return np.concatenate(slots)

  def kept_slots(self, mask: Mask) -> np.ndarray:
    """Slots of the rows that a mask keeps, in the text's order, int32."""
    slots, self.nonfinite = [], 0
    firsts = iter(self.first_slots().tolist())
    for pool, indices, norms_of_batches, _ in self._pools:
      of_context = [None] * len(pool)
      for batch, norms_CT in zip(indices, norms_of_batches):
        norms_CT = [np.asarray(norm_CT) for norm_CT in norms_CT]
        for row, i in enumerate(batch):
          norms = [norm_CT[row, : len(pool[i].tokens)] for norm_CT in norms_CT]
          keep = pools.kept(
            self._forward.config, mask, pool[i].positions, norms
          )
          self.nonfinite += int((~pools.finite(norms)).sum())
          of_context[i] = np.flatnonzero(keep)
      slots += [next(firsts) + places for places in of_context]
    return np.concatenate(slots).astype(np.int32)

  def take(self, slots_B: np.ndarray) -> jax.Array:
    """The rows in these slots, zeros for slot -1; float32 [B, D]."""
    return _take(self._data, slots_B, self._forward.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, mesh):
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec('data'))
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnames='mesh', donate_argnums=0)
def _append(data, resid_CTD, start, mesh):
  """Writes activations at row `start` of each device's rows."""

  def local(data, resid_CTD, start):
    rows = resid_CTD.reshape(1, -1, resid_CTD.shape[-1])
    return jax.lax.dynamic_update_slice(data, rows, (0, start, 0))

  by_data = PartitionSpec('data')
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_data, by_data, PartitionSpec()),
    out_specs=by_data,
  )(data, resid_CTD, start)


@functools.partial(jax.jit, static_argnames='mesh')
def _take(data, slots_B, mesh):
  """Rows by their slots, in the batch's sharding; zeros for -1."""

  def local(data, slots_B):
    here_B = slots_B - jax.lax.axis_index('data') * data.shape[1]
    inside_B = (here_B >= 0) & (here_B < data.shape[1]) & (slots_B >= 0)
    rows_BD = (
      data[0].at[jnp.where(inside_B, here_B, 0)].get(mode='promise_in_bounds')
    )
    rows_BD = jnp.where(inside_B[:, None], rows_BD.astype(jnp.float32), 0)
    # Each row is on one device: the sum is exact.
    return jax.lax.psum_scatter(rows_BD, 'data', tiled=True)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec('data'), PartitionSpec()),
    out_specs=mesh_lib.RULES.spec('BD'),
  )(data, slots_B)

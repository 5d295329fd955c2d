"""What a step of the scan works on: its plan, its state and a batch."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.probing.scan import double, quality, scatter
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.double import Double
from sae_jax.probing.scan.quality import Sums
from sae_jax.probing.scan.scatter import Scatter

# A device has a state of its own of what it sums over its share of the tokens,
# and a data shard one of each latent.
DEVICES = PartitionSpec(mesh_lib.AXES)
_LATENTS = PartitionSpec(*mesh_lib.AXES)
TRAINED = 'trained'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step is compiled for.

  Attributes:
    config: what the scan is asked for.
    sae: the autoencoder's config.
    controls: name and config of each autoencoder beside it.
    positions: tokens of the longest context.
    features: whether the rows are those of statistics, examples and codes.
    pca: whether principal components may be fitted to some.
    test: whether some may be scored.
    width: columns of the codes.
    few: whether shards offer as many latents of a token as will mostly do,
      with TopK.
  """

  config: ScanConfig
  sae: autoencoder.SaeConfig
  controls: tuple[tuple[str, autoencoder.SaeConfig], ...]
  positions: int
  features: bool = False
  pca: bool = False
  test: bool = False
  width: int = 0
  few: bool = False

  @property
  def scored(self) -> dict[str, autoencoder.SaeConfig]:
    """The configs of all autoencoders that are scored, by name."""
    return {TRAINED: self.sae} | dict(self.controls)


@flax.struct.dataclass
class State:
  """What the scan has summed. The first axis is of devices or data shards.

  Attributes:
    reducers: the states of reducers by name, an axis of latents second.
    sums: metrics of autoencoders on test rows, by name.
    fired: tokens that latents fired on, by name of the autoencoder, [., N].
    train_scatter: of rows that components are fitted to.
    test_scatter: of test rows.
    tied: tokens whose last active latent rounding may have chosen.
    most: active latents of the token with the most.
  """

  reducers: dict[str, Any]
  sums: dict[str, Sums]
  fired: dict[str, Double]
  train_scatter: Scatter
  test_scatter: Scatter
  tied: Double
  most: jax.Array


@flax.struct.dataclass
class Batch:
  """Rows and what the store knows of them.

  Attributes:
    raw_BD: activations.
    document_B: int32 number of the document.
    position_B: int32 position in the context.
    row_hi: upper 32 bits of the first row, uint32.
    row_lo: lower 32 bits.
    size: number of rows that count, the first ones.
    pca: the first row that principal components are fitted to, counted from
      that of the batch, and one past the last, int32.
    test: those that are scored, in the same way.
  """

  raw_BD: jax.Array
  document_B: jax.Array
  position_B: jax.Array
  row_hi: jax.Array
  row_lo: jax.Array
  size: jax.Array
  pca: jax.Array
  test: jax.Array


def state_specs(state: State) -> State:
  """Partitions of a state."""

  def all_with(spec, tree):
    return jax.tree.map(lambda _: spec, tree)

  return all_with(DEVICES, state).replace(
    reducers=all_with(_LATENTS, state.reducers),
    fired=all_with(_LATENTS, state.fired),
  )


def _own_state(plan: Plan, shards: int) -> State:
  """A device's state before any row."""
  kinds = plan.config.reducers() | plan.config.near_reducers()
  d_model = plan.sae.d_model
  return State(
    reducers={
      name: kind.init(plan.sae.n_latents // shards)
      for name, kind in kinds.items()
    },
    sums={name: quality.init(d_model, plan.positions) for name in plan.scored},
    fired={
      name: double.zeros((config.n_latents // shards,))
      for name, config in plan.scored.items()
    },
    train_scatter=scatter.init(d_model),
    test_scatter=scatter.init(d_model),
    tied=double.zeros(()),
    most=jnp.zeros((), jnp.int32),
  )


def abstract_state(plan: Plan, mesh: Mesh) -> State:
  """Shapes, dtypes and shardings of a state, without making one."""
  own = jax.eval_shape(lambda: _own_state(plan, mesh.shape['latent']))

  def spread(a, spec):
    lead = [mesh.shape['data'] * mesh.shape['latent'], *a.shape]
    if spec == _LATENTS:
      lead[:2] = [mesh.shape['data'], a.shape[0] * mesh.shape['latent']]
    return jax.ShapeDtypeStruct(
      tuple(lead), a.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree.map(spread, own, state_specs(own))


def init_state(plan: Plan, mesh: Mesh) -> State:
  """The state before any row, made on the devices."""
  return _maker(plan, mesh)()


@functools.lru_cache(maxsize=4)
def _maker(plan: Plan, mesh: Mesh) -> Callable[[], State]:
  specs = state_specs(abstract_state(plan, mesh))

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False
  )
  def make():
    own = _own_state(plan, mesh.shape['latent'])
    return jax.tree.map(lambda a: a[None], own)

  return make

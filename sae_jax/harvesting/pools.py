"""Runs pools of contexts through the subject, and selects tokens to keep."""

import functools
import math
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax import subject as subject_lib
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store import layout
from sae_jax.store.manifest import make_mask, Mask
from sae_jax.store.writer import StoreWriter
from sae_jax.subject import capture, sharding
from sae_jax.text import contexts

# Batches of a pool: contexts are sorted by length within a pool, so that those
# of a batch are alike. The store keeps the order of the text.
_BATCHES = 8
# Batches are padded to one of this many lengths, each compiled once.
_LENGTHS = 4
# Ordinary tokens stay below this many medians; attention sinks exceed it.
_SINK_MEDIANS = 10


def size(config: HarvestConfig) -> int:
  """How many contexts a pool has."""
  return _BATCHES * config.batch_contexts


def expected(config: HarvestConfig, context: contexts.Context) -> int:
  """Rows that a context gives before the norm rule."""
  return len(context.tokens) - config.mask_first


def allowed(config: HarvestConfig, positions: np.ndarray) -> np.ndarray:
  """Which tokens the rule on positions keeps, bool [l]."""
  return positions > 0 if config.mask_first else np.ones(len(positions), bool)


def kept(
  config: HarvestConfig,
  mask: Mask,
  positions: np.ndarray,
  norms: list[np.ndarray],
) -> np.ndarray:
  """Which tokens the rules on positions and norms keep, bool [l].

  Args:
    config: of the harvest.
    mask: the limits on norms.
    positions: [l], position of each token in its context.
    norms: of each site in the mask's order, [l].
  """
  keep = allowed(config, positions) & finite(norms)
  for norm, limit in zip(norms, mask.norm_limit):
    keep &= limit is None or norm <= limit
  return keep


def finite(norms: list[np.ndarray]) -> np.ndarray:
  """Which tokens have finite norms at all sites, bool [l]; others never stay.

  Args:
    norms: of each site, [l].
  """
  return np.isfinite(norms).all(0)


@functools.partial(
  jax.jit, static_argnames=('config', 'sites', 'dtype', 'mesh')
)
def _residuals(config, params, tokens_BT, sites, dtype, mesh):
  """Site -> activations in the store's dtype, and their norms."""
  outputs = {}
  captured = capture.capture_many(config, params, tokens_BT, sites)
  for site, resid_BTD in captured.items():
    norm_BT = jnp.linalg.norm(resid_BTD.astype(jnp.float32), axis=-1)
    outputs[str(site)] = (
      jax.lax.with_sharding_constraint(
        resid_BTD.astype(dtype), sharding.tokens_sharding(mesh)
      ),
      # On every device, so that every process can read them.
      jax.lax.with_sharding_constraint(
        norm_BT, NamedSharding(mesh, PartitionSpec())
      ),
    )
  return outputs


def batches(
  config: HarvestConfig, pool: list[contexts.Context]
) -> list[tuple[list[int], np.ndarray]]:
  """Batches of a pool, contexts of similar length together.

  Args:
    config: of the harvest.
    pool: the contexts.

  Returns:
    For each batch the indices of its contexts in the pool, and their tokens,
    padded on the right, int32 [C, T]. Attention has no weight on padding, but
    were it of another token whose embedding is not finite, all would be NaN.
  """
  unit = math.ceil(config.context_length / _LENGTHS)
  by_length = sorted(range(len(pool)), key=lambda i: -len(pool[i].tokens))
  padded = []
  for start in range(0, len(pool), config.batch_contexts):
    batch = by_length[start : start + config.batch_contexts]
    longest = len(pool[batch[0]].tokens)
    length = min(math.ceil(longest / unit) * unit, config.context_length)
    tokens_BT = np.zeros((config.batch_contexts, length), np.int32)
    for row, i in enumerate(batch):
      tokens_BT[row, : len(pool[i].tokens)] = pool[i].tokens
      tokens_BT[row, len(pool[i].tokens) :] = pool[i].tokens[-1]
    padded.append((batch, tokens_BT))
  return padded


class Batch(NamedTuple):
  """A forward pass over some contexts of a pool, which may still run.

  Attributes:
    contexts: indices of the contexts in the pool.
    outputs: site -> activations [C, T, D] and norms [C, T].
  """

  contexts: list[int]
  outputs: dict[str, tuple[jax.Array, jax.Array]]


class Forward:
  """Runs the subject on pools of contexts.

  Attributes:
    config: of the harvest.
    subject: the language model.
    mesh: of the devices it runs on.
    names: names of the sites that are read.
  """

  def __init__(
    self,
    config: HarvestConfig,
    subject: subject_lib.Subject,
    sites: tuple[capture.Site, ...],
    mesh: jax.sharding.Mesh,
  ):
    """Lays the subject over the mesh.

    Args:
      config: of the harvest.
      subject: the language model.
      sites: where its activations are read.
      mesh: contexts are sharded over its data axis, weights over the other.

    Raises:
      UserError: if the data axis does not divide a batch of contexts.
    """
    mesh_lib.check_divides(
      'batch_contexts', config.batch_contexts, mesh, 'data'
    )
    self.config, self.mesh = config, mesh
    self.names = tuple(map(str, sites))
    self._sites, self.subject = sites, subject
    self._params = sharding.place(subject.config, subject.params, mesh)

  def dispatch(self, pool: list[contexts.Context]) -> list[Batch]:
    """Starts the forward passes of a pool, and does not wait for them."""
    dispatched = []
    for indices, tokens_BT in batches(self.config, pool):
      outputs = _residuals(
        self.subject.config,
        self._params,
        self._put(tokens_BT),
        self._sites,
        self.config.dtype,
        self.mesh,
      )
      dispatched.append(Batch(indices, outputs))
    return dispatched

  def fit_mask(
    self, pool: list[contexts.Context], writer: StoreWriter
  ) -> tuple[Mask, list[Batch] | None]:
    """The store's mask, fitted to its first pool where there is none yet.

    Args:
      pool: the first contexts of the token stream.
      writer: of the store.

    Returns:
      The mask, and the batches of the pool if they were run to fit it, so that
      they need not run again.

    Raises:
      UserError: if no activation of the pool at a site is finite.
    """
    mask = layout.read_mask(writer.url, writer.plan)
    if mask is not None:
      return mask, None
    dispatched = self.dispatch(pool)
    medians = [self._median_norm(pool, dispatched, name) for name in self.names]
    mask = make_mask(medians, self.config.mask_norm_multiple)
    return writer.agree(mask), dispatched

  def _median_norm(
    self, pool: list[contexts.Context], batches: list[Batch], name: str
  ) -> float:
    """The median norm at a site; warns of attention sinks that are kept."""
    norms = read_norms(pool, batches, name)
    positions = np.concatenate([context.positions for context in pool])
    finite = norms[allowed(self.config, positions)]
    finite = finite[np.isfinite(finite)]
    if not len(finite):
      raise errors.UserError(
        f'no activation at {name} of the first contexts is finite: '
        "check the subject's weights"
      )
    median = float(np.median(finite))
    loud = int((finite > _SINK_MEDIANS * median).sum())
    if loud and not self.config.mask_norm_multiple:
      logging.warning(
        '%d of the first %d tokens at %s have more than %d times the median '
        'norm, as attention sinks do: --mask_norm_multiple=%d leaves such '
        'out',
        loud,
        len(finite),
        name,
        _SINK_MEDIANS,
        _SINK_MEDIANS,
      )
    return median

  def _put(self, tokens_BT: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      tokens_BT.shape,
      sharding.tokens_sharding(self.mesh),
      lambda index: tokens_BT[index],
    )


def read_activations(
  pool: list[contexts.Context], batches: list[Batch], name: str
) -> np.ndarray:
  """The activations of a pool at a site, in the pool's order, [l, D].

  Args:
    pool: the contexts.
    batches: the forward passes of the pool; waits for them.
    name: name of the site.
  """
  return _in_order(pool, batches, name, 0)


def read_norms(
  pool: list[contexts.Context], batches: list[Batch], name: str
) -> np.ndarray:
  """The norms of the activations of a pool, see `read_activations`, [l]."""
  return _in_order(pool, batches, name, 1)


def _in_order(pool, batches, name, which):
  """One of the outputs of each batch for a site, by context of the pool."""
  of_context = [None] * len(pool)
  for indices, outputs in batches:
    output_BT = np.asarray(outputs[name][which])
    for row, i in enumerate(indices):
      of_context[i] = output_BT[row, : len(pool[i].tokens)]
  return np.concatenate(of_context)

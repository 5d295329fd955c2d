"""Pools of contexts through the subject, and which of their tokens are kept."""

import functools
import math
import operator
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.store import layout
from sae_jax.store.manifest import MASK, Mask
from sae_jax.subject import capture, sharding
from sae_jax.text import contexts

# Contexts are grouped by length within so many batches; the stream keeps
# their order.
_BATCHES = 8
# Batches are padded to one of so many lengths, each compiled once.
_LENGTHS = 4
# Norms of tokens that are no sinks stay within so many medians.
_SINK = 10


def size(config: Any) -> int:
  """Contexts of a pool."""
  return _BATCHES * config.batch_contexts


def expected(config: Any, context: contexts.Context) -> int:
  """Rows that a context should give, before the norm rule."""
  return len(context.tokens) - config.mask_first


def allowed(config: Any, positions: np.ndarray) -> np.ndarray:
  """Which tokens are kept by their place in the context, bool [l]."""
  return positions > 0 if config.mask_first else np.ones(len(positions), bool)


def kept(
  config: Any, mask: Mask, positions: np.ndarray, norms: list[np.ndarray]
) -> np.ndarray:
  """Which tokens are kept by their place and norms, bool [l].

  Args:
    config: the HarvestConfig.
    mask: which norms are.
    positions: [l], places in the context.
    norms: [l] of each site, in the mask's order.
  """
  keep = allowed(config, positions).copy()
  for norm, limit in zip(norms, mask.norm_limit):
    keep &= np.isfinite(norm) & (norm <= limit)
  return keep


@functools.partial(
  jax.jit, static_argnames=('config', 'sites', 'dtype', 'mesh')
)
def _residuals(config, params, tokens_BT, sites, dtype, mesh):
  """Site -> activations as they are stored, and their norms."""
  found = {}
  captured = capture.capture_many(config, params, tokens_BT, sites)
  for site, resid_BTD in captured.items():
    norm_BT = jnp.linalg.norm(resid_BTD.astype(jnp.float32), axis=-1)
    found[str(site)] = (
      jax.lax.with_sharding_constraint(
        resid_BTD.astype(dtype), sharding.tokens_sharding(mesh)
      ),
      # On every device, so that every process can read them.
      jax.lax.with_sharding_constraint(
        norm_BT, NamedSharding(mesh, PartitionSpec())
      ),
    )
  return found


def batches(
  config: Any, pool: list[contexts.Context]
) -> list[tuple[list[int], np.ndarray]]:
  """Batches of a pool, contexts of like length together.

  Args:
    config: the HarvestConfig.
    pool: the contexts.

  Returns:
    Which contexts are in each batch, and their tokens, padded on the right,
    int32 [C, T].
  """
  unit = math.ceil(config.context_length / _LENGTHS)
  by_length = sorted(range(len(pool)), key=lambda i: -len(pool[i].tokens))
  found = []
  for start in range(0, len(pool), config.batch_contexts):
    batch = by_length[start : start + config.batch_contexts]
    longest = len(pool[batch[0]].tokens)
    length = min(math.ceil(longest / unit) * unit, config.context_length)
    tokens_BT = np.zeros((config.batch_contexts, length), np.int32)
    for row, i in enumerate(batch):
      tokens_BT[row, : len(pool[i].tokens)] = pool[i].tokens
    found.append((batch, tokens_BT))
  return found


class Forward:
  """The subject, and how it reads pools of contexts.

  Attributes:
    config: the HarvestConfig.
    mesh: of the devices that it works on.
    names: of the sites that are read.
  """

  def __init__(
    self,
    config: Any,
    subject: Any,
    sites: tuple[capture.Site, ...],
    mesh: jax.sharding.Mesh,
  ):
    """Lays the subject over the mesh.

    Args:
      config: the HarvestConfig.
      subject: the language model.
      sites: where it is read.
      mesh: contexts are split over its data axis, weights over the other.

    Raises:
      UserError: if a batch of contexts cannot be split so.
    """
    mesh_lib.check_divides(
      'batch_contexts', config.batch_contexts, mesh, 'data'
    )
    self.config, self.mesh = config, mesh
    self.names = tuple(map(str, sites))
    self._sites, self._subject = sites, subject
    # The pool that the mask was fitted to, and what it gave: it is harvested
    # next.
    self._fitted = [], []
    self._params = jax.device_put(
      subject.params, sharding.param_shardings(subject.config, mesh)
    )

  def dispatch(self, pool: list[contexts.Context]) -> list:
    """Starts the forward passes of a pool.

    Returns:
      What `collect` takes, while the device works: the contexts of each batch
      and, by site, their activations [C, T, D] and norms [C, T].
    """
    fitted, found = self._fitted
    self._fitted = [], []
    if (
      pool and len(fitted) == len(pool) and all(map(operator.is_, fitted, pool))
    ):
      return found
    found = []
    for batch, tokens_BT in batches(self.config, pool):
      outputs = _residuals(
        self._subject.config,
        self._params,
        self._put(tokens_BT),
        self._sites,
        self.config.dtype,
        self.mesh,
      )
      found.append((batch, outputs))
    return found

  def fit_mask(self, pool: list[contexts.Context], writer: Any) -> Mask:
    """The mask that the store has, or that its first pool gives.

    Raises:
      UserError: if a site of the pool is finite nowhere.
    """
    found = layout.read_json(writer.url, MASK, Mask)
    if found is not None:
      return found
    running, medians = self.dispatch(pool), []
    for name in self.names:
      _, norms = collect(pool, running, name)
      positions = np.concatenate([context.positions for context in pool])
      finite = np.concatenate(norms)[allowed(self.config, positions)]
      finite = finite[np.isfinite(finite)]
      if not len(finite):
        raise errors.UserError(
          f'no activation at {name} of the first contexts is finite: '
          "check the subject's weights"
        )
      medians.append(float(np.median(finite)))
      loud = int((finite > _SINK * medians[-1]).sum())
      if loud and not self.config.mask_norm_multiple:
        logging.warning(
          '%d of the first %d tokens at %s have more than %d times the median '
          'norm, as attention sinks do: --mask_norm_multiple=%d leaves such '
          'out',
          loud,
          len(finite),
          name,
          _SINK,
          _SINK,
        )
    self._fitted = pool, running
    times = self.config.mask_norm_multiple
    limits = [times * median if times else math.inf for median in medians]
    return writer.agree(MASK, Mask(tuple(medians), tuple(limits)))

  def _put(self, tokens_BT: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      tokens_BT.shape,
      sharding.tokens_sharding(self.mesh),
      lambda index: tokens_BT[index],
    )


def collect(
  pool: list[contexts.Context], batches: list, name: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """What a site holds of each context of a pool, in the pool's order.

  Args:
    pool: the contexts.
    batches: of `Forward.dispatch`, which are waited for.
    name: of the site.

  Returns:
    Activations [l, D] and their norms [l] of each context.
  """
  resid, norms = [None] * len(pool), [None] * len(pool)
  for batch, outputs in batches:
    resid_BTD, norm_BT = (np.asarray(array) for array in outputs[name])
    for row, i in enumerate(batch):
      length = len(pool[i].tokens)
      resid[i], norms[i] = resid_BTD[row, :length], norm_BT[row, :length]
  return resid, norms

"""A shard that fills with the rows of pools, and what it leaves out."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sae_jax.harvesting import pools
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store.manifest import Mask
from sae_jax.store.writer import ShardWriter
from sae_jax.text import contexts as contexts_lib


class Place(NamedTuple):
  """A token of the text: its id, position in its context, and document."""

  token: int
  position: int
  document: int


class Filling:
  """A shard that fills."""

  def __init__(
    self, shard: ShardWriter, config: HarvestConfig, names: tuple[str, ...]
  ):
    """An empty shard.

    Args:
      shard: its writer.
      config: of the harvest.
      names: names of the sites.
    """
    self._shard, self._config, self._names = shard, config, names
    self._masked = {'first': 0, 'norm': 0}
    self._source_rows = dict.fromkeys(config.sources, 0)

  def append(
    self,
    mask: Mask,
    pool: list[contexts_lib.Context],
    batches: list[pools.Batch],
    bar: Any,
  ) -> Place | None:
    """Appends a pool in the order of the stream.

    Args:
      mask: the limits on norms.
      pool: the contexts.
      batches: their forward passes; waits for them.
      bar: the progress bar.

    Returns:
      The first token whose activations are not finite, if there is one.
    """
    config, names = self._config, self._names
    # Batch by batch, for a pool takes half a minute on a small machine.
    for batch, outputs in batches:
      jax.block_until_ready(outputs)
      bar.update(sum(pools.expected(config, pool[i]) for i in batch))
    # By site: activations and norms of each context.
    sites = {name: pools.collect(pool, batches, name) for name in names}
    lengths = [len(context.tokens) for context in pool]
    positions = np.concatenate([context.positions for context in pool])
    allowed = pools.allowed(config, positions)
    norms = [np.concatenate(sites[name][1]) for name in names]
    finite = pools.finite(norms)
    keep = pools.kept(config, mask, positions, norms)
    tokens = np.concatenate([context.tokens for context in pool])
    documents = np.concatenate([context.documents for context in pool])
    self._shard.append(
      tokens,
      documents,
      positions,
      keep,
      {name: np.concatenate(sites[name][0])[keep] for name in names},
    )
    # The norm rule may have left some out.
    bar.update(int(keep.sum()) - int(allowed.sum()))
    ends = np.cumsum(lengths)[:-1]
    for context, part in zip(pool, np.split(keep, ends)):
      for _, source, place in context.segments():
        self._source_rows[source] += int(part[place].sum())
    self._masked['first'] += int((~allowed).sum())
    self._masked['norm'] += int((allowed & finite & ~keep).sum())
    if finite.all():
      return None
    # Named where there are any, so that other stores keep their identity.
    nonfinite = int((allowed & ~finite).sum())
    self._masked['nonfinite'] = self._masked.get('nonfinite', 0) + nonfinite
    first = int(np.argmin(finite))
    return Place(
      *(int(values[first]) for values in (tokens, positions, documents))
    )

  def finish(self) -> None:
    """Writes it.

    Raises:
      UserError: see `ShardWriter.finish`.
    """
    self._shard.finish(self._source_rows, self._masked)

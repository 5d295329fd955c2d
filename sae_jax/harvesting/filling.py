"""A shard that fills with the rows of pools, and what it leaves out."""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from sae_jax.harvesting import cutting, pools
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store.manifest import Mask
from sae_jax.store.writer import ShardWriter, StoreWriter
from sae_jax.text import contexts as contexts_lib


class Place(NamedTuple):
  """A token of the text: its id, position in its context, and document."""

  token: int
  position: int
  document: int


class Filling:
  """A shard that fills."""

  def __init__(
    self,
    shard: ShardWriter,
    config: HarvestConfig,
    names: tuple[str, ...],
    stored: tuple[str, ...],
  ):
    """An empty shard.

    Args:
      shard: its writer.
      config: of the harvest.
      names: names of the sites whose norms are read.
      stored: names of those whose activations are stored.
    """
    self._shard, self._config = shard, config
    self._names, self._stored = names, stored
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
      batches: their forward passes, none if no norms are read; waits for them.
      bar: the progress bar.

    Returns:
      The first token whose activations are not finite, if there is one.
    """
    config = self._config
    positions = np.concatenate([context.positions for context in pool])
    allowed = pools.allowed(config, positions)
    # Batch by batch, for a pool takes half a minute on a small machine.
    for batch, outputs in batches:
      jax.block_until_ready(outputs)
      bar.update(sum(pools.expected(config, pool[i]) for i in batch))
    if not batches:
      bar.update(int(allowed.sum()))
    norms = [pools.read_norms(pool, batches, name) for name in self._names]
    finite = pools.finite(norms)
    keep = pools.kept(config, mask, positions, norms)
    tokens = np.concatenate([context.tokens for context in pool])
    documents = np.concatenate([context.documents for context in pool])
    self._shard.append(
      tokens,
      documents,
      positions,
      keep,
      {
        name: pools.read_activations(pool, batches, name)[keep]
        for name in self._stored
      },
    )
    # The norm rule may have left some out.
    bar.update(int(keep.sum()) - int(allowed.sum()))
    ends = np.cumsum([len(context.tokens) for context in pool])[:-1]
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


def write(
  config: HarvestConfig,
  forward: pools.Forward | None,
  work: Iterator[cutting.Work],
  fitted: list[pools.Batch] | None,
  mask: Mask,
  writer: StoreWriter,
  bar: Any,
  is_written: bool = True,
) -> None:
  """Fills the shards that are missing, and writes them.

  Pool n is dispatched to the devices before pool n - 1 is stored.

  Args:
    config: of the harvest.
    forward: runs the subject; None where no activation and no norm is read.
    work: pools of the shards.
    fitted: the forward passes of the first pool, if they have been run.
    mask: the limits on norms.
    writer: of the store.
    bar: the progress bar.
    is_written: whether this process writes the shards.
  """
  names = () if forward is None else forward.names
  shard, dispatched, warned = None, None, False
  for item in itertools.chain(work, [None]):
    before, dispatched = dispatched, None
    if item is not None:
      # The first pool has been through the subject, to fit the mask.
      if fitted is None or not item.is_first_pool:
        fitted = [] if forward is None else forward.dispatch(item.contexts)
      dispatched, fitted = (item, fitted), None
    if before is None:
      continue
    pool, batches = before
    if shard is None:
      shard = Filling(
        writer.shard(pool.shard), config, names, writer.plan.sites
      )
    bad = shard.append(mask, pool.contexts, batches, bar)
    if bad and not warned:
      logging.warning(
        'activations that are not finite are left out, first those of token '
        "%d (%r), at position %d of document %d: check the subject's weights",
        bad.token,
        forward.subject.tokenizer.id_to_token(bad.token),
        bad.position,
        bad.document,
      )
      warned = True
    if pool.last:
      if is_written:
        shard.finish()
      shard = None

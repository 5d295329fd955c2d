"""Rows as a store has them, whose activations are computed as they are read.

What a store would hold beside its activations is written first, from the text
alone (`harvesting.text_alone`): 16 bytes a token. That gives every row its
number, document and place, and says what is held out. Then the subject computes
the activations of any rows from the contexts that these are of, on the devices
that use them, in the pools that a harvest makes. So a row is what the store of
the same text has, and the way to it does not lead through the rows before it.

Rows could be counted as their contexts are computed, but what is held out is a
share of all of them. Where a rule on norms leaves tokens out, the subject runs
once more, before, to apply it; a row number for each token that it leaves out
would spare that, and give other rows to hold out and to draw examples from.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.feed import device_window
from sae_jax.harvesting import config as harvesting_config
from sae_jax.harvesting import pools, text_alone
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store.manifest import Manifest
from sae_jax.subject import capture
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus

# Of a shard, and of windows of a shard: rows of two may be in a batch.
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a run's activations are made, and from which text.

  Attributes:
    config: of a harvest of the text.
    dataset: the description of the data that the run was trained on.
    corpus: the identity of each source, in the sources' order.
  """

  config: HarvestConfig
  dataset: dict[str, Any]
  corpus: tuple[str, ...]

  @property
  def record(self) -> dict[str, Any]:
    """All that rows depend on but the subject's weights."""
    ignored = config_lib.names_with(HarvestConfig, 'speed_only')
    config = {
      name: value
      for name, value in dataclasses.asdict(self.config).items()
      if name not in (*ignored, 'subject')
    }
    return {
      'config': config,
      'corpus': self.corpus,
      'median_norm': self._medians,
    }

  @property
  def is_same_text(self) -> bool:
    """Whether documents are those of the data that the run was trained on.

    There may be more or fewer, and more or fewer may be held out.
    """
    old = recorded(self.dataset)
    outside = (
      'subject',
      'sites',
      'sources',
      'batch_contexts',
      *config_lib.names_with(HarvestConfig, 'sizes_store'),
      *config_lib.names_with(HarvestConfig, 'speed_only'),
    )
    same = {name: getattr(old, name) for name in outside}
    return dataclasses.replace(self.config, **same) == old and list(
      self.corpus
    ) == list(self.dataset.get('corpus', {}).values())

  @property
  def _medians(self) -> dict[str, float]:
    """The median norm at each site; none where no limit refers to it."""
    return self.dataset['mask'].get('median_norm') or {}

  def open(
    self,
    url: str,
    site: str,
    subject: subject_lib.Subject,
    mesh: jax.sharding.Mesh,
    batch_rows: int,
  ) -> 'TextRows':
    """Writes the text where it is not written, and opens it.

    Args:
      url: folder of the text, of these inputs alone.
      site: the site whose activations are read.
      subject: the language model.
      mesh: where the subject and the rows lie.
      batch_rows: most rows that are read at a time, a multiple of the devices.

    Raises:
      UserError: see `text_alone.write`.
    """
    # A forward pass is over all devices.
    contexts = self.config.batch_contexts
    working = dataclasses.replace(
      self.config, batch_contexts=contexts + -contexts % mesh.shape['data']
    )
    of_norms = None
    # Those that are not finite are left out whatever the rules are.
    nonfinite = self.dataset['mask'].get('masked_nonfinite', 0)
    if self.config.mask_norm_multiple or nonfinite:
      of_norms = _forward(working, subject, self.dataset['sites'], mesh)
    manifest = text_alone.write(
      self.config,
      url,
      subject,
      self.dataset['d_model'],
      self._medians,
      of_norms,
    )
    forward = _forward(working, subject, (site,), mesh)
    return TextRows(url, manifest, site, forward, batch_rows)


def recorded(dataset: Mapping[str, Any]) -> HarvestConfig:
  """The config of the harvest that made the data of a run.

  Raises:
    UserError: if no harvest did.
  """
  if not {'sites', 'sources', 'context_length'} <= dataset['config'].keys():
    raise errors.UserError(
      'the checkpoint was trained on a store that sae-harvest did not make, '
      'which does not say how activations are made: give --store in place of '
      '--stream'
    )
  return config_lib.from_dict(
    HarvestConfig, dataset['config'], "the config of the run's data"
  )


def recipe(dataset: dict[str, Any], **changes: Any) -> Recipe:
  """How activations of a run are made from the text it was trained on, or more.

  Args:
    dataset: the description of the data that a checkpoint keeps.
    changes: fields of the harvest's config that are others.

  Raises:
    UserError: if the data was not harvested, a source does not exist, the
      config does not fit, or nothing is held out.
  """
  # By the names that are recorded, whichever the harvest was given.
  names = {'subject': dataset['subject'], 'sites': tuple(dataset['sites'])}
  config = dataclasses.replace(recorded(dataset), **names, **changes)
  harvesting_config.check(config)
  if not config.holdout_fraction:
    raise errors.UserError(
      'the run was trained on a store that holds out no text to score: give '
      '--holdout_fraction=0.1'
    )
  identities = tuple(corpus.identity(source) for source in config.sources)
  return Recipe(config, dataset, identities)


def _forward(config, subject, sites, mesh) -> pools.Forward:
  parsed = [capture.parse_site(site, subject.config) for site in sites]
  return pools.Forward(config, subject, tuple(parsed), mesh)


class _Shard(NamedTuple):
  """The contexts of a shard, and where its rows are in them.

  Attributes:
    contexts: the contexts.
    context_R: the context that each row is of.
    offset_R: its place there.
  """

  contexts: list[contexts_lib.Context]
  context_R: np.ndarray
  offset_R: np.ndarray


class TextRows(store_lib.Text):
  """Text whose activations at one site are computed when they are read.

  Programs run on all devices of the mesh: every process makes the same calls,
  in the thread that runs its other programs.

  Attributes:
    site: the site whose activations are read.
    width: of a row, D.
  """

  def __init__(
    self,
    url: str,
    manifest: Manifest,
    site: str,
    forward: pools.Forward,
    batch_rows: int,
  ):
    """Computes nothing yet.

    Args:
      url: folder of the text.
      manifest: the text's.
      site: the site that is read.
      forward: the subject on the mesh, at that site.
      batch_rows: see `Recipe.open`.
    """
    super().__init__(url, manifest)
    self.site, self._forward, self._batch_rows = site, forward, batch_rows
    self.width = manifest.d_model
    size = pools.size(forward.config)
    self._n_pools = math.ceil(
      batch_rows / (size * forward.config.context_length)
    )
    self._window_contexts = self._n_pools * size
    self._shard = functools.lru_cache(_KEPT)(self._read_shard)
    self._window = functools.lru_cache(_KEPT)(self._computed)

  def on_devices(
    self, start: int, stop: int, size: int, finite: bool = False
  ) -> jax.Array:
    """Activations of rows start to stop, then copies of the last.

    Args:
      start: first row.
      stop: one past the last.
      size: rows of the result, as many or more; a multiple of the data axis.
      finite: whether rows must be finite.

    Returns:
      float32 [size, D], split over the data axis.

    Raises:
      IndexError: if there are no such rows.
      UserError: if the text cannot be read, or a row is not finite.
    """
    self._check_rows(start, stop - 1)
    raw_BD, row = None, start
    while row < stop:
      number = int(np.searchsorted(self.starts, row, 'right')) - 1
      shard, first = self._shard(number), int(self.starts[number])
      window = int(shard.context_R[row - first]) // self._window_contexts
      begin = window * self._window_contexts
      past = np.searchsorted(shard.context_R, begin + self._window_contexts)
      end = min(stop, first + int(past))
      here = slice(row - first, end - first)
      computed, slots = self._window(number, window)
      slots_B = np.full(size, -1, np.int32)
      slots_B[row - start : end - start] = (
        slots[shard.context_R[here] - begin] + shard.offset_R[here]
      )
      if end == stop:
        slots_B[stop - start :] = slots_B[stop - start - 1]
      piece_BD = computed.take(slots_B)
      raw_BD = piece_BD if raw_BD is None else raw_BD + piece_BD
      row = end
    if finite:
      bad = int(_first_bad(raw_BD, self._forward.mesh))
      if bad >= 0:
        raise self._not_finite(start + bad)
    return raw_BD

  def finite_rows(self, start: int, stop: int) -> np.ndarray:
    """Rows start to stop, all of them finite, [stop - start, D] float32.

    Raises:
      IndexError: see `on_devices`.
      UserError: see `on_devices`.
    """
    size, parts = self._batch_rows, []
    for row in range(start, stop, size):
      end = min(stop, row + size)
      raw_BD = _whole(
        self.on_devices(row, end, size, finite=True), self._forward.mesh
      )
      parts.append(np.asarray(raw_BD)[: end - row])
    return np.concatenate(parts)

  def _read_shard(self, number: int) -> _Shard:
    low, high = self._stream_starts[number : number + 2]
    tokens, documents, positions = self.stream(low, high)
    begins = np.flatnonzero(positions == 0)
    place_R = self.stream_index(*self.starts[number : number + 2]) - low
    context_R = np.searchsorted(begins, place_R, 'right') - 1
    cuts = begins[1:]
    return _Shard(
      [
        contexts_lib.Context(*part, (), contexts_lib.BEGINNING)
        for part in zip(np.split(tokens, cuts), np.split(documents, cuts))
      ],
      context_R,
      place_R - begins[context_R],
    )

  def _computed(
    self, shard: int, number: int
  ) -> tuple[device_window.DeviceWindow, np.ndarray]:
    """A window of a shard's contexts, and the slot that each begins in."""
    begin = number * self._window_contexts
    contexts = self._shard(shard).contexts[begin:][: self._window_contexts]
    window = device_window.DeviceWindow(
      self._forward, self.site, self._n_pools, self.manifest.d_model
    )
    size = pools.size(self._forward.config)
    for start in range(0, len(contexts), size):
      window.append(contexts[start : start + size])
    return window, window.first_slots()

  def _not_finite(self, row: int) -> errors.UserError:
    (place,) = self.stream_index(row, row + 1)
    token, document, position = self.stream(place, place + 1)
    return errors.UserError(
      f'the activation of row {row} is not finite (token {token[0]}, at '
      f'position {position[0]} of document {document[0]}): check the '
      "subject's weights, or harvest the text, which leaves such tokens out, "
      'and give --store in place of --stream'
    )

  def _error(self, name: str, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot read {name} of the text in {self.url}: {errors.reason(error)}: '
      'check your access, or delete that folder, and the same command makes it '
      'again'
    )


@functools.partial(jax.jit, static_argnames='mesh')
def _first_bad(raw_BD, mesh):
  """The first row that is not finite; -1 if all are. On every device."""
  bad_B = ~jnp.isfinite(raw_BD).all(1)
  return jax.lax.with_sharding_constraint(
    jnp.where(bad_B.any(), jnp.argmax(bad_B), -1), mesh_lib.sharding(mesh, '')
  )


@functools.partial(jax.jit, static_argnames='mesh')
def _whole(raw_BD, mesh):
  """The rows on every device, so that every process can read them."""
  return jax.lax.with_sharding_constraint(raw_BD, mesh_lib.sharding(mesh, ''))

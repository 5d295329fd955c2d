"""The scan: one pass over all rows, which goes on where it was."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from sae_jax import autoencoder, errors, progress
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.feed.rows import Rows
from sae_jax.ops import micro_batches
from sae_jax.probing.scan import candidates, rows, saving, step
from sae_jax.probing.scan import codes as codes_lib
from sae_jax.probing.scan import state as state_lib
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.result import ScanResult
from sae_jax.probing.scan.state import TRAINED

# Of a batch that is done again with all candidates: those lists are longer.
_PIECES = 32
# In a workdir.
_CODES = 'codes'
# Columns of the codes to begin with, where any number may be active.
_FIRST_WIDTH = 64


def scan(
  config: ScanConfig,
  trained: Trained,
  store: Rows,
  workdir: str,
  mesh: Mesh,
  controls: Mapping[str, Trained] | None = None,
  made_from: Any = None,
  asked: Callable[[int], bool] = lambda batch: False,
) -> ScanResult | None:
  """Reads and encodes each row once, and takes all that follows from that.

  The workdir gets codes/ (see `codes`) and, while it is not finished, scan/,
  from which the same call goes on. Every process of a mesh makes it.

  Args:
    config: sizes.
    trained: the autoencoder.
    store: the rows, the last of which are test rows.
    workdir: of the results, local path or URL.
    mesh: axes ("data", "latent").
    controls: autoencoders that are scored beside it, by name.
    made_from: what else must be the same to go on with what was saved, as JSON
      has it.
    asked: whether to save and stop after so many batches.

  Returns:
    The result; None if it was asked to stop.

  Raises:
    UserError: if the latents do not divide among the shards, a row cannot be
      read or is not finite, there are no test rows or they do not vary, or
      results cannot be written.
  """
  if not store.test_rows:
    raise errors.UserError(
      f'store {store.url} has no held-out rows to score: harvest with a '
      'holdout_fraction above 0'
    )
  scored = {TRAINED: trained} | dict(controls or {})
  for of in scored.values():
    mesh_lib.check_divides('n_latents', of.config.n_latents, mesh, 'latent')
  fixed = candidates.code_width(trained.config)
  plan = state_lib.Plan(
    # No program depends on when it is saved.
    config=dataclasses.replace(config, save_every_rows=0),
    sae=trained.config,
    controls=tuple((name, of.config) for name, of in (controls or {}).items()),
    positions=max(1, store.manifest.context_length),
    width=fixed or _FIRST_WIDTH,
    few=fixed is not None and mesh.shape['latent'] > 1,
  )
  saes = {name: on_mesh(of.sae, mesh) for name, of in scored.items()}
  longest = _longest_rows(mesh)(saes)
  writer = codes_lib.Writer(
    f'{workdir}/{_CODES}', 0, fixed, jax.process_index(), jax.process_count()
  )
  pieces = rows.segments(config, store)
  made_from = config_lib.through_json(
    {
      'inputs': made_from,
      'config': dataclasses.asdict(plan.config),
      'mesh': dict(mesh.shape),
      'processes': jax.process_count(),
      'controls': [[name, dataclasses.asdict(c)] for name, c in plan.controls],
    }
  )
  with saving.Saver(workdir, made_from) as saver:
    saved = saver.load(state_lib.abstract_state(plan, mesh), writer)
    row, width, state = saved or (
      0,
      plan.width,
      state_lib.init_state(plan, mesh),
    )
    plan = dataclasses.replace(plan, width=width)
    loop = _Loop(plan, mesh, saes, longest, state, writer, saver)
    every = config.save_every_rows
    if not loop.over(pieces, row, store, every, asked):
      return None
  codes = writer.seal(int(np.asarray(_greatest(loop.state.most))))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('codes are written')
  if jax.process_index() == 0:
    writer.record(codes)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('codes are found')
  result = ScanResult.of(
    loop.plan,
    mesh,
    loop.state,
    {name: of.mse_of_mean for name, of in scored.items()},
    codes.url,
    rows=min(store.manifest.n_rows, config.feature_rows),
  )
  if math.isnan(result.metrics.fvu):
    raise errors.UserError(
      f'the test rows of store {store.url} differ by no more than rounding, or '
      'their reconstructions are not finite: they have no FVU; use another '
      'store'
    )
  return result


def remove(workdir: str) -> None:
  """Removes the codes, and what the scan would go on from; by one process."""
  for name in (_CODES, saving.FOLDER):
    folder = epath.Path(workdir) / name
    if folder.exists():
      folder.rmtree()


def on_mesh(sae: autoencoder.Sae, mesh: Mesh) -> autoencoder.Sae:
  """An autoencoder split over the latents of a mesh."""

  def put(array, sharding):
    if isinstance(array, jax.Array) and array.sharding == sharding:
      return array
    # Of several processes each has the whole of it.
    whole = np.asarray(array)
    return jax.make_array_from_callback(
      whole.shape, sharding, lambda index: whole[index]
    )

  return jax.tree.map(put, sae, mesh_lib.shardings(sae, mesh))


@functools.lru_cache(maxsize=4)
def _longest_rows(mesh: Mesh) -> Callable[[dict], dict]:
  """The function of autoencoders by name to their `candidates.longest_row`."""

  def longest(saes):
    return jax.tree.map(
      candidates.longest_row,
      saes,
      is_leaf=lambda node: isinstance(node, autoencoder.Sae),
    )

  return jax.jit(longest, out_shardings=mesh_lib.sharding(mesh, ''))


@jax.jit
def _greatest(of: jax.Array) -> jax.Array:
  return of.max()


class _Loop:
  """The loop over batches, and the state it has come to."""

  def __init__(self, plan, mesh, saes, longest, state, writer, saver):
    self.plan, self.state = plan, state
    self._mesh, self._saes, self._longest = mesh, saes, longest
    self._writer, self._saver = writer, saver
    self._pending, self._served = [], (False, False)

  def over(self, pieces, row, store, every, asked) -> bool:
    """Does the rows that are left; whether it came to the end."""
    config, mesh = self.plan.config, self._mesh
    devices = mesh.shape['data'] * mesh.shape['latent']
    size = -(-config.batch_rows // devices) * devices
    parts = rows.batches(pieces, size, row)
    self._served = tuple(
      any(getattr(piece, name) for piece in pieces if piece.features)
      for name in ('pca', 'test')
    )
    total = sum(piece.stop - piece.start for piece in pieces)
    left = sum(part.stop - part.start for part in parts)
    saved_at = row
    with (
      progress.bar(
        total=total, unit='tok', desc='scan', initial=total - left
      ) as bar,
      rows.read_ahead(parts, store, size, mesh) as ready,
    ):
      for done, (part, batch) in enumerate(ready, 1):
        self._do(part, batch)
        bar.update(part.stop - part.start)
        stop = asked(done)
        due = part.stop - saved_at >= every
        if stop or due or part is parts[-1]:
          self._write_codes()
          self._saver.save(part.stop, self.plan.width, self.state, self._writer)
          saved_at = part.stop
        if stop and part is not parts[-1]:
          return False
    return True

  def _do(self, part, batch) -> None:
    while True:
      # One program for all rows of features, as it takes long to compile.
      own = bool(part.pca), bool(part.test)
      pca, test = self._served if part.features else own
      serves = dataclasses.replace(
        self.plan, features=part.features, pca=pca, test=test
      )
      do = step.make_step(serves, self._mesh)
      self.state, vals_BK, idx_BK, needed = do(
        self.state, self._saes, self._longest, batch
      )
      fixed = candidates.code_width(self.plan.sae) is not None
      if fixed and not serves.few:
        break
      # The codes may have been too narrow, or shards have offered too little.
      needed = int(needed)
      if needed <= self.plan.width:
        break
      if fixed:
        self._do_in_pieces(part, batch)
        return
      width = 1 << (needed - 1).bit_length()
      self.plan = dataclasses.replace(self.plan, width=width)
    if not part.features:
      return
    if self._writer.owns(part.start):
      for array in (vals_BK, idx_BK):
        array.copy_to_host_async()
    self._pending.append((part, vals_BK, idx_BK))
    # The devices have the next batch by the time that this one is waited for.
    while len(self._pending) > 1:
      self._write_first()

  def _do_in_pieces(self, part, batch) -> None:
    """Does a batch with all that shards can offer, for which it is cut."""
    few, self.plan = self.plan, dataclasses.replace(self.plan, few=False)
    tokens, devices = batch.raw_BD.shape[0], self._mesh.devices.size
    size = tokens // micro_batches.number(tokens // devices, _PIECES)
    cut = _cut(self._mesh, size)
    for start in range(part.start, part.stop, size):
      piece = part.part(start, min(start + size, part.stop))
      arrays = batch.raw_BD, batch.document_B, batch.position_B
      self._do(piece, rows.batch_of(*cut(start - part.start, arrays), piece))
    self.plan = few

  def _write_codes(self) -> None:
    while self._pending:
      self._write_first()

  def _write_first(self) -> None:
    part, vals_BK, idx_BK = self._pending.pop(0)
    size = part.stop - part.start
    if self._writer.owns(part.start):
      self._writer.append(_rows(vals_BK, size), _rows(idx_BK, size))
    else:
      self._writer.skip(size)


@functools.lru_cache(maxsize=4)
def _cut(mesh: Mesh, size: int) -> Callable[..., list[jax.Array]]:
  """A function of a first row and arrays that gives `size` rows of each."""

  def cut(start, arrays):
    return [jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays]

  return jax.jit(cut, out_shardings=mesh_lib.sharding(mesh, 'B'))


def _rows(of_BK: jax.Array, size: int) -> np.ndarray:
  """The first rows of an array that this process can read."""
  if of_BK.is_fully_addressable:
    return np.asarray(of_BK)[:size]
  return np.asarray(of_BK.addressable_data(0))[:size]

"""A worker of a sweep: takes runs, trains and scores them, until none is left.

Workers share nothing but the sweep's folder. A run is claimed, trained as
sae-train would, scored, and recorded; a worker that is gone loses its claims,
and another goes on from its checkpoints.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import os
import socket
import time

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.storage import joined
from sae_jax.storage.leases import Leases
from sae_jax.sweeps import cells as cells_lib
from sae_jax.sweeps import convergence
from sae_jax.sweeps import packs as packs_lib
from sae_jax.sweeps.grid import Cell
from sae_jax.training import evaluation, memory, train
from sae_jax.training.state import TrainState

# Seconds between two looks at what others have finished.
_PAUSES = (1.0, 15.0)


@dataclasses.dataclass(frozen=True)
class WorkConfig(config_lib.Config):
  """How a worker works; the results do not depend on it."""

  runs_at_a_time: int = config_lib.option(
    0,
    'most runs that are trained on one reading; 0 for as many as fit the '
    'memory',
    least=0,
  )
  claim_minutes: float = config_lib.option(
    10.0,
    'minutes after which the runs of a worker that gives no sign are taken by '
    'others; their clocks must agree better than that',
    least=0.001,
  )
  wait: bool = config_lib.option(
    True,
    'wait for the runs that other workers have, and take over those of workers '
    'that are gone; otherwise end when no run is free',
  )
  keep_runs: bool = config_lib.option(
    True, 'keep checkpoints and logs of runs that are recorded'
  )


def work(config: WorkConfig, cells: Sequence[Cell], workdir: str) -> int:
  """Does runs of a sweep until all are done or SIGTERM comes.

  Every process of a mesh calls it with the same arguments.

  Args:
    config: how.
    cells: all runs of the sweep, on one mesh.
    workdir: of the sweep, local path or URL; workers share it.

  Returns:
    How many runs are left.

  Raises:
    UserError: if a run cannot be done, or the folder cannot be used.
  """
  first = cells[0].config
  mesh = mesh_lib.make_mesh(first.mesh_data, first.mesh_latent)
  worker = f'{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}'
  leases = Leases(
    f'{workdir}/{cells_lib.CLAIMS}', worker, 60 * config.claim_minutes
  )
  with leases if jax.process_index() == 0 else contextlib.nullcontext():
    while True:
      left, own = _next(config, cells, workdir, mesh, leases)
      if not left or not (own or config.wait):
        return len(left)
      if not own:
        time.sleep(min(max(_PAUSES[0], leases.seconds / 8), _PAUSES[1]))
        continue
      logging.info(
        '%d of %d runs are left, %d are next', len(left), len(cells), len(own)
      )
      if not _do(config, own, workdir, mesh):
        return len(left)
      if jax.process_index() == 0:
        for cell in own:
          leases.give_up(cell.name)


def _next(config, cells, workdir, mesh, leases) -> tuple[list, list]:
  """The runs that are left, and those of them that this worker has now."""

  def look() -> list[list[bool]]:
    done = cells_lib.finished(workdir)
    left = [cell for cell in cells if cell.name not in done]
    own = _claimed(config, left, workdir, mesh, leases)
    names = {cell.name for cell in left}, {cell.name for cell in own}
    return [[cell.name in of for cell in cells] for of in names]

  left, own = (
    [cell for cell, is_in in zip(cells, flags_C) if is_in]
    for flags_C in _from_first(workdir, (2, len(cells)), look)
  )
  return left, own


def _from_first(workdir, shape, look) -> np.ndarray:
  """What process 0 sees, of a shape and true or false, in all processes."""
  flags = np.zeros(shape, bool)

  def act():
    flags[:] = look()

  joined.by_first(workdir, act)
  if jax.process_count() > 1:
    flags = multihost_utils.broadcast_one_to_all(flags)
  return flags


def _claimed(config, left, workdir, mesh, leases) -> list[Cell]:
  """The runs of the largest pack of which any is free."""
  packs = packs_lib.packs(
    left,
    memory.device_bytes(mesh),
    mesh.shape['latent'],
    config.runs_at_a_time,
  )
  for pack in packs:
    own = [cell for cell in pack if leases.take(cell.name)]
    # One may have been finished and given up since they were listed.
    done = cells_lib.finished(workdir) if own else ()
    for cell in own:
      if cell.name in done:
        leases.give_up(cell.name)
    own = [cell for cell in own if cell.name not in done]
    if own:
      return own
  return []


def _do(config, own, workdir, mesh) -> bool:
  """Trains, scores and records runs; whether SIGTERM let it come to the end."""
  try:
    return _until_the_end(config, own, workdir, mesh)
  except FloatingPointError as error:
    if len(own) > 1:
      # Which of them it was is not known here, and the others can go on.
      return all(_do(config, [cell], workdir, mesh) for cell in own)
    logging.warning('%s failed: %s', own[0].name, error)
    _record(config, own[0], workdir, mesh, None, str(error))
    return True


def _until_the_end(config, left, workdir, mesh) -> bool:
  """`_do` of runs that do not fail."""
  nth = 0
  while left:
    parts = [convergence.part(cell.config, cell.converge, nth) for cell in left]
    urls = [cells_lib.run_url(workdir, cell) for cell in left]
    states = train.train_many(dict(zip(urls, parts)), left[0].store)
    is_done = [
      int(states[url].step) >= part.steps for url, part in zip(urls, parts)
    ]
    is_last = _from_first(
      workdir,
      len(left),
      functools.partial(_are_last, left, urls, is_done, nth),
    )
    for cell, part, url, last in zip(left, parts, urls, is_last):
      if last:
        done = dataclasses.replace(cell, config=part)
        _record(config, done, workdir, mesh, states.pop(url))
    if not all(is_done):
      return False
    left = [cell for cell, last in zip(left, is_last) if not last]
    nth += 1
  return True


def _are_last(cells, urls, is_done, nth) -> list[bool]:
  """Which runs end at their nth look; those that are done have come to it."""
  return [
    done and convergence.ends(cell.config, cell.converge, url, nth)
    for cell, url, done in zip(cells, urls, is_done)
  ]


def _record(
  config: WorkConfig,
  cell: Cell,
  workdir: str,
  mesh: Mesh,
  state: TrainState | None,
  failure: str = '',
) -> None:
  data = store_lib.open_store(
    cell.store,
    cell.config.site,
    cell.config.store_version or None,
    target_site=cell.config.sae.target_site,
  )
  scores = {}
  if state is not None:
    score = functools.partial(
      evaluation.evaluate,
      cell.config,
      mesh,
      state,
      data,
      evaluation.make_evaluation(cell.config, mesh),
    )
    scores = {'validation': score(), 'test': score(data.test_rows)}

  def write():
    cells_lib.write(workdir, cell, data, scores, failure)
    folder = epath.Path(cells_lib.run_url(workdir, cell))
    if not config.keep_runs and folder.exists():
      folder.rmtree()

  joined.by_first(workdir, write)

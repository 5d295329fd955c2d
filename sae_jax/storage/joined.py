"""Folders that the processes of a run write together."""

from collections.abc import Callable

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from sae_jax import errors
from sae_jax.storage import files


def claim(folder: str, take: Callable[[], object]) -> None:
  """Claims a folder by process 0 and checks that all processes see it.

  Either every process returns or every one raises, so that none waits for
  another forever.

  Args:
    folder: local path or URL.
    take: claims the folder for a process.

  Raises:
    UserError: if it cannot be claimed, or is local to a host.
  """
  if jax.process_count() == 1:
    take()
    return
  seed = np.random.default_rng().integers(2**31)
  number = int(multihost_utils.broadcast_one_to_all(seed))
  path = epath.Path(folder) / f'.seen_by_all_{number}'

  def claim_and_show():
    take()
    files.write_text(path, '')

  by_first(folder, claim_and_show)
  visible = multihost_utils.process_allgather(np.array(path.exists()))
  if jax.process_index() == 0:
    path.unlink()
  if not visible.all():
    raise errors.UserError(
      f'workdir {folder} is local to a host: {int((~visible).sum())} of '
      f'{jax.process_count()} processes do not see what process 0 writes '
      'there; use a bucket or a shared disk'
    )


def by_first(folder: str, act: Callable[[], object]) -> None:
  """Has process 0 act in a folder; where that fails every process raises.

  Args:
    folder: local path or URL.
    act: what process 0 does, while the others wait.

  Raises:
    UserError: if it fails.
    OSError: the same, on process 0.
  """
  error = None
  if jax.process_index() == 0:
    try:
      act()
    except (errors.UserError, OSError) as raised:
      error = raised
  if jax.process_count() == 1:
    failed = error is not None
  else:
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
  if failed:
    raise error or errors.UserError(
      f'process 0 cannot use workdir {folder}: see its error'
    )

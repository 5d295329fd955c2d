"""The meshes that a run can have, and guesses about their memory and time."""

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.plan import footprint, steps
from sae_jax.tpu.slices import Slices


@dataclasses.dataclass(frozen=True)
class Guess:
  """Memory and time of a mesh by arithmetic, before anything is compiled.

  Attributes:
    data: shards of the batch.
    latent: shards of the latents.
    hbm_bytes: HBM that a device needs.
    step_s: seconds of a step, the sum of the largest terms of its roofline.
  """

  data: int
  latent: int
  hbm_bytes: float
  step_s: float


def make_mesh(slices: Slices, data: int, latent: int) -> Mesh:
  """The mesh as a run makes it.

  Args:
    slices: the chips.
    data: shards of the batch; 0 takes all devices that latent leaves.
    latent: shards of the latents.

  Raises:
    UserError: if the chips can't form this mesh; it names one that they can.
  """
  count = len(slices.devices)
  data = data or max(1, count // max(1, latent))
  try:
    return mesh_lib.make_mesh(data, latent, slices.devices)
  except (NotImplementedError, errors.UserError) as error:
    if data * latent != count:
      reason = f'needs {data * latent} devices, there are {count}'
    elif isinstance(error, errors.UserError):
      reason = f'must have whole slices along its data axis ({slices.count})'
    else:
      reason = f'does not lie along the links of {slices.name}'
    near = _nearest(slices, max(1, latent))
    raise errors.UserError(
      f'mesh {data}x{latent} {reason}: use --mesh={near[0]}x{near[1]}'
    ) from error


def _nearest(slices: Slices, latent: int) -> tuple[int, int]:
  """The possible mesh whose number of latent shards is nearest."""
  count = len(slices.devices)
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  sizes.sort(key=lambda n: (abs(math.log(n / latent)), -n))
  size = next(n for n in sizes if _is_possible(slices, count // n, n))
  return count // size, size


def _is_possible(slices: Slices, data: int, latent: int) -> bool:
  try:
    mesh_lib.make_mesh(data, latent, slices.devices)
  except (NotImplementedError, errors.UserError):
    return False
  return True


def _divides(config: Any, data: int, latent: int) -> bool:
  try:
    mesh = AbstractMesh((data, latent), mesh_lib.AXES)
    steps.of(config).check_mesh(config, mesh)
  except errors.UserError:
    return False
  return True


def allowed(config: Any, slices: Slices) -> list[tuple[int, int]]:
  """The meshes (data, latent) that both the config and the chips allow."""
  count, shapes = len(slices.devices), []
  for latent in range(1, count + 1):
    data = count // latent
    if (
      count % latent == 0
      and data % slices.count == 0
      and _divides(config, data, latent)
      and _is_possible(slices, data, latent)
    ):
      shapes.append((data, latent))
  return shapes


def guess(
  config: Any,
  slices: Slices,
  mesh: Mesh,
  implementation: str | None = None,
) -> Guess:
  """Memory and time of a step from the sizes of its largest arrays.

  It leaves out everything that the compiler adds, so it only serves to choose
  which meshes are compiled.

  Args:
    config: of a program, see `steps`.
    slices: the chips.
    mesh: the mesh of their devices.
    implementation: of the sparse products, see `ops.decode`.
  """
  held = footprint.arguments(config, mesh)
  temporaries, seconds = steps.of(config).guess(
    config, slices, mesh, implementation, dict(held.arguments)
  )
  data, latent = mesh.shape['data'], mesh.shape['latent']
  return Guess(data, latent, held.total + temporaries, seconds)

"""The meshes that a run can have, and guesses about their memory and time."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, Mesh

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops import dispatch
from sae_jax.ops.encode_topk.reference import BLOCK_BYTES
from sae_jax.plan import footprint, roofline
from sae_jax.plan.footprint import Footprint
from sae_jax.tpu.slices import Slices
from sae_jax.training.config import check_mesh, TrainConfig


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
  """The mesh as training makes it.

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


def _divides(config: TrainConfig, data: int, latent: int) -> bool:
  try:
    check_mesh(config, AbstractMesh((data, latent), mesh_lib.AXES))
  except errors.UserError:
    return False
  return True


def allowed(config: TrainConfig, slices: Slices) -> list[tuple[int, int]]:
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
  config: TrainConfig,
  slices: Slices,
  mesh: Mesh,
  implementation: str | None = None,
) -> Guess:
  """Memory and time of a step from the sizes of its largest arrays.

  It leaves out everything that the compiler adds, so it only serves to choose
  which meshes are compiled.

  Args:
    config: the run.
    slices: the chips.
    mesh: the mesh of their devices.
    implementation: of the sparse products, see `ops.decode`.
  """
  device = slices.device
  data, latent = mesh.shape['data'], mesh.shape['latent']
  d, k = config.sae.d_model, config.sae.k * max(1, config.objective.multi_topk)
  tokens, latents = config.batch_size // data, config.sae.n_latents // latent
  at_a_time = tokens // config.micro_batches
  with jax.set_mesh(mesh):
    name = dispatch.choose(config.sae.n_latents, k, implementation, d)
  arguments = footprint.arguments(config, mesh)
  # Dense codes, or pairs of value and latent.
  codes = at_a_time * (8 * latents if name == 'dense' else 32 * k)
  hbm_bytes = arguments.total + lasting(arguments, data) + codes
  products = tokens * latents * d * 2 * (5 if name == 'dense' else 1)
  moved = (
    # Adam reads and writes parameters, moments and the average.
    2 * (arguments.total - arguments.batch)
    + arguments.parameters * config.micro_batches
    # Each block of tokens reads the rounded encoder and writes its codes.
    + _blocks(tokens, latents, name) * latents * d * 2
    + tokens * latents * 4 * (8 if name == 'dense' else 2)
    # Decoder rows of the pairs, for two sums and two scatters. Kernels touch
    # the rows of a shard's winners alone, other code those of all k latents
    # that the shard offers.
    + tokens * k * d * 24 * {'dense': 0, 'pallas': 1 / latent}.get(name, 1)
  )
  seconds = max(products / device.flops, moved / device.hbm_bandwidth)
  seconds += _link_seconds(config, slices, mesh)
  return Guess(data, latent, hbm_bytes, seconds)


def lasting(arguments: Footprint, data: int) -> float:
  """A guess of the bytes of temporaries that micro-batches do not shrink.

  These are gradients and rounded weights, which are summed over the data axis
  into arrays of their own, and inputs and errors of all tokens in float32.

  Args:
    arguments: state and batch of the run.
    data: shards of the batch.
  """
  return arguments.parameters * (1.5 if data == 1 else 3) + 4 * arguments.batch


def _blocks(tokens: int, latents: int, name: str) -> float:
  """Blocks of tokens that the encoder works on, one after another."""
  return 1 if name == 'pallas' else tokens * latents * 4 / BLOCK_BYTES


def _link_seconds(config: TrainConfig, slices: Slices, mesh: Mesh) -> float:
  """Seconds for gradients over data, and for codes and outputs over latents."""
  data, latent = mesh.shape['data'], mesh.shape['latent']
  tokens, latents = config.batch_size // data, config.sae.n_latents // latent
  d, k = config.sae.d_model, config.sae.k
  along_data, along_latent = mesh.devices[:, 0], mesh.devices[0]
  inside = along_data[: data // slices.count]
  gradients = 2 * latents * d * 4
  terms = [
    roofline.link_seconds('all-reduce', gradients, inside, slices),
    roofline.link_seconds('all-to-all', tokens * k * 4, along_latent, slices),
    roofline.link_seconds('all-reduce', tokens * d * 4, along_latent, slices),
  ]
  if slices.count > 1:
    across = gradients / len(inside) * 2 * (slices.count - 1) / slices.count
    terms.append(across / slices.device.dcn_bandwidth)
  return sum(terms)

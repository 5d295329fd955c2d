"""Splits of the devices over tokens and latents, and guesses about them."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops import dispatch
from sae_jax.plan import footprint, roofline
from sae_jax.plan.footprint import Footprint
from sae_jax.tpu.chips import Slices
from sae_jax.training.config import TrainConfig

# Of pre-activations at a time, see `ops.encode_topk.reference`.
_BLOCK_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class Guess:
  """What arithmetic on a config says before anything is compiled.

  Attributes:
    data: shards of the batch.
    latent: shards of the latents.
    hbm_bytes: of a device.
    step_s: sum of the largest terms of a step's roofline.
  """

  data: int
  latent: int
  hbm_bytes: float
  step_s: float


def make_mesh(slices: Slices, data: int, latent: int) -> Mesh:
  """The mesh of a split, as training makes it.

  Args:
    slices: the chips.
    data: shards of the batch; 0 takes all devices that latent leaves.
    latent: shards of the latents.

  Raises:
    UserError: if the devices can't be split so; it names a split that can.
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
  """The split whose number of latent shards is nearest, of those there are."""
  count = len(slices.devices)
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  sizes.sort(key=lambda n: (abs(math.log(n / latent)), -n))
  size = next(n for n in sizes if _can(slices, count // n, n))
  return count // size, size


def _can(slices: Slices, data: int, latent: int) -> bool:
  try:
    mesh_lib.make_mesh(data, latent, slices.devices)
  except (NotImplementedError, errors.UserError):
    return False
  return True


def check(config: TrainConfig, mesh: Mesh) -> None:
  """Raises UserError where a config can't be split over a mesh evenly."""
  data, latent = mesh.shape['data'], mesh.shape['latent']
  if config.sae.n_latents % latent:
    near = _multiple(config.sae.n_latents, latent)
    raise errors.UserError(
      f'n_latents {config.sae.n_latents:,} can not be split evenly over '
      f'{latent} shards: use --n={near}'
    )
  parts = data * config.micro_batches
  if config.batch_size % parts:
    near = _multiple(config.batch_size, parts)
    raise errors.UserError(
      f'batch_size {config.batch_size:,} can not be split evenly over {data} '
      f'shards and {config.micro_batches} micro-batches: use --batch={near}'
    )


def _multiple(value: int, of: int) -> int:
  """The nearest multiple, the larger one of two; never 0."""
  return max(of, (value + of // 2) // of * of)


def candidates(config: TrainConfig, slices: Slices) -> list[tuple[int, int]]:
  """The splits (data, latent) that the config and the devices allow."""
  count, found = len(slices.devices), []
  for latent in range(1, count + 1):
    data = count // latent
    if (
      count % latent == 0
      and data % slices.count == 0
      and config.sae.n_latents % latent == 0
      and config.batch_size % (data * config.micro_batches) == 0
      and _can(slices, data, latent)
    ):
      found.append((data, latent))
  return found


def guess(
  config: TrainConfig,
  slices: Slices,
  mesh: Mesh,
  implementation: str | None = None,
) -> Guess:
  """Memory and time of a split from the sizes of its largest arrays.

  It leaves out whatever the compiler adds, and is there to choose what is
  compiled, not to be believed.

  Args:
    config: the run.
    slices: the chips.
    mesh: of their devices.
    implementation: of the sparse products.
  """
  device = slices.device
  data, latent = mesh.shape['data'], mesh.shape['latent']
  d, k = config.sae.d_model, config.sae.k * max(1, config.objective.multi_topk)
  tokens, latents = config.batch_size // data, config.sae.n_latents // latent
  at_a_time = tokens // config.micro_batches
  with jax.set_mesh(mesh):
    name = dispatch.choose(config.sae.n_latents, k, implementation, d)
  held = footprint.arguments(config, mesh)
  # Dense codes, or pairs.
  codes = at_a_time * (8 * latents if name == 'dense' else 32 * k)
  more = lasting(held, data) + codes
  products = tokens * latents * d * 2 * (5 if name == 'dense' else 1)
  moved = (
    # Adam reads and writes parameters, moments and the average.
    2 * (held.total - held.batch)
    + held.parameters * config.micro_batches
    # Each block of tokens reads the rounded encoder and writes its codes.
    + _blocks(tokens, latents, name) * latents * d * 2
    + tokens * latents * 4 * (8 if name == 'dense' else 2)
    # Rows of pairs, for two sums and two scatters: kernels take those that a
    # shard has won, the others all of its candidates.
    + tokens * k * d * 24 * {'dense': 0, 'pallas': 1 / latent}.get(name, 1)
  )
  seconds = max(products / device.flops, moved / device.hbm_bandwidth)
  return Guess(
    data, latent, held.total + more, seconds + _links(config, slices, mesh)
  )


def lasting(held: Footprint, data: int) -> float:
  """Temporaries that do not depend on the tokens at a time, a guess.

  Gradients and rounded weights, which are summed over the data axis into
  arrays of their own; inputs and errors of all tokens in float32.

  Args:
    held: the arguments.
    data: shards of the batch.
  """
  return held.parameters * (1.5 if data == 1 else 3) + 4 * held.batch


def _blocks(tokens: int, latents: int, name: str) -> float:
  """Blocks of tokens that the encoder works on, by the plain implementation."""
  return 1 if name == 'pallas' else tokens * latents * 4 / _BLOCK_BYTES


def _links(config: TrainConfig, slices: Slices, mesh: Mesh) -> float:
  """Seconds of gradients over data, codes and outputs over latents."""
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

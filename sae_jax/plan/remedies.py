"""What to change in a run that does not fit."""

from collections.abc import Callable, Iterator
import dataclasses
import math

from sae_jax import errors
from sae_jax.plan import footprint, meshes
from sae_jax.plan.footprint import Footprint
from sae_jax.tpu import chips as chips_lib
from sae_jax.tpu.chips import Slices
from sae_jax.training import step
from sae_jax.training.config import TrainConfig

# Fewer tokens than this at a time leave a matrix unit idle.
_LEAST_TOKENS = 256
# A guess must leave this share of HBM free.
_SPARE = 0.1
_LARGER_SLICES = 4


@dataclasses.dataclass(frozen=True)
class Remedy:
  """A change after which the run fits.

  Attributes:
    flags: of sae-plan, to be put in place of those that were given.
    hbm_bytes: of a device.
    compiled: whether the compiler says so, or arithmetic on what it said of
      the run that does not fit.
  """

  flags: str
  hbm_bytes: float
  compiled: bool


def find(
  config: TrainConfig,
  slices: Slices,
  needs: Footprint,
  implementation: str | None,
  compiles: int,
  report: Callable[[str], None],
) -> tuple[Remedy, ...]:
  """Changes that let a run fit, the nearest first.

  Args:
    config: the run, with its mesh, which does not fit.
    slices: the chips.
    needs: what it takes of a device.
    implementation: of the sparse products.
    compiles: how many of the changes are compiled, at most.
    report: is told what is going on.

  Returns:
    At most one change of each kind: fewer tokens at a time, another split, a
    larger slice, fewer latents.
  """
  found, left = [], compiles
  for tries in (
    _parts(config, slices, needs),
    _splits(config, slices, needs),
    _larger(config, slices, needs),
    _fewer(config, slices, needs),
  ):
    for flags, changed, other in tries:
      expected = _expected(
        config, slices, needs, changed, other, implementation
      )
      if expected > (1 - _SPARE) * other.hbm_limit:
        continue
      if left <= 0:
        found.append(Remedy(flags, expected, False))
        break
      report(f'compiling with {flags} ...')
      mesh = meshes.make_mesh(other, changed.mesh_data, changed.mesh_latent)
      try:
        made = footprint.compile_step(changed, mesh, implementation)
      except errors.UserError as error:
        report(f'refused: {error}')
        continue
      left -= 1
      if made.fits:
        found.append(Remedy(flags, made.footprint.total, True))
        break
  return tuple(sorted(found, key=lambda remedy: not remedy.compiled))


def accepted(
  config: TrainConfig, slices: Slices, implementation: str | None
) -> str | None:
  """The least change in the tokens at a time with which a step is accepted.

  Args:
    config: the run, with its mesh, which the training step refuses.
    slices: the chips.
    implementation: of the sparse products.

  Returns:
    Flags, or None where none of them helps.
  """
  mesh = meshes.make_mesh(slices, config.mesh_data, config.mesh_latent)
  for flags, changed, _ in _parts(config, slices, None):
    try:
      step.lowered(changed, mesh, implementation)
    except errors.UserError:
      continue
    return flags
  return None


_Changes = Iterator[tuple[str, TrainConfig, Slices]]


def _parts(config, slices, needs) -> _Changes:
  """Fewer tokens at a time."""
  del needs
  tokens = config.batch_size // config.mesh_data
  parts = 2 * config.micro_batches
  while tokens % parts == 0 and tokens // parts >= _LEAST_TOKENS:
    changed = dataclasses.replace(config, micro_batches=parts)
    yield f'--micro_batches={parts}', changed, slices
    parts *= 2


def _splits(config, slices, needs) -> _Changes:
  """More shards of the latents, and fewer tokens at a time with them."""
  for data, latent in meshes.candidates(config, slices):
    if latent <= config.mesh_latent:
      continue
    changed = dataclasses.replace(config, mesh_data=data, mesh_latent=latent)
    flag = f'--mesh={data}x{latent}'
    yield flag, changed, slices
    for more, fewer, _ in _parts(changed, slices, needs):
      yield f'{flag} {more}', fewer, slices


def _larger(config, slices, needs) -> _Changes:
  """More chips in a slice."""
  chips = slices.chips // slices.count
  least = max(chips + 1, _chips(config, slices, needs))
  sizes = sorted({
    math.prod(shape)
    for shape in chips_lib.offered(slices.chip)
    if math.prod(shape) >= least
  })  # fmt: skip
  for size in sizes[:_LARGER_SLICES]:
    name = chips_lib.name(slices.chip, chips_lib.nearest(slices.chip, size))
    try:
      other = chips_lib.find(name, slices.count)
    except errors.UserError:
      continue
    for data, latent in meshes.candidates(config, other):
      if latent < config.mesh_latent:
        continue
      changed = dataclasses.replace(config, mesh_data=data, mesh_latent=latent)
      flags = f'--topology={name} --mesh={data}x{latent}'
      yield flags, changed, other


def _chips(config, slices, needs) -> int:
  """Chips of a slice that the state alone needs."""
  state = needs.arguments - needs.batch + needs.parameters
  room = (1 - _SPARE) * slices.hbm_limit
  return math.ceil(state * config.mesh_latent / room / slices.devices_per_chip)


def _fewer(config, slices, needs) -> _Changes:
  """Fewer latents, a tenth at a time, in whole tiles of each shard."""
  del needs
  least = config.sae.k * max(1, config.objective.multi_topk)
  unit = 128 * config.mesh_latent
  latents = config.sae.n_latents
  while True:
    latents = 9 * latents // 10 // unit * unit
    if latents < max(least, unit):
      return
    sae = dataclasses.replace(config.sae, n_latents=latents)
    yield f'--n={latents}', dataclasses.replace(config, sae=sae), slices


def _expected(config, slices, needs, changed, other, implementation) -> float:
  """What a changed run takes, from what the compiler said of the run.

  Of the temporaries some grow with the shard's parameters and its tokens, and
  the others with the tokens at a time. It is not less than a guess that knows
  nothing of the compiler.
  """
  mesh = meshes.make_mesh(other, changed.mesh_data, changed.mesh_latent)
  held = footprint.arguments(changed, mesh)
  others = needs.temporaries - meshes.lasting(needs, config.mesh_data)
  others = max(0, others) * _tokens(changed) / _tokens(config)
  # Codes that are dense shrink with the latents, too.
  others *= min(1, changed.sae.n_latents / config.sae.n_latents)
  scaled = (
    held.total
    + meshes.lasting(held, changed.mesh_data)
    + others
    + needs.program
  )
  guess = meshes.guess(changed, other, mesh, implementation)
  return max(scaled, guess.hbm_bytes)


def _tokens(config: TrainConfig) -> float:
  """Tokens that a device works on at a time."""
  return config.batch_size / config.mesh_data / config.micro_batches

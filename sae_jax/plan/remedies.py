"""Changes after which a run that does not fit would fit."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

from sae_jax import errors
from sae_jax.plan import footprint, meshes, steps
from sae_jax.plan.footprint import Footprint
from sae_jax.tpu import slices as slices_lib
from sae_jax.tpu.slices import Slices

# A guess must leave this share of HBM free.
_SPARE = 0.1
_LARGER_SLICES = 4


@dataclasses.dataclass(frozen=True)
class Remedy:
  """A change after which the run fits.

  Attributes:
    flags: flags of sae-plan that replace the given ones.
    hbm_bytes: HBM that a device then needs.
    compiled: whether the changed run was compiled; otherwise its bytes are
      scaled from those of the run that does not fit.
  """

  flags: str
  hbm_bytes: float
  compiled: bool


def find(
  config: Any,
  slices: Slices,
  needs: Footprint,
  implementation: str | None,
  compiles: int,
  report: Callable[[str], None],
) -> tuple[Remedy, ...]:
  """Changes that let a run fit, compiled ones first.

  Args:
    config: the run, with its mesh, which does not fit.
    slices: the chips.
    needs: the HBM that the run needs on a device.
    implementation: of the sparse products, see `ops.decode`.
    compiles: the most changes that are compiled.
    report: called with a line of text before and after each compilation.

  Returns:
    At most one change of each kind: fewer tokens at a time, another mesh, a
    larger slice, fewer latents.
  """
  remedies, left = [], compiles
  for changes in (
    _smaller(config, slices),
    _more_shards(config, slices),
    _larger_slices(config, slices, needs),
    _fewer_latents(config, slices),
  ):
    for flags, changed, other in changes:
      expected = _expected_bytes(config, needs, changed, other, implementation)
      if expected > (1 - _SPARE) * other.hbm_limit:
        continue
      if left <= 0:
        remedies.append(Remedy(flags, expected, False))
        break
      report(f'compiling with {flags} ...')
      mesh = meshes.make_mesh(other, changed.mesh_data, changed.mesh_latent)
      try:
        compiled = footprint.compile_step(changed, mesh, implementation)
      except errors.UserError as error:
        report(f'refused: {error}')
        continue
      left -= 1
      if compiled.fits:
        remedies.append(Remedy(flags, compiled.footprint.total, True))
        break
  return tuple(sorted(remedies, key=lambda remedy: not remedy.compiled))


def accepted(
  config: Any, slices: Slices, implementation: str | None
) -> str | None:
  """Flags for the most tokens at a time that the step accepts.

  Args:
    config: the run, with its mesh, which the step refuses.
    slices: the chips.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    The flags, or None where fewer tokens do not help.
  """
  mesh = meshes.make_mesh(slices, config.mesh_data, config.mesh_latent)
  for flags, changed, _ in _smaller(config, slices):
    try:
      steps.of(changed).lowered(changed, mesh, implementation)
    except errors.UserError:
      continue
    return flags
  return None


# Flags, the changed run and the chips it runs on.
_Changes = Iterator[tuple[str, Any, Slices]]


def _smaller(config, slices) -> _Changes:
  """Fewer tokens at a time."""
  for flags, changed in steps.of(config).smaller(config):
    yield flags, changed, slices


def _more_shards(config, slices) -> _Changes:
  """More shards of the latents; for each number, fewer tokens at a time too."""
  for data, latent in meshes.allowed(config, slices):
    if latent <= config.mesh_latent:
      continue
    changed = dataclasses.replace(config, mesh_data=data, mesh_latent=latent)
    flag = f'--mesh={data}x{latent}'
    yield flag, changed, slices
    for more, fewer, _ in _smaller(changed, slices):
      yield f'{flag} {more}', fewer, slices


def _larger_slices(config, slices, needs) -> _Changes:
  """More chips in a slice."""
  chips = slices.chips // slices.count
  least = max(chips + 1, _least_chips(config, slices, needs))
  sizes = sorted({
    math.prod(shape)
    for shape in slices_lib.offered(slices.chip)
    if math.prod(shape) >= least
  })  # fmt: skip
  for size in sizes[:_LARGER_SLICES]:
    name = slices_lib.name(slices.chip, slices_lib.nearest(slices.chip, size))
    try:
      other = slices_lib.find(name, slices.count)
    except errors.UserError:
      continue
    for data, latent in meshes.allowed(config, other):
      if latent < config.mesh_latent:
        continue
      changed = dataclasses.replace(config, mesh_data=data, mesh_latent=latent)
      flags = f'--topology={name} --mesh={data}x{latent}'
      yield flags, changed, other


def _least_chips(config, slices, needs) -> int:
  """The fewest chips of a slice that the state fits on."""
  state = steps.of(config).state_bytes(dict(needs.arguments))
  room = (1 - _SPARE) * slices.hbm_limit
  return math.ceil(state * config.mesh_latent / room / slices.devices_per_chip)


def _fewer_latents(config, slices) -> _Changes:
  """Fewer latents, each time by a tenth, in whole tiles of each shard."""
  least = steps.of(config).fewest_latents(config)
  unit = 128 * config.mesh_latent
  latents = config.sae.n_latents
  while True:
    latents = 9 * latents // 10 // unit * unit
    if latents < max(least, unit):
      return
    sae = dataclasses.replace(config.sae, n_latents=latents)
    yield f'--n={latents}', dataclasses.replace(config, sae=sae), slices


def _expected_bytes(config, needs, changed, other, implementation) -> float:
  """HBM of a changed run on a device, scaled from the compiled run's.

  The temporaries that are `lasting` follow the shard's parameters and tokens;
  all others are taken to be proportional to the tokens at a time. The result
  is never below `meshes.guess`.

  Args:
    config: the run that was compiled.
    needs: its HBM on a device.
    changed: the run whose HBM is wanted.
    other: the chips of the changed run.
    implementation: of the sparse products.
  """
  mesh = meshes.make_mesh(other, changed.mesh_data, changed.mesh_latent)
  step, held = steps.of(changed), footprint.arguments(changed, mesh)
  before = step.lasting(dict(needs.arguments), config.mesh_data)
  passing = needs.temporaries - before
  passing = max(0, passing) * _tokens_at_a_time(changed)
  passing /= _tokens_at_a_time(config)
  # Codes that are dense shrink with the latents, too.
  passing *= min(1, changed.sae.n_latents / config.sae.n_latents)
  scaled = (
    held.total
    + step.lasting(dict(held.arguments), changed.mesh_data)
    + passing
    + needs.program
  )
  guess = meshes.guess(changed, other, mesh, implementation)
  return max(scaled, guess.hbm_bytes)


def _tokens_at_a_time(config: Any) -> float:
  """Tokens of a micro-batch on one device."""
  return config.batch_size / config.mesh_data / config.micro_batches

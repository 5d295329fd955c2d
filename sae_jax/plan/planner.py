"""What a training run would need of TPUs that are not here."""

from collections.abc import Callable
import dataclasses
import time

from jax.sharding import Mesh

from sae_jax import errors
from sae_jax.plan import footprint, meshes, remedies, roofline
from sae_jax.plan.footprint import Compiled
from sae_jax.plan.program import costs as costs_lib
from sae_jax.plan.program import parts, text
from sae_jax.plan.program.costs import Costs
from sae_jax.plan.record import Plan, Split
from sae_jax.tpu import chips as chips_lib
from sae_jax.tpu.chips import Slices
from sae_jax.training.config import TrainConfig

DEAD = ('none', 'few', 'all')
# Splits that are listed, compiled or not.
_LISTED = 12


def plan(
  config: TrainConfig,
  topology: str,
  num_slices: int = 1,
  mesh: str | tuple[int, int] = 'auto',
  *,
  implementation: str | None = None,
  dead: str = 'few',
  compiles: int = 2,
  tokens: int = 0,
  price_per_chip_hour: float = 0.0,
  report: Callable[[str], None] = lambda line: None,
) -> Plan:
  """Compiles the training step for TPUs that are not here, and reads it.

  Args:
    config: the run, with d_model set.
    topology: a slice such as 'v6e:16x16'.
    num_slices: how many of them.
    mesh: shards of batch and latents, or 'auto' to look for the best.
    implementation: of the sparse products, see `ops.decode`.
    dead: the dead latents that AuxK's work is taken for: 'none', 'few' (its
      smallest size) or 'all'.
    compiles: programs that are compiled at most to rank splits, and again to
      find out what would fit.
    tokens: of the whole run, for hours and cost.
    price_per_chip_hour: for the cost.
    report: is told what is going on.

  Raises:
    UserError: if there is no such slice, or the config can't be split over
      it; it names the nearest that can.
  """
  if not config.sae.d_model:
    raise errors.UserError(
      'd_model 0: say how wide the activations are, as --d=768'
    )
  if dead not in DEAD:
    raise errors.UserError(
      f'dead {dead!r} is not known: use one of {", ".join(DEAD)}'
    )
  slices = chips_lib.find(topology, num_slices)
  if mesh == 'auto':
    tries = _guesses(config, slices, implementation)
  else:
    made = meshes.make_mesh(slices, *mesh)
    meshes.check(config, made)
    tries = [meshes.guess(config, slices, made, implementation)]
  done, refused = _compiled_splits(
    config, slices, tries, implementation, dead, max(1, compiles), report
  )
  best = done[0]
  found = ()
  if not best.fits:
    found = remedies.find(
      best.config,
      slices,
      best.footprint,
      implementation,
      max(1, compiles - 1),
      report,
    )
  ranked = [
    Split(
      one.config.mesh_data,
      one.config.mesh_latent,
      True,
      one.fits,
      one.footprint.total,
      one.roofline.step_s,
    )
    for one in done
  ]
  seen = {(split.data, split.latent) for split in ranked}
  ranked += [
    Split(
      guess.data,
      guess.latent,
      False,
      guess.hbm_bytes <= slices.hbm_limit,
      guess.hbm_bytes,
      guess.step_s,
      refused.get(guess, ''),
    )
    for guess in tries
    if (guess.data, guess.latent) not in seen
  ]
  return dataclasses.replace(
    best,
    splits=tuple(ranked[:_LISTED]),
    remedies=found,
    tokens=tokens,
    price_per_chip_hour=price_per_chip_hour,
  )


def _compiled_splits(
  config, slices, tries, implementation, dead, compiles, report
) -> tuple[list[Plan], dict[meshes.Guess, str]]:
  """The plans of the first splits that the step takes, the best first.

  And why it does not take others.
  """
  done, refused = [], {}
  for guess in tries:
    if len(done) == compiles:
      break
    report(f'compiling mesh {guess.data}x{guess.latent} ...')
    try:
      one = _compiled(config, slices, guess, implementation, dead)
    except errors.UserError as error:
      refused[guess] = str(error)
      report(f'refused: {error}')
      continue
    report(f'compiled in {one.compile_s:.0f} s')
    done.append(one)
  if not done:
    guess, reason = next(iter(refused.items()))
    config = dataclasses.replace(
      config, mesh_data=guess.data, mesh_latent=guess.latent
    )
    flags = remedies.accepted(config, slices, implementation)
    also = f' ({flags} is accepted)' if flags else ''
    raise errors.UserError(f'mesh {guess.data}x{guess.latent}: {reason}{also}')
  return sorted(done, key=_order), refused


def _order(one: Plan) -> tuple[bool, float]:
  """Those that fit first, by time; then those that lack least."""
  if one.fits:
    return False, one.roofline.step_s
  return True, one.footprint.total


def _guesses(
  config: TrainConfig, slices: Slices, implementation: str | None
) -> list[meshes.Guess]:
  """All splits, the most promising first."""
  allowed = meshes.candidates(config, slices)
  if not allowed:
    # Raises with the nearest sizes that can be split.
    made = meshes.make_mesh(slices, len(slices.devices), 1)
    meshes.check(config, made)
    raise errors.UserError(
      f'no split of {slices.name} divides batch_size {config.batch_size:,} and '
      f'n_latents {config.sae.n_latents:,}: use multiples of '
      f'{len(slices.devices)}'
    )
  found = [
    meshes.guess(
      config, slices, meshes.make_mesh(slices, *split), implementation
    )
    for split in allowed
  ]
  limit = slices.hbm_limit
  return sorted(
    found,
    key=lambda g: (
      (False, g.step_s) if g.hbm_bytes <= limit else (True, g.hbm_bytes)
    ),
  )


def _compiled(config, slices, guess, implementation, dead) -> Plan:
  """The plan of one split."""
  mesh = meshes.make_mesh(slices, guess.data, guess.latent)
  config = dataclasses.replace(
    config, mesh_data=guess.data, mesh_latent=guess.latent
  )
  began = time.monotonic()
  compiled = footprint.compile_step(config, mesh, implementation)
  return read(config, slices, mesh, compiled, dead, time.monotonic() - began)


def read(
  config: TrainConfig,
  slices: Slices,
  mesh: Mesh,
  compiled: Compiled,
  dead: str = 'few',
  compile_s: float = 0.0,
) -> Plan:
  """The plan of a compiled step, without other splits or remedies.

  Args:
    config: the run, with its mesh.
    slices: the chips.
    mesh: of their devices.
    compiled: the step.
    dead: the dead latents that AuxK's work is taken for.
    compile_s: seconds that compiling took.

  Raises:
    ValueError: if a part of the step is nowhere in the program.
  """
  module = text.parse(compiled.text)
  parts.check(module, parts.expected(config, mesh, compiled.implementation))

  def seconds(costs: Costs) -> float:
    return roofline.roofline(costs, slices, mesh).without_overlap_s

  def choose(by_dead: bool, branches: list[Costs]) -> int:
    if by_dead:
      last = len(branches) - 1
      return {'none': 0, 'few': min(1, last), 'all': last}[dead]
    # The bound must hold whichever is taken.
    return min(range(len(branches)), key=lambda i: seconds(branches[i]))

  costs = costs_lib.costs(module, choose)
  at_a_time = config.batch_size // mesh.shape['data'] // config.micro_batches
  codes = at_a_time * config.sae.n_latents // mesh.shape['latent']
  # Weights, rounded or transposed, may be as large as the codes of few tokens.
  state = {
    dims
    for instruction in module.entry.parameters
    for shape in instruction.shapes
    for dims in (shape.dims, shape.dims[::-1])
  }
  # One of each kind: tiles and names do not matter here.
  made = list(
    {
      (str(buffer.shape), buffer.part): buffer
      for buffer in costs_lib.buffers(module, 1)
      if buffer.opcode != 'parameter' and buffer.shape.dims not in state
    }.values()
  )
  choices = [b for b in costs.branches if b.by_dead]
  return Plan(
    config=config,
    slices=slices,
    fits=compiled.fits,
    footprint=compiled.footprint,
    roofline=roofline.roofline(costs, slices, mesh),
    costs=costs,
    dead=dead,
    auxk_s=tuple(map(seconds, choices[0].costs)) if choices else (),
    loops_s=tuple(map(seconds, costs.endless.values())),
    largest=made[0] if made else None,
    codes=codes,
    dense=tuple(b for b in made if b.shape.size >= codes),
    splits=(),
    remedies=(),
    tokens=0,
    price_per_chip_hour=0.0,
    text=compiled.text,
    compile_s=compile_s,
  )

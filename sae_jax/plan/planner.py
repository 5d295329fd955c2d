"""Plans a run for TPUs that are not here."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from sae_jax import errors
from sae_jax.plan import footprint, meshes, remedies, roofline, steps
from sae_jax.plan.footprint import Compiled
from sae_jax.plan.program import costs as costs_lib
from sae_jax.plan.program import parts, text
from sae_jax.plan.program.costs import Buffer, Costs
from sae_jax.plan.program.text import Module
from sae_jax.plan.record import MeshChoice, Plan
from sae_jax.tpu import slices as slices_lib
from sae_jax.tpu.slices import Slices

# The most meshes that a plan lists.
_LISTED = 12


def plan(
  config: Any,
  topology: str,
  num_slices: int = 1,
  mesh: str | tuple[int, int] = 'auto',
  *,
  implementation: str | None = None,
  case: str = '',
  compiles: int = 2,
  tokens: int = 0,
  price_per_chip_hour: float = 0.0,
  report: Callable[[str], None] = lambda line: None,
) -> Plan:
  """Compiles the step of a program for TPUs that are not here, and reads it.

  Args:
    config: of the program, see `steps`, with d_model set.
    topology: a slice such as 'v6e:16x16'.
    num_slices: number of such slices.
    mesh: shards of batch and latents, or 'auto' to look for the best.
    implementation: of the sparse products, see `ops.decode`.
    case: what is assumed where the program decides by data, one of the CASES
      of its step; '' for the first. For training it is the dead latents that
      AuxK works on: 'none', 'few' (its smallest size) or 'all'; for probing,
      whether rows are of 'train' or of 'test'.
    compiles: the most programs that are compiled to rank meshes, and again to
      look for remedies.
    tokens: tokens of the whole run, for hours and cost.
    price_per_chip_hour: price of a chip for an hour, for the cost.
    report: called with a line of text before and after each compilation.

  Raises:
    UserError: if there is no such slice, or no mesh divides the config evenly;
      it names the nearest that does.
    DefectError: if a part of the step is nowhere in the program.
  """
  if not config.sae.d_model:
    raise errors.UserError(
      'd_model 0: say how wide the activations are, as --d=768'
    )
  cases = steps.of(config).CASES
  case = case or cases[0]
  if case not in cases:
    raise errors.UserError(
      f'case {case!r} is not known: use one of {", ".join(cases)}'
    )
  slices = slices_lib.find(topology, num_slices)
  guesses = _guesses(config, slices, mesh, implementation)
  ranked, refused = _compiled_plans(
    config, slices, guesses, implementation, case, max(1, compiles), report
  )
  best = ranked[0]
  changes = ()
  if not best.fits:
    changes = remedies.find(
      best.config,
      slices,
      best.footprint,
      implementation,
      max(1, compiles - 1),
      report,
    )
  choices = _choices(ranked, guesses, refused, slices.hbm_limit)
  return dataclasses.replace(
    best,
    meshes=choices[:_LISTED],
    remedies=changes,
    tokens=tokens,
    price_per_chip_hour=price_per_chip_hour,
  )


def _guesses(config, slices, mesh, implementation) -> list[meshes.Guess]:
  """Guesses about the given mesh, or about all, the most promising first."""
  step = steps.of(config)
  if mesh != 'auto':
    given = meshes.make_mesh(slices, *mesh)
    step.check_mesh(config, given)
    return [meshes.guess(config, slices, given, implementation)]
  shapes = meshes.allowed(config, slices)
  if not shapes:
    # Raises with the nearest sizes that the devices divide.
    step.check_mesh(config, meshes.make_mesh(slices, len(slices.devices), 1))
    raise errors.UserError(
      f'no mesh of {slices.name} divides batch_size {config.batch_size:,} and '
      f'n_latents {config.sae.n_latents:,}: use multiples of '
      f'{len(slices.devices)}'
    )
  guesses = [
    meshes.guess(
      config, slices, meshes.make_mesh(slices, *shape), implementation
    )
    for shape in shapes
  ]
  limit = slices.hbm_limit
  return sorted(
    guesses,
    key=lambda g: (
      (False, *step.rank(g.data, g.step_s))
      if g.hbm_bytes <= limit
      else (True, g.hbm_bytes)
    ),
  )


def _compiled_plans(
  config, slices, guesses, implementation, case, compiles, report
) -> tuple[list[Plan], dict[meshes.Guess, str]]:
  """Plans of the first meshes that the step accepts, best first.

  And the reason for each mesh that it refuses before it has accepted
  `compiles` of them.
  """
  plans, refused = [], {}
  for guess in guesses:
    if len(plans) == compiles:
      break
    report(f'compiling mesh {guess.data}x{guess.latent} ...')
    try:
      compiled = _compiled_plan(config, slices, guess, implementation, case)
    except errors.UserError as error:
      refused[guess] = str(error)
      report(f'refused: {error}')
      continue
    report(f'compiled in {compiled.compile_s:.0f} s')
    plans.append(compiled)
  if not plans:
    guess, reason = next(iter(refused.items()))
    config = dataclasses.replace(
      config, mesh_data=guess.data, mesh_latent=guess.latent
    )
    flags = remedies.accepted(config, slices, implementation)
    also = f' ({flags} is accepted)' if flags else ''
    raise errors.UserError(f'mesh {guess.data}x{guess.latent}: {reason}{also}')
  return sorted(plans, key=_order), refused


def _order(plan: Plan) -> tuple:
  """Plans that fit first, by time; then those that lack least."""
  if plan.fits:
    step = steps.of(plan.config)
    return False, *step.rank(plan.config.mesh_data, plan.roofline.step_s)
  return True, plan.footprint.total


def _choices(ranked, guesses, refused, hbm_limit) -> tuple[MeshChoice, ...]:
  """All meshes, the compiled ones first, each with its figures."""
  compiled = [
    MeshChoice(
      plan.config.mesh_data,
      plan.config.mesh_latent,
      True,
      plan.fits,
      plan.footprint.total,
      plan.roofline.step_s,
    )
    for plan in ranked
  ]
  shapes = {(choice.data, choice.latent) for choice in compiled}
  guessed = [
    MeshChoice(
      guess.data,
      guess.latent,
      False,
      guess.hbm_bytes <= hbm_limit,
      guess.hbm_bytes,
      guess.step_s,
      refused.get(guess, ''),
    )
    for guess in guesses
    if (guess.data, guess.latent) not in shapes
  ]
  return (*compiled, *guessed)


def _compiled_plan(config, slices, guess, implementation, case) -> Plan:
  """The plan of one mesh."""
  mesh = meshes.make_mesh(slices, guess.data, guess.latent)
  config = dataclasses.replace(
    config, mesh_data=guess.data, mesh_latent=guess.latent
  )
  began = time.monotonic()
  compiled = footprint.compile_step(config, mesh, implementation)
  return read(config, slices, mesh, compiled, case, time.monotonic() - began)


def read(
  config: Any,
  slices: Slices,
  mesh: Mesh,
  compiled: Compiled,
  case: str = '',
  compile_s: float = 0.0,
) -> Plan:
  """The plan of a compiled step, without other meshes or remedies.

  Args:
    config: the run, with its mesh.
    slices: the chips.
    mesh: the mesh of their devices.
    compiled: the step.
    case: what is assumed, see `plan`.
    compile_s: seconds that compiling took.

  Raises:
    DefectError: if a part of the step is nowhere in the program.
  """
  step, module = steps.of(config), text.parse(compiled.text)
  parts.check(module, step.expected(config, mesh, compiled.implementation))
  case = case or step.CASES[0]

  def seconds(costs: Costs) -> float:
    return roofline.roofline(costs, slices, mesh).without_overlap_s

  def costs_of(case: str) -> Costs:
    def choose(choice: str, branches: list[Costs]) -> int:
      index = step.branch(case, choice, len(branches)) if choice else None
      if index is not None:
        return index
      # The bound must hold whichever branch is taken.
      return min(range(len(branches)), key=lambda i: seconds(branches[i]))

    return costs_lib.costs(
      module, choose, lambda part: step.runs(config, mesh, part, case)
    )

  every = {name: costs_of(name) for name in step.CASES}
  costs = every[case]
  at_a_time = config.batch_size // mesh.shape['data'] // config.micro_batches
  codes = at_a_time * config.sae.n_latents // mesh.shape['latent']
  buffers = _step_buffers(module)
  choices = {}
  for branches in costs.branches:
    if branches.choice:
      choices.setdefault(branches.choice, tuple(map(seconds, branches.costs)))
  return Plan(
    config=config,
    slices=slices,
    fits=compiled.fits,
    footprint=compiled.footprint,
    roofline=roofline.roofline(costs, slices, mesh),
    costs=costs,
    case=case,
    cases={
      name: roofline.roofline(of, slices, mesh) for name, of in every.items()
    },
    choices=choices,
    encoder_product_s=steps.seconds_of_products(config, slices),
    loops_s=tuple(map(seconds, costs.endless.values())),
    largest=buffers[0] if buffers else None,
    codes=codes,
    dense=tuple(b for b in buffers if b.shape.size >= codes),
    meshes=(),
    remedies=(),
    tokens=0,
    price_per_chip_hour=0.0,
    text=compiled.text,
    compile_s=compile_s,
  )


def _step_buffers(module: Module) -> list[Buffer]:
  """The arrays that a step makes, largest first, one of each shape and part.

  Arrays as large as those of the state are left out: weights that are rounded
  or transposed may be as large as the codes of few tokens.
  """
  state = {
    dims
    for instruction in module.entry.parameters
    for shape in instruction.shapes
    for dims in (shape.dims, shape.dims[::-1])
  }
  # Shapes are compared as text, which leaves out their tiles.
  unique = {
    (str(buffer.shape), buffer.part): buffer
    for buffer in costs_lib.buffers(module, 1)
    if buffer.opcode != 'parameter' and buffer.shape.dims not in state
  }
  return list(unique.values())

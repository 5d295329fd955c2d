"""What a sweep would take, before it runs."""

from collections.abc import Sequence
import statistics
import time

import jax
import jax.numpy as jnp

from sae_jax import mesh as mesh_lib
from sae_jax import progress
from sae_jax.sweeps import cells as cells_lib
from sae_jax.sweeps import cost
from sae_jax.sweeps import packs as packs_lib
from sae_jax.sweeps.grid import Cell
from sae_jax.sweeps.work import WorkConfig
from sae_jax.training import defaults, memory, state, step
from sae_jax.training.config import TrainConfig

_STEPS = 3


def text(config: WorkConfig, cells: Sequence[Cell], workdir: str) -> str:
  """The runs of a sweep that are left, by pack, with what they would take.

  Seconds are those of a few steps on this machine, on made activations. What
  is read and written meanwhile is not in them.
  """
  first = cells[0].config
  mesh = mesh_lib.make_mesh(first.mesh_data, first.mesh_latent)
  done = cells_lib.finished(workdir)
  left = [cell for cell in cells if cell.name not in done]
  lines = [f'{len(cells)} runs, {len(cells) - len(left)} of them done']
  packs = packs_lib.packs(
    left,
    memory.device_bytes(mesh),
    mesh.shape['latent'],
    config.runs_at_a_time,
  )
  shapes = {_shape(cell.config): cell.config for cell in left}
  seconds_of = {
    shape: step_seconds(of, mesh)
    for shape, of in progress.bar(shapes.items(), unit='shape', desc='timing')
  }
  total = [0.0] * 3
  for number, pack in enumerate(packs, 1):
    sums = [
      sum(cell.config.steps * seconds_of[_shape(cell.config)] for cell in pack),
      sum(cost.spent(cell.config) for cell in pack),
      sum(cost.dense_equivalent(cell.config) for cell in pack),
    ]
    total = [a + b for a, b in zip(total, sums)]
    lines.append(f'reading {number}: {len(pack)} runs, {_line(*sums)}')
    lines += [f'  {_run(cell, seconds_of)}' for cell in pack]
  lines.append(f'all that is left: {_line(*total)}')
  return '\n'.join(lines)


def step_seconds(config: TrainConfig, mesh: jax.sharding.Mesh) -> float:
  """Seconds of a step on made activations, without its compilation."""
  sae = config.sae
  rows = max(sae.n_latents, config.batch_size)
  raw_BD = jax.random.normal(jax.random.key(0), (rows, sae.d_model))
  sharded = mesh_lib.sharding(mesh, 'BD')
  batch_BD = jax.device_put(
    jnp.asarray(raw_BD[: config.batch_size], jnp.bfloat16), sharded
  )
  run_state = state.init_state(config, mesh, jax.device_get(raw_BD))
  do = step.make_step(config, mesh)
  seconds = []
  for _ in range(_STEPS + 1):
    start = time.perf_counter()
    run_state, values = do(run_state, batch_BD)
    jax.block_until_ready((run_state, values))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:])


def _shape(config: TrainConfig) -> tuple:
  return config.sae, config.objective, config.batch_size


def _line(seconds: float, spent: float, dense: float) -> str:
  return (
    f'{_duration(seconds)} here, {spent:.2e} operations '
    f'({dense:.2e} if codes were dense)'
  )


def _run(cell: Cell, seconds_of: dict) -> str:
  tokens = defaults.tokens(cell.config)
  seconds = cell.config.steps * seconds_of[_shape(cell.config)]
  return f'{cell.name}: {tokens:,} tokens, {_duration(seconds)}'


def _duration(seconds: float) -> str:
  if seconds < 3600:
    return f'{seconds:,.0f} s'
  return f'{seconds / 3600:,.1f} h'

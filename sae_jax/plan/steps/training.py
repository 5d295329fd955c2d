"""The training step."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sae_jax import mesh as mesh_lib
from sae_jax import ops
from sae_jax.ops import dispatch, scopes
from sae_jax.ops.encode_topk.reference import BLOCK_BYTES
from sae_jax.plan import roofline
from sae_jax.plan.program import parts
from sae_jax.tpu.slices import Slices
from sae_jax.training import objective, step
from sae_jax.training import state as state_lib
from sae_jax.training.config import check_mesh, TrainConfig

__all__ = ['TrainConfig', 'check_mesh']

NAME = 'train'
ARGUMENTS = {
  'parameters': 'parameters',
  'moments': "Adam's moments",
  'average': 'moving average',
  'counters': 'counters',
  'batch': 'batch',
}
# The dead latents that AuxK works on.
CASES = ('few', 'none', 'all')

# Micro-batches of fewer tokens leave a matrix unit idle.
_LEAST_TOKENS = 256
# Parts of a sparse pass, by the implementation of its products. The kernels
# share a backward pass; dense products share the decoder's too.
_SPARSE = {
  'gather': {
    *parts.ENCODER,
    *parts.DECODER,
    *parts.BOTH[:1],
    scopes.WEIGHT_GRADIENTS,
  },
  'dense': {*parts.ENCODER, *parts.BOTH},
  'pallas': {*parts.ENCODER[:1], *parts.DECODER[:1], *parts.BOTH},
}


def arguments(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
  """See `Step`."""
  state = state_lib.abstract_state(config, mesh)
  raw_BD = jax.ShapeDtypeStruct(
    (config.batch_size, config.sae.d_model),
    jnp.bfloat16,
    sharding=mesh_lib.sharding(mesh, 'BD'),
  )
  optimizer = state.optimizer
  counters = state.replace(
    sae=None, optimizer=optimizer._replace(adam=None, ema=None)
  )
  return {
    'parameters': state.sae,
    'moments': optimizer.adam,
    'average': optimizer.ema,
    'counters': counters,
    'batch': raw_BD,
  }


def lowered(
  config: TrainConfig, mesh: Mesh, implementation: str | None
) -> jax.stages.Lowered:
  """See `Step`."""
  return step.lowered(config, mesh, implementation)


def expected(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> frozenset[str]:
  """The parts that a training step must have.

  Args:
    config: the run, with d_model set.
    mesh: the mesh that the step is compiled for.
    implementation: of the sparse products, see `ops.decode`.
  """
  names = {parts.OPTIMIZER}
  if config.sae.preprocessing != 'none':
    names.add(scopes.PREPROCESSING)
  method = objective.of(config.sae.activation)
  if method.SPARSE:
    with jax.set_mesh(mesh):
      name = ops.choose(
        config.sae.n_latents,
        config.objective.widest(config.sae.k),
        implementation,
        config.sae.d_model,
      )
    names |= _SPARSE[name]
    if mesh.shape['latent'] > 1:
      names.add(scopes.EXCHANGE)
  else:
    names |= {*parts.ENCODER, *parts.DECODER}
  if method.AUXK and config.objective.k_aux:
    names.add(parts.AUXK)
  return frozenset(names)


def branch(case: str, choice: str, branches: int) -> int | None:
  """See `Step`."""
  if choice != scopes.AUXK:
    return None
  last = branches - 1
  return {'none': 0, 'few': min(1, last), 'all': last}[case]


def runs(config: TrainConfig, mesh: Mesh, part: str, case: str) -> None:
  """See `Step`: a loop that repeats failed tokens seldom runs."""
  del config, mesh, part, case


def guess(
  config: TrainConfig,
  slices: Slices,
  mesh: Mesh,
  implementation: str | None,
  held: dict[str, int],
) -> tuple[float, float]:
  """See `Step`."""
  device = slices.device
  data, latent = mesh.shape['data'], mesh.shape['latent']
  d, k = config.sae.d_model, config.sae.k * max(1, config.objective.multi_topk)
  tokens, latents = config.batch_size // data, config.sae.n_latents // latent
  at_a_time = tokens // config.micro_batches
  with jax.set_mesh(mesh):
    name = dispatch.choose(config.sae.n_latents, k, implementation, d)
  # Dense codes, or pairs of value and latent.
  codes = at_a_time * (8 * latents if name == 'dense' else 32 * k)
  products = tokens * latents * d * 2 * (5 if name == 'dense' else 1)
  moved = (
    # Adam reads and writes parameters, moments and the average.
    2 * (sum(held.values()) - held['batch'])
    + held['parameters'] * config.micro_batches
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
  return lasting(held, data) + codes, seconds


def lasting(held: dict[str, int], data: int) -> float:
  """See `Step`.

  These are gradients and rounded weights, which are summed over the data axis
  into arrays of their own, and inputs and errors of all tokens in float32.
  """
  return held['parameters'] * (1.5 if data == 1 else 3) + 4 * held['batch']


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


def rank(data: int, step_s: float) -> tuple[float]:
  """See `Step`."""
  del data
  return (step_s,)


def smaller(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
  """See `Step`."""
  tokens = config.batch_size // config.mesh_data
  count = 2 * config.micro_batches
  while tokens % count == 0 and tokens // count >= _LEAST_TOKENS:
    yield (
      f'--micro_batches={count}',
      dataclasses.replace(config, micro_batches=count),
    )
    count *= 2


def fewest_latents(config: TrainConfig) -> int:
  """See `Step`."""
  return config.sae.k * max(1, config.objective.multi_topk)


def state_bytes(held: dict[str, int]) -> float:
  """See `Step`: the state, and gradients as large as the parameters."""
  return sum(held.values()) - held['batch'] + held['parameters']


def settings(config: TrainConfig) -> str:
  """See `Step`."""
  return f'micro_batches {config.micro_batches}, k_aux {config.objective.k_aux}'


def figures(plan: Any) -> dict[str, Any]:
  """See `Step`."""
  return {
    'dead_latents': plan.case,
    'auxk_s': list(plan.choices.get(scopes.AUXK, ())),
  }


def lines(plan: Any) -> list[str]:
  """See `Step`."""
  del plan
  return []


def assumptions(plan: Any) -> list[str]:
  """See `Step`."""
  if scopes.AUXK not in plan.choices:
    return []
  each = [f'{1e3 * s:,.3f} ms' for s in plan.choices[scopes.AUXK]]
  return [
    f"AuxK's work is that of {plan.case} dead latents; by its sizes, from "
    f'none to all: {", ".join(each)}'
  ]

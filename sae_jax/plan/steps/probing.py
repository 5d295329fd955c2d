"""The step of the pass over a store that probing makes."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from sae_jax import autoencoder, errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops import dispatch, scopes
from sae_jax.ops.encode_topk.reference import BLOCK_BYTES
from sae_jax.plan import roofline
from sae_jax.plan.program import parts
from sae_jax.probing.scan import candidates, step
from sae_jax.probing.scan import state as state_lib
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.reducers import top
from sae_jax.tpu.slices import Slices

NAME = 'probe'
ARGUMENTS = {
  'parameters': 'parameters',
  'reducers': 'statistics and examples',
  'sums': 'sums of metrics',
  'batch': 'batch',
}
# What the rows of a batch are for, beside statistics, examples and codes:
# components are fitted to training rows, and test rows are scored. The first
# rows are training rows of which every pair enters the lists of examples.
CASES = ('train', 'test', 'first')
_LEAST_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class PassConfig:
  """A pass over a store.

  Attributes:
    sae: the autoencoder, with d_model set.
    scan: sizes of what is kept.
    batch_size: rows that are encoded at a time.
    mesh_data: shards of the batch.
    mesh_latent: shards of the latents.
    positions: tokens of a context.
    controls: autoencoders of the same size that are scored beside it.
  """

  sae: autoencoder.SaeConfig
  scan: ScanConfig = dataclasses.field(default_factory=ScanConfig)
  batch_size: int = 4096
  mesh_data: int = 1
  mesh_latent: int = 1
  positions: int = 1024
  controls: int = 0

  @property
  def micro_batches(self) -> int:
    """The step works on all its tokens at once."""
    return 1


def check_mesh(config: PassConfig, mesh: Mesh | AbstractMesh) -> None:
  """See `Step`."""
  n_latents, devices = config.sae.n_latents, 1
  mesh_lib.check_divides('n_latents', n_latents, mesh, 'latent')
  for size in mesh.shape.values():
    devices *= size
  if config.batch_size % devices:
    near = max(1, round(config.batch_size / devices)) * devices
    raise errors.UserError(
      f'batch_size {config.batch_size} must be a multiple of the {devices} '
      f'devices: use --batch_size={near}'
    )


def _plan(config: PassConfig, latent: int) -> state_lib.Plan:
  names = tuple(f'control {i}' for i in range(config.controls))
  fixed = candidates.code_width(config.sae)
  return state_lib.Plan(
    config=dataclasses.replace(config.scan, batch_rows=config.batch_size),
    sae=config.sae,
    controls=tuple((name, config.sae) for name in names),
    positions=config.positions,
    features=True,
    pca=True,
    test=True,
    width=fixed or config.sae.k,
    few=fixed is not None and latent > 1,
  )


def _pair_slots(config: PassConfig, tokens: int, latent: int) -> int:
  plan = _plan(config, latent)
  return candidates.pair_slots(plan.sae, plan.width, tokens, latent, plan.few)


def arguments(config: PassConfig, mesh: Mesh) -> dict[str, Any]:
  """See `Step`."""
  plan = _plan(config, mesh.shape['latent'])
  state = state_lib.abstract_state(plan, mesh)
  sae = jax.eval_shape(
    lambda: autoencoder.init_weights(config.sae, jax.random.key(0))
  )
  sae = jax.tree.map(
    lambda a, sharding: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=sharding
    ),
    sae,
    mesh_lib.shardings(sae, mesh),
  )

  def of(shape, dtype, letters):
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=mesh_lib.sharding(mesh, letters)
    )

  tokens = (config.batch_size,)
  batch = state_lib.Batch(
    raw_BD=of((*tokens, config.sae.d_model), jnp.bfloat16, 'BD'),
    document_B=of(tokens, jnp.int32, 'B'),
    position_B=of(tokens, jnp.int32, 'B'),
    row_hi=of((), jnp.uint32, ''),
    row_lo=of((), jnp.uint32, ''),
    size=of((), jnp.int32, ''),
    pca=of((2,), jnp.int32, ''),
    test=of((2,), jnp.int32, ''),
  )
  longest = {name: of((), jnp.float32, '') for name in plan.scored}
  return {
    'parameters': ({name: sae for name in plan.scored}, longest),
    'reducers': (state.reducers, state.fired),
    'sums': state.replace(reducers=None, fired=None),
    'batch': batch,
  }


def lowered(
  config: PassConfig, mesh: Mesh, implementation: str | None
) -> jax.stages.Lowered:
  """See `Step`.

  Raises:
    UserError: if an implementation is named: the pass takes that of training.
  """
  if implementation is not None:
    raise errors.UserError(
      f'implementation {implementation!r}: probing takes the one that training '
      'would choose: leave --implementation out'
    )
  plan = _plan(config, mesh.shape['latent'])
  # A program for other chips must not be kept as one for these.
  with jax.set_mesh(mesh):
    held = arguments(config, mesh)
    return step.make_step(plan, mesh).lower(
      state_lib.abstract_state(plan, mesh), *held['parameters'], held['batch']
    )


def expected(
  config: PassConfig, mesh: Mesh, implementation: str | None = None
) -> frozenset[str]:
  """See `Step`."""
  del implementation
  scan = config.scan
  kept = {
    scopes.TOP: scan.top_examples,
    scopes.RANDOM: scan.random_examples,
    scopes.NEAR: scan.near_examples,
  }
  names = {
    parts.ENCODER[0],
    parts.DECODER[0],
    scopes.CODES,
    scopes.PAIRS,
    scopes.STATISTICS,
    scopes.METRICS,
    scopes.COMPONENTS,
    *(name for name, examples in kept.items() if examples),
  }
  if config.sae.preprocessing != 'none':
    names.add(scopes.PREPROCESSING)
  if mesh.shape['latent'] > 1:
    names.add(scopes.EXCHANGE)
  return frozenset(names)


def branch(case: str, choice: str, branches: int) -> int | None:
  """See `Step`."""
  asked = {scopes.COMPONENTS: ('train', 'first'), scopes.METRICS: ('test',)}
  if choice not in asked:
    return None
  return branches - 1 if case in asked[choice] else 0


def runs(config: PassConfig, mesh: Mesh, part: str, case: str) -> float | None:
  """See `Step`: how often pairs are offered to the lists of examples."""
  if part not in (scopes.TOP, scopes.RANDOM, scopes.NEAR):
    return None
  if case != 'first':
    return 1
  tokens = config.batch_size // mesh.shape['data']
  shards = mesh.shape['latent']
  slots = _pair_slots(config, tokens, shards)
  pairs = tokens * config.sae.k / shards
  return -(-pairs // top.offers_at_a_time(slots))


def guess(
  config: PassConfig,
  slices: Slices,
  mesh: Mesh,
  implementation: str | None,
  held: dict[str, int],
) -> tuple[float, float]:
  """See `Step`."""
  device = slices.device
  data, latent = mesh.shape['data'], mesh.shape['latent']
  d, k = config.sae.d_model, config.sae.k
  tokens, latents = config.batch_size // data, config.sae.n_latents // latent
  with jax.set_mesh(mesh):
    name = dispatch.choose(config.sae.n_latents, k, implementation, d)
  slots = _pair_slots(config, tokens, latent)
  # Codes, candidates of all shards, and sorted pairs of ten words, twice.
  codes = 8 * tokens * k / latent + 48 * slots + 80 * slots
  products = 2 * tokens * latents * d
  blocks = 1 if name == 'pallas' else tokens * latents * 4 / BLOCK_BYTES
  moved = (
    blocks * latents * d * 2
    + (0 if name == 'pallas' else 2 * tokens * latents * 4)
    + 4 * tokens * d * 4
    + 3 * held['reducers']
    + 2 * 10 * 40 * slots
  )
  along_latent = mesh.devices[0]
  seconds = max(products / device.flops, moved / device.hbm_bandwidth)
  seconds += roofline.link_seconds(
    'all-to-all', 12 * tokens * 2 * k / latent, along_latent, slices
  )
  return lasting(held, data) + codes, seconds


def lasting(held: dict[str, int], data: int) -> float:
  """See `Step`: rounded weights, and inputs of all tokens in float32."""
  del data
  return held['parameters'] / 2 + 4 * held['batch']


def rank(data: int, step_s: float) -> tuple[int, float]:
  """See `Step`: with one data shard nothing is merged, and all is held once."""
  return data, step_s


def smaller(config: PassConfig) -> Iterator[tuple[str, PassConfig]]:
  """See `Step`."""
  devices = config.mesh_data * config.mesh_latent
  size = config.batch_size // 2
  while size % devices == 0 and size // config.mesh_data >= _LEAST_TOKENS:
    yield f'--batch={size}', dataclasses.replace(config, batch_size=size)
    size //= 2


def fewest_latents(config: PassConfig) -> int:
  """See `Step`."""
  return config.sae.k


def state_bytes(held: dict[str, int]) -> float:
  """See `Step`."""
  return held['parameters'] + held['reducers']


def settings(config: PassConfig) -> str:
  """See `Step`."""
  scan = config.scan
  return (
    f'examples {scan.top_examples} top, {scan.random_examples} random, '
    f'{scan.near_examples} near, {config.controls} controls'
  )


def figures(plan: Any) -> dict[str, Any]:
  """See `Step`."""
  product = plan.encoder_product_s
  return {
    'rows': plan.case,
    'encoder_product_s': product,
    'ratio_to_encoder_product': plan.roofline.step_s / product,
    'by_rows': {
      case: {
        'roofline_step_s': bound.step_s,
        'roofline_without_overlap_s': bound.without_overlap_s,
        'tokens_per_s_at_most': plan.config.batch_size / bound.step_s,
        'ratio_to_encoder_product': bound.step_s / product,
        'ratio_without_overlap': bound.without_overlap_s / product,
      }
      for case, bound in plan.cases.items()
    },
  }


def lines(plan: Any) -> list[str]:
  """See `Step`."""
  product = plan.encoder_product_s
  text = [f"the encoder's product alone: {1e3 * product:,.3f} ms"]
  for case, bound in plan.cases.items():
    text.append(
      f'  a step of {case} rows takes {bound.step_s / product:.2f} times as '
      f'long, {bound.without_overlap_s / product:.2f} if no exchange is hidden'
    )
  return text


def assumptions(plan: Any) -> list[str]:
  """See `Step`."""
  config = plan.config
  tokens = config.batch_size // config.mesh_data
  slots = _pair_slots(config, tokens, config.mesh_latent)
  pairs = tokens * config.sae.k / config.mesh_latent
  share = min(1.0, top.offers_at_a_time(slots) / pairs)
  return [
    'components are fitted to train rows, and test rows are scored; at most '
    f'{share:.1%} of the pairs of a batch enter lists of examples, as when '
    f'latents have fired {1 / share:,.0f} times as often as their lists are '
    'long. Of the first rows all do',
    'lists of candidates are long enough: a batch where one is not is done '
    'again, one in a thousand if winners are spread evenly over the shards',
  ]

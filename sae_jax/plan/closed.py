"""The work of a TopK training step in closed forms of its sizes.

How often a part reads and writes an array was counted in programs that the
compiler made for v5e, v5p and v6e at d_model 768; kernels count as they
declare.
`plan.sweep` compares the forms with the compiled steps at a grid's corners.
"""

import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax.ops import chip, dispatch, scopes
from sae_jax.ops.autoencode import candidates
from sae_jax.ops.chip import LANES
from sae_jax.ops.encode_topk import tiles as encode_tiles
from sae_jax.ops.weight_grad import tiles as grad_tiles
from sae_jax.plan.program import exchange, parts
from sae_jax.plan.program.costs import Costs, Work
from sae_jax.tpu.slices import Slices
from sae_jax.training import auxk
from sae_jax.training.config import TrainConfig

# Share of VMEM up to which an array stays there from one operation to the next;
# and up to which the reconstruction does, and its error, on one chip.
_STAYS = 0.4
_KEPT = {'v5e': 0.8}
# Of that, where several arrays are in use at a time.
_BESIDE = 1 / 2
# Of a step's program.
_PROGRAM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a step on one device.

  Attributes:
    implementation: of the sparse products; all but 'pallas' count as dense.
    tokens: of its shard of the batch.
    latents: of its shard of the latents.
    d: width of the activations.
    k: active latents of a token, of all shards.
    data: shards of the batch.
    shards: of the latents.
    offered: latents that a shard offers of a token.
    dead: latents of AuxK's copy; 0 for no AuxK.
    k_aux: dead latents that model the error of a token.
    block: tokens of a block of the encoder's kernel.
    stays: most bytes of an array that stays in VMEM.
    kept: most bytes of the reconstruction and its error that stay there.
  """

  implementation: str
  tokens: int
  latents: int
  d: int
  k: int
  data: int
  shards: int
  offered: int
  dead: int
  k_aux: int
  block: int
  stays: float
  kept: float

  @property
  def inputs(self) -> int:
    """Bytes of an array of activations."""
    return 4 * self.tokens * self.d

  @property
  def matrix(self) -> int:
    """Bytes of a matrix of weights."""
    return 4 * self.latents * self.d

  @property
  def pairs(self) -> int:
    """Active pairs of a token and a latent of the shard, as expected."""
    return min(
      self.tokens * self.offered, -(-self.tokens * self.k // self.shards)
    )

  @property
  def is_kept(self) -> bool:
    """Whether the reconstruction and its error stay in VMEM."""
    return self.inputs <= self.kept

  @property
  def packs(self) -> bool:
    """Whether the gradients' kernel reads both rows of a pair as one."""
    return grad_tiles.packs(self.pairs, self.tokens)

  def moved(self, times: float, nbytes: float, share: float = 1) -> float:
    """Bytes of HBM for passes over an array; none if it stays in VMEM.

    Args:
      times: how many passes.
      nbytes: of the array.
      share: of what stays that it may be, where others are in use beside it.
    """
    return times * nbytes if nbytes > share * self.stays else 0.0


def sizes(config: TrainConfig, slices: Slices, mesh: Mesh, case: str) -> Sizes:
  """The sizes of a run's step on each device of a mesh.

  Args:
    config: the run, with d_model.
    slices: the chips.
    mesh: of the devices that it is compiled for.
    case: dead latents that AuxK works on, see `steps.training.CASES`.
  """
  sae, data, shards = config.sae, mesh.shape['data'], mesh.shape['latent']
  tokens, latents = config.batch_size // data, sae.n_latents // shards
  k = config.objective.widest(sae.k)
  with jax.set_mesh(mesh):
    implementation = dispatch.choose(sae.n_latents, k, None, sae.d_model)
    offered, block = min(k, latents), tokens
    if implementation == 'pallas':
      offered = min(candidates.width(k, shards, tokens), latents)
      block = encode_tiles.choose(
        tokens, sae.d_model, latents, offered, sae.matmul_dtype
      ).tokens
    vmem = chip.vmem_bytes()
  k_aux = config.objective.k_aux
  dead = {'none': 0, 'few': min(auxk.LEAST_SIZE, latents), 'all': latents}[case]
  return Sizes(
    implementation=implementation,
    tokens=tokens,
    latents=latents,
    d=sae.d_model,
    k=k,
    data=data,
    shards=shards,
    offered=offered,
    dead=dead if k_aux else 0,
    k_aux=k_aux,
    block=block,
    stays=_STAYS * vmem,
    kept=_KEPT.get(slices.chip, _STAYS) * vmem,
  )


def costs(of: Sizes, slices: Slices, mesh: Mesh) -> Costs:
  """The work of a step on one device, as `program.costs` gives it.

  Args:
    of: the sizes.
    slices: the chips.
    mesh: of their devices.
  """
  kernels = of.implementation == 'pallas'
  work = _kernels(of) if kernels else _dense(of)
  # Kernels read the gradients from HBM; XLA may find them in VMEM, and takes
  # several passes for the decoder.
  adam = 18 if kernels else 16 + 9 * (of.matrix > of.stays)
  work |= {
    scopes.PREPROCESSING: Work(hbm_bytes=_preprocessing(of)),
    parts.OPTIMIZER: Work(hbm_bytes=adam * of.matrix),
    parts.REST: _rest(of),
  }
  if of.dead:
    work[parts.AUXK] = _auxk(of)
  return Costs(parts=work, collectives=_exchanges(of, slices, mesh))


def _preprocessing(of: Sizes) -> float:
  """Bytes of reading a batch, and of writing it again for kernels."""
  kernels = of.implementation == 'pallas'
  read = (1.5 if kernels or of.dead else 1) * of.inputs
  written = of.moved(2.7 if kernels else 1, of.inputs)
  return read + written + of.moved(2, of.inputs / 2)


def _kernels(of: Sizes) -> dict[str, Work]:
  """Parts of a sparse pass by kernels."""
  t, d, matrix, inputs = of.tokens, of.d, of.matrix, of.inputs
  # Of a block of tokens, as many slots are kept as are likely to be needed.
  slots = min(t * of.offered, 2 * of.pairs)
  lists = 4 * t * -(-of.offered // LANES) * LANES
  encoder = Work(
    flops=2 * t * of.latents * d,
    mxu_flops=2 * t * of.latents * d,
    # The kernel; the rounded encoder and inputs; lists and their copies.
    hbm_bytes=-(-t // of.block) * matrix / 2
    + inputs / 2
    + 8 * t * of.offered
    + 1.5 * (matrix + inputs)
    + 2 * lists,
  )
  # Rows of the pairs, a row for each token, and slots.
  rows = 4 * d * (of.pairs + t) + 12 * slots
  gradients = Work(
    hbm_bytes=rows
    + 4 * d * ((1 if of.packs else 2) * of.pairs + 2 * of.latents)
    + 16 * slots
    # Both tables of rows in one, which is written first; b_pre's gradient.
    + (of.moved(4.5, inputs) + matrix) * of.packs
    # Pairs are sorted.
    + 40 * slots
  )
  passes = {
    parts.ENCODER[0]: encoder,
    parts.DECODER[0]: Work(hbm_bytes=rows),
    parts.BOTH[0]: Work(hbm_bytes=2 * lists),
    parts.BOTH[1]: gradients,
  }
  if of.shards > 1:
    ranked = 4 * t * of.offered + 8 * t * of.k / of.shards
    passes[scopes.EXCHANGE] = Work(hbm_bytes=ranked)
  return passes


def _rest(of: Sizes) -> Work:
  """Sums over shards, which are read and written, and the error."""
  gradients = of.moved(4, of.matrix, 1 / 3) if of.data > 1 else 0
  models = of.moved(2, of.inputs, _BESIDE) if of.shards > 1 else 0
  if of.implementation == 'pallas':
    # Where rows are packed, that is where the error is scaled.
    times = 1 if of.packs else 5
  else:
    times = 2.5 if of.is_kept else 3
  errors = of.moved(times, of.inputs) + of.moved(3.5, of.inputs / 2)
  return Work(hbm_bytes=gradients + models + errors)


def _auxk(of: Sizes) -> Work:
  """AuxK by dense products on a copy of the dead latents."""
  codes = 4 * of.tokens * of.dead
  product = 2 * of.tokens * of.dead * of.d
  return Work(
    flops=5 * product,
    mxu_flops=5 * product,
    hbm_bytes=of.moved(11, of.inputs, _BESIDE)
    + (5.5 if of.shards > 1 else 4) * codes
    + of.moved(5, codes, _BESIDE)
    + of.moved(14, codes),
  )


def _exchanges(
  of: Sizes, slices: Slices, mesh: Mesh
) -> dict[exchange.Collective, np.ndarray]:
  """Gradients over data, models and candidates over the latents."""
  count = mesh.devices.size
  over_data = tuple(range(0, count, of.shards))
  over_latents = tuple(range(of.shards))
  gradients = 2 * of.matrix + 8 * of.latents
  models = (2 if of.dead else 1) * of.inputs
  candidates_put_in = 4 * of.tokens * (of.offered + 1)
  if of.dead:
    candidates_put_in += 4 * of.tokens * (min(of.k_aux, of.dead) + 1)
  put_in = {}
  if of.data > 1:
    inside = over_data[: of.data // slices.count]
    put_in['all-reduce', inside] = gradients
    if slices.count > 1:
      put_in[exchange.BETWEEN_SLICES + 'all-reduce', ()] = gradients / len(
        inside
      )
  if of.shards > 1:
    put_in['all-reduce', over_latents] = models
    put_in['all-to-all', over_latents] = candidates_put_in
  return {
    exchange.Collective(kind, group, parts.REST): np.array([1, nbytes], float)
    for (kind, group), nbytes in put_in.items()
    if len(group) != 1
  }


def _dense(of: Sizes) -> dict[str, Work]:
  """Parts of a pass by dense products, of which each part has one or two."""
  codes, matrix, inputs = 4 * of.tokens * of.latents, of.matrix, of.inputs
  product = 2 * of.tokens * of.latents * of.d
  lists = 8 * of.tokens * of.offered
  models = 0 if of.is_kept else inputs

  def work(products, hbm_bytes):
    flops = products * product
    return Work(flops, flops, hbm_bytes)

  passes = {
    parts.ENCODER[0]: work(1, of.moved(2, codes) + matrix),
    # The kernel of the top k declares that it reads all codes.
    parts.BOTH[0]: work(
      1,
      codes + of.moved(2, codes) + 2 * matrix + 2 * lists + models,
    ),
    # Codes are rounded on the way.
    parts.BOTH[1]: work(
      2, of.moved(2.5, codes) + of.moved(3, matrix) + 2 * models
    ),
    parts.ENCODER[1]: work(1, of.moved(0.5, codes) + of.moved(1, matrix)),
  }
  if of.shards > 1:
    ranked = 4 * of.tokens * of.offered + 8 * of.tokens * of.k / of.shards
    sent = lists + of.moved(1, lists)
    passes[scopes.EXCHANGE] = Work(hbm_bytes=ranked + sent)
  return passes


def hbm_bytes(of: Sizes) -> float:
  """HBM that a run and its step need on a device.

  Parameters, both moments and the average; the batch; gradients and what AuxK
  has of them if all latents are dead; inputs and errors; codes, dense or as
  lists.

  Args:
    of: the sizes.
  """
  parameters = 2 * of.matrix
  codes = 4 * of.tokens * of.latents if of.implementation == 'dense' else 0
  lists = 8 * of.tokens * of.offered
  return 9 * parameters + 3.5 * of.inputs + codes + 4 * lists + _PROGRAM_BYTES

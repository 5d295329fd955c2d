"""A plan: the figures of a run."""

import dataclasses
from typing import Any

from sae_jax.plan import roofline as roofline_lib
from sae_jax.plan import steps
from sae_jax.plan.footprint import Footprint
from sae_jax.plan.program.costs import Buffer, Costs, Kernel
from sae_jax.plan.remedies import Remedy
from sae_jax.plan.roofline import Roofline
from sae_jax.tpu.chips import CHIPS
from sae_jax.tpu.slices import Slices

GIB = 2**30
NOTHING_MEASURED = (
  'nothing here was measured: the compiler says what fits, arithmetic on its '
  'program bounds the times'
)
# Of a chip: what times and memory are reckoned with.
_FIGURES = (
  'flops',
  'hbm_gib',
  'hbm_bandwidth',
  'ici_bandwidth',
  'dcn_bandwidth',
  'dimensions',
  'most_chips',
)


@dataclasses.dataclass(frozen=True)
class MeshChoice:
  """One mesh that was considered.

  Attributes:
    data: shards of the batch.
    latent: shards of the latents.
    compiled: whether the figures come from the compiled program; otherwise
      they are guesses.
    fits: whether the step fits in HBM.
    hbm_bytes: HBM that a device needs.
    step_s: seconds of a step by its roofline.
    refused: why the step does not accept this mesh; '' if it does.
  """

  data: int
  latent: int
  compiled: bool
  fits: bool
  hbm_bytes: float
  step_s: float
  refused: str = ''


@dataclasses.dataclass(frozen=True)
class Plan:
  """Memory and time of a run, by compiler and arithmetic; nothing is measured.

  Attributes:
    config: of the program, with the chosen mesh.
    slices: the chips.
    fits: whether the compiler found room for the step.
    footprint: HBM that a device needs.
    roofline: the least time of a step.
    costs: the work of the program on a device.
    case: what is assumed where the program decides by data, one of the CASES
      of its step.
    cases: the least time of a step in each case.
    choices: scope of each such choice -> seconds of its branches.
    encoder_product_s: seconds of the encoder's product with a batch alone.
    loops_s: seconds of one run of each loop whose length depends on data; the
      roofline leaves these loops out.
    largest: the largest array other than state and batch.
    codes: number of values, tokens x latents, that a device works on at a time.
    dense: arrays with at least that many values.
    meshes: all that were considered, the best first.
    remedies: changes after which a run that does not fit would fit.
    tokens: tokens of the whole run; 0 where none were given.
    price_per_chip_hour: 0 where none was given.
    text: the compiled program.
    compile_s: seconds that compiling took on this machine.
  """

  config: Any
  slices: Slices
  fits: bool
  footprint: Footprint
  roofline: Roofline
  costs: Costs
  case: str
  cases: dict[str, Roofline]
  choices: dict[str, tuple[float, ...]]
  encoder_product_s: float
  loops_s: tuple[float, ...]
  largest: Buffer | None
  codes: int
  dense: tuple[Buffer, ...]
  meshes: tuple[MeshChoice, ...]
  remedies: tuple[Remedy, ...]
  tokens: int
  price_per_chip_hour: float
  text: str = dataclasses.field(repr=False)
  compile_s: float = 0.0

  @property
  def tokens_per_s(self) -> float:
    """The most tokens that the whole mesh can take in a second."""
    return self.config.batch_size / self.roofline.step_s

  @property
  def hours(self) -> float:
    """The fewest hours for all tokens."""
    return self.tokens / self.tokens_per_s / 3600

  @property
  def cost(self) -> float:
    """The least cost of all tokens, in the currency of the price."""
    return self.hours * self.slices.chips * self.price_per_chip_hour

  @property
  def kernels(self) -> tuple[tuple[Kernel, float], ...]:
    """Pallas kernels and how often a step calls each."""
    return tuple(self.costs.kernels.items())

  def to_dict(self) -> dict[str, Any]:
    """All figures, for JSON."""
    share = self.slices.devices_per_chip
    step, memory = steps.of(self.config), self.footprint.parts
    return {
      'program': step.NAME,
      'measured': False,
      'note': NOTHING_MEASURED,
      'fits': self.fits,
      'hbm_per_chip_gib': share * self.footprint.total / GIB,
      'hbm_limit_per_chip_gib': share * self.slices.hbm_limit / GIB,
      'hbm_parts_per_chip_gib': {
        name: share * size / GIB for name, size in memory.items()
      },
      'roofline_step_s': self.roofline.step_s,
      'roofline_without_overlap_s': self.roofline.without_overlap_s,
      'roofline_parts': {
        part.name: {
          'seconds': part.seconds,
          'compute_s': part.compute_s,
          'memory_s': part.memory_s,
          'flops_per_device': part.flops,
          'hbm_bytes_per_device': part.hbm_bytes,
        }
        for part in self.roofline.parts
      },
      'exchanges': [dataclasses.asdict(e) for e in self.roofline.exchanges],
      'kernels': [
        {**dataclasses.asdict(kernel), 'calls': calls}
        for kernel, calls in self.kernels
      ],
      'flops_per_device': self.costs.total.flops,
      'hbm_bytes_per_device': self.costs.total.hbm_bytes,
      'link_bytes_per_device': sum(
        exchange.link_bytes for exchange in self.roofline.exchanges
      ),
      **step.figures(self),
      'loops_left_out_s': list(self.loops_s),
      'codes_per_device': self.codes,
      'buffers_as_large_as_codes': [_described(b) for b in self.dense],
      'largest_buffer': self.largest and _described(self.largest),
      'tokens_per_s_at_most': self.tokens_per_s,
      'tokens': self.tokens,
      'hours_at_least': self.hours,
      'cost_at_least': self.cost,
      'topology': self.slices.name,
      'num_slices': self.slices.count,
      'chips': self.slices.chips,
      'devices_per_chip': share,
      'mesh': [self.config.mesh_data, self.config.mesh_latent],
      # Plans that are stored, as in experiments/plans, have this key.
      'splits': [dataclasses.asdict(mesh) for mesh in self.meshes],
      'remedies': [dataclasses.asdict(remedy) for remedy in self.remedies],
      'chip': described_chip(self.slices),
      'assumptions': list(roofline_lib.ASSUMPTIONS),
      'compile_s_on_this_machine': self.compile_s,
      'config': dataclasses.asdict(self.config),
    }


def described_chip(slices: Slices) -> dict[str, float]:
  """The figures of a chip that times and memory are reckoned with, by name."""
  return {name: getattr(CHIPS[slices.chip], name) for name in _FIGURES}


def _described(buffer: Buffer) -> dict[str, Any]:
  return {
    'shape': str(buffer.shape),
    'bytes': buffer.shape.nbytes,
    'part': buffer.part,
    'made_by': buffer.opcode,
  }

"""A plan: what was found of a run, as figures."""

import dataclasses
from typing import Any

from sae_jax.plan import roofline as roofline_lib
from sae_jax.plan.footprint import Footprint
from sae_jax.plan.program.costs import Buffer, Costs, Kernel
from sae_jax.plan.remedies import Remedy
from sae_jax.plan.roofline import Roofline
from sae_jax.tpu.chips import CHIPS, Slices
from sae_jax.training.config import TrainConfig

GIB = 2**30
NOTHING_MEASURED = (
  'nothing here was measured: the compiler says what fits, arithmetic on its '
  'program bounds the times'
)


@dataclasses.dataclass(frozen=True)
class Split:
  """One way to split the devices.

  Attributes:
    data: shards of the batch.
    latent: shards of the latents.
    compiled: whether the rest is the compiler's, not a guess.
    fits: whether it fits in HBM.
    hbm_bytes: of a device.
    step_s: the roofline of a step.
    refused: why the training step does not take it, '' if it does.
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
  """What a run needs, by the compiler and by arithmetic; nothing is measured.

  Attributes:
    config: the run, with the mesh that was chosen.
    slices: the chips.
    fits: whether the compiler found room for the step.
    footprint: HBM of a device.
    roofline: the least time of a step.
    costs: what the program does on a device.
    dead: the share of dead latents that AuxK's work is taken for.
    auxk_s: seconds of AuxK with none dead, few, ..., all.
    loops_s: seconds of one run of each loop whose length depends on data,
      which the bound leaves out.
    largest: the largest array beside state and batch.
    codes: values of the [tokens, latents] that a device works on at a time.
    dense: arrays that are as large as that, or larger.
    splits: all that were looked at, the best first.
    remedies: what to change where it does not fit.
    tokens: of the whole run; 0 where none were given.
    price_per_chip_hour: 0 where none was given.
    text: of the compiled program.
    compile_s: what compiling took, of this machine's time.
  """

  config: TrainConfig
  slices: Slices
  fits: bool
  footprint: Footprint
  roofline: Roofline
  costs: Costs
  dead: str
  auxk_s: tuple[float, ...]
  loops_s: tuple[float, ...]
  largest: Buffer | None
  codes: int
  dense: tuple[Buffer, ...]
  splits: tuple[Split, ...]
  remedies: tuple[Remedy, ...]
  tokens: int
  price_per_chip_hour: float
  text: str = dataclasses.field(repr=False)
  compile_s: float = 0.0

  @property
  def tokens_per_s(self) -> float:
    """At most, of the whole mesh."""
    return self.config.batch_size / self.roofline.step_s

  @property
  def hours(self) -> float:
    """At least, for all tokens."""
    return self.tokens / self.tokens_per_s / 3600

  @property
  def cost(self) -> float:
    """At least, in the currency of the price."""
    return self.hours * self.slices.chips * self.price_per_chip_hour

  @property
  def kernels(self) -> tuple[tuple[Kernel, float], ...]:
    """Pallas kernels and their calls in a step."""
    return tuple(self.costs.kernels.items())

  def to_dict(self) -> dict[str, Any]:
    """All figures, for JSON."""
    share = self.slices.devices_per_chip
    held = dataclasses.asdict(self.footprint)
    return {
      'measured': False,
      'note': NOTHING_MEASURED,
      'fits': self.fits,
      'hbm_per_chip_gib': share * self.footprint.total / GIB,
      'hbm_limit_per_chip_gib': share * self.slices.hbm_limit / GIB,
      'hbm_parts_per_chip_gib': {
        name: share * size / GIB for name, size in held.items()
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
      'exchanges': [dataclasses.asdict(one) for one in self.roofline.exchanges],
      'kernels': [
        {**dataclasses.asdict(kernel), 'calls': calls}
        for kernel, calls in self.kernels
      ],
      'flops_per_device': self.costs.total.flops,
      'hbm_bytes_per_device': self.costs.total.hbm_bytes,
      'link_bytes_per_device': sum(
        one.link_bytes for one in self.roofline.exchanges
      ),
      'dead_latents': self.dead,
      'auxk_s': list(self.auxk_s),
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
      'splits': [dataclasses.asdict(split) for split in self.splits],
      'remedies': [dataclasses.asdict(remedy) for remedy in self.remedies],
      'chip': dataclasses.asdict(CHIPS[self.slices.chip]),
      'assumptions': list(roofline_lib.ASSUMPTIONS),
      'compile_s_on_this_machine': self.compile_s,
      'config': dataclasses.asdict(self.config),
    }


def _described(buffer: Buffer) -> dict[str, Any]:
  return {
    'shape': str(buffer.shape),
    'bytes': buffer.shape.nbytes,
    'part': buffer.part,
    'made_by': buffer.opcode,
  }

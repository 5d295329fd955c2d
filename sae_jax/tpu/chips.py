"""The one table of figures of TPU chips.

Figures are per chip, from the page of each version under
https://docs.cloud.google.com/tpu/docs (system architecture), as of 2026, but
for those that say otherwise. Peak rates bound a time from below; nothing
reaches them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One version of TPU.

  Attributes:
    flops: peak bfloat16 operations a second.
    hbm_gib: GiB of HBM that the compiler lets a program use, somewhat less than
      on the page.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that a chip can send over all its links to
      other chips of the slice together; half of the page's bidirectional
      figure.
    dcn_bandwidth: bytes a second of a chip's share in its host's network.
    dimensions: number of dimensions of the torus that the links make.
    most_chips: number of chips in the largest slice.
    vmem_mib: MiB of VMEM of each TensorCore, as Pallas knows it.
    clock_ghz: of the TensorCores. Those of v5e and v5p follow from their peak
      rates; tpu7x's is assumed.
    topology: a small slice, to compile one-chip programs for.
    megacore: whether libtpu needs a setting to treat the two cores of a chip as
      one device. For v5p it needs none.
  """

  flops: float
  hbm_gib: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  dimensions: int
  most_chips: int
  vmem_mib: int
  clock_ghz: float
  topology: str
  megacore: bool = False

  @property
  def vmem_bytes(self) -> int:
    """VMEM of each TensorCore."""
    return self.vmem_mib * 2**20


_GBIT = 1e9 / 8
CHIPS = {
  'v4': Chip(
    flops=275e12,
    hbm_gib=30.75,
    hbm_bandwidth=1228e9,
    # Its page has no figure for links or hosts: this is its all-reduce
    # bandwidth per pod over 4,096 chips, and the network that of v5p.
    ici_bandwidth=268e9,
    dcn_bandwidth=50 * _GBIT,
    dimensions=3,
    most_chips=4096,
    vmem_mib=16,
    clock_ghz=1.05,
    topology='v4:2x2x1',
    megacore=True,
  ),
  'v5e': Chip(
    flops=197e12,
    hbm_gib=15.75,
    hbm_bandwidth=819e9,
    ici_bandwidth=200e9,
    # Its pod's 6.4 Tbit/s over 256 chips.
    dcn_bandwidth=25 * _GBIT,
    dimensions=2,
    most_chips=256,
    vmem_mib=128,
    clock_ghz=1.5,
    topology='v5e:2x2',
  ),
  'v5p': Chip(
    flops=459e12,
    hbm_gib=95.73,
    hbm_bandwidth=2765e9,
    ici_bandwidth=600e9,
    dcn_bandwidth=50 * _GBIT,
    dimensions=3,
    most_chips=6144,
    vmem_mib=64,
    clock_ghz=1.75,
    topology='v5p:2x2x1',
  ),
  'v6e': Chip(
    flops=918e12,
    hbm_gib=31.24,
    hbm_bandwidth=1640e9,
    ici_bandwidth=400e9,
    dcn_bandwidth=100 * _GBIT,
    dimensions=2,
    most_chips=256,
    vmem_mib=128,
    clock_ghz=1.75,
    topology='v6e:2x2',
  ),
  # A chip is two devices, of half of everything each but VMEM and clock.
  'tpu7x': Chip(
    flops=2307e12,
    hbm_gib=189.48,
    hbm_bandwidth=7380e9,
    ici_bandwidth=600e9,
    dcn_bandwidth=100 * _GBIT,
    dimensions=3,
    most_chips=9216,
    vmem_mib=64,
    clock_ghz=2.2,
    topology='tpu7x:2x2x1',
  ),
}

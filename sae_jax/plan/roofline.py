"""The least time of a program on chips with given peak rates."""

from collections.abc import Sequence
import dataclasses

import jax
from jax.sharding import Mesh

from sae_jax.plan.program import exchange
from sae_jax.plan.program.costs import Costs
from sae_jax.tpu.slices import Slices

ASSUMPTIONS = (
  'every matrix product runs at the peak rate of bfloat16 (float32 factors at '
  'full precision take six passes), every byte of HBM and of links at the '
  'peak bandwidth',
  'a part takes the longer of its products and its HBM traffic; sorts, '
  'top-k, gathers and scatters count by their HBM traffic alone, once, though '
  'their issue rate is often what limits them',
  "the roofline of a step is the longer of all parts' sum and all exchanges' "
  'sum, as if they overlapped wholly, links and the network between slices '
  'too; the sum of both is the same without any overlap; a real step is '
  'slower than the first, and may be slower than the second',
  'exchanges move the least bytes there are (ring: all-reduce 2(n-1)/n, '
  'all-gather (n-1) times, reduce-scatter (n-1)/n of what a device puts in) '
  'over the links of those torus dimensions that a group spans, all of which '
  'wrap around; all-to-all is bounded by the links across the middle of the '
  'torus too',
)


@dataclasses.dataclass(frozen=True)
class PartTime:
  """Work and least time of one part of the method on one device.

  Attributes:
    name: the part's name.
    flops: operations of matrix products.
    hbm_bytes: bytes read from HBM and written to it.
    compute_s: seconds of the products at the peak rate.
    memory_s: seconds of the bytes at the peak bandwidth.
  """

  name: str
  flops: float
  hbm_bytes: float
  compute_s: float
  memory_s: float

  @property
  def seconds(self) -> float:
    """The longer of compute_s and memory_s."""
    return max(self.compute_s, self.memory_s)


@dataclasses.dataclass(frozen=True)
class ExchangeTime:
  """All exchanges of one kind along one axis of the mesh, on one device.

  Attributes:
    kind: XLA's name of the exchange.
    axis: axis of the mesh: 'data', 'latent' or both.
    over: 'ICI', or 'DCN' between slices.
    count: exchanges per step.
    put_in_bytes: bytes that a device contributes.
    link_bytes: bytes that a device sends over links.
    seconds: seconds at the peak bandwidth.
  """

  kind: str
  axis: str
  over: str
  count: float
  put_in_bytes: float
  link_bytes: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The least time of a step, and the parts and exchanges it consists of."""

  parts: tuple[PartTime, ...]
  exchanges: tuple[ExchangeTime, ...]

  @property
  def parts_s(self) -> float:
    """Seconds of all parts, one after another."""
    return sum(part.seconds for part in self.parts)

  @property
  def exchanges_s(self) -> float:
    """Seconds of all exchanges; ICI and DCN work at the same time."""
    totals = {'ICI': 0.0, 'DCN': 0.0}
    for exchange_time in self.exchanges:
      totals[exchange_time.over] += exchange_time.seconds
    return max(totals.values())

  @property
  def step_s(self) -> float:
    """The least seconds of a step, where parts and exchanges overlap wholly."""
    return max(self.parts_s, self.exchanges_s)

  @property
  def without_overlap_s(self) -> float:
    """The least seconds where no exchange overlaps with a part."""
    return self.parts_s + self.exchanges_s


def roofline(costs: Costs, slices: Slices, mesh: Mesh) -> Roofline:
  """Bounds the time of a step from below.

  Args:
    costs: the work of the program on one device.
    slices: the chips.
    mesh: of their devices; it decides which links an exchange can use.
  """
  device = slices.device
  parts = tuple(
    PartTime(
      name,
      work.flops,
      work.hbm_bytes,
      work.mxu_flops / device.flops,
      work.hbm_bytes / device.hbm_bandwidth,
    )
    for name, work in costs.parts.items()
  )
  merged = {}
  for collective, (count, put_in) in costs.collectives.items():
    key = (collective.kind, collective.group)
    before = merged.get(key, (0.0, 0.0))
    merged[key] = (before[0] + count, before[1] + put_in)
  exchanges = [
    _exchange(kind, group, count, put_in, slices, mesh)
    for (kind, group), (count, put_in) in merged.items()
  ]
  return Roofline(
    tuple(sorted(parts, key=lambda p: -p.seconds)),
    tuple(sorted(exchanges, key=lambda e: -e.seconds)),
  )


def _exchange(kind, group, count, put_in, slices, mesh) -> ExchangeTime:
  devices = mesh.devices.reshape(-1)
  members = [devices[i] for i in group] if group else list(devices)
  between = kind.startswith(exchange.BETWEEN_SLICES)
  if between or _slices(members) > 1:
    n = slices.count if between else len(members)
    sent = put_in * _rounds(kind.removeprefix(exchange.BETWEEN_SLICES), n)
    axis = 'data' if between else _axis(group, mesh)
    seconds = sent / slices.device.dcn_bandwidth
    return ExchangeTime(kind, axis, 'DCN', count, put_in, sent, seconds)
  sent = put_in * _rounds(kind, len(members))
  return ExchangeTime(
    kind=kind,
    axis=_axis(group, mesh),
    over='ICI',
    count=count,
    put_in_bytes=put_in,
    link_bytes=sent,
    seconds=link_seconds(kind, put_in, members, slices),
  )


def link_seconds(
  kind: str, put_in: float, members: Sequence[jax.Device], slices: Slices
) -> float:
  """The least time of an exchange between devices of one slice.

  Args:
    kind: XLA's name of the exchange.
    put_in: bytes that each device contributes.
    members: the devices that take part.
    slices: the chips.
  """
  device = slices.device
  # Chips of the group along each dimension of the torus.
  spans = [len(set(line)) for line in zip(*(d.coords for d in members))]
  spanned = sum(span > 1 for span in spans)
  # Nothing is published of a faster path between the two devices of a chip.
  links = max(spanned, 1) / device.dimensions
  bandwidth = device.ici_bandwidth * links
  seconds = put_in * _rounds(kind, len(members)) / bandwidth
  if kind == 'all-to-all' and spanned:
    # Half of the chips send half of their bytes across the middle of the
    # longest dimension, where two links of each line cross.
    across = max(spans) * device.dimensions / 4
    seconds = max(seconds, put_in * across / device.ici_bandwidth)
  return seconds


def _rounds(kind: str, n: int) -> float:
  """Bytes that a device sends for each byte that it contributes."""
  return {
    'all-reduce': 2 * (n - 1) / n,
    'all-gather': n - 1,
    'reduce-scatter': (n - 1) / n,
    'all-to-all': (n - 1) / n,
  }.get(kind, 1)


def _slices(members) -> int:
  return len({getattr(device, 'slice_index', 0) for device in members})


def _axis(group: tuple[int, ...], mesh: Mesh) -> str:
  """The axes of the mesh along which a group extends."""
  if not group:
    return '+'.join(name for name, size in mesh.shape.items() if size > 1)
  sizes = list(mesh.shape.values())
  coordinates = [[] for _ in sizes]
  for index in group:
    for axis in reversed(range(len(sizes))):
      index, coordinate = divmod(index, sizes[axis])
      coordinates[axis].append(coordinate)
  names = [
    name
    for name, line in zip(mesh.axis_names, coordinates)
    if len(set(line)) > 1
  ]
  return '+'.join(names)

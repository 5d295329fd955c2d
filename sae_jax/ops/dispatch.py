"""Which implementation of a sparse operation a device and a shape get."""

from sae_jax import errors
from sae_jax.ops import chip
from sae_jax.ops.chip import LANES
from sae_jax.tpu import target

IMPLEMENTATIONS = ('gather', 'dense', 'pallas')

# Smallest N / K at which gathering rows beats a dense product of [B, N].
# cpu: experiments/benchmarks/sparse.py on two x86 cores. Dense over gather took
#   8.7x at N/K 128, 2.6x at 32, 0.6x at 8 (D 576, N 4,096); 5.8x at 1,024,
#   1.8x at 64, 1.1x at 32 (D 768, N 32,768).
# tpu: where the bound of a step with dense codes (by its HBM traffic, without
#   the selection of the top k) passes that of the kernels (by the compiler's
#   cycles) at D 768 and K 32: 413 on v5e, 438 on v5p, 515 on v6e
#   (experiments/kernels/table.py). No time was measured.
_GATHER_FROM_RATIO = {'cpu': 32, 'tpu': 450}


def choose(
  n_latents: int, k: int, implementation: str | None, width: int = 0
) -> str:
  """The named implementation, or the faster one for the shape if None.

  Args:
    n_latents: of all shards.
    k: active latents of a token.
    implementation: a name, or None.
    width: D; kernels take multiples of 128, and are chosen on a TPU.

  Raises:
    UserError: if the name is unknown, or a kernel cannot do the shape.
  """
  if implementation is None:
    ratio = _GATHER_FROM_RATIO.get(target.platform(), 450)
    if n_latents < ratio * k:
      return 'dense'
    kernels = chip.takes_kernels() and not width % LANES
    return 'pallas' if kernels else 'gather'
  if implementation not in IMPLEMENTATIONS:
    raise errors.UserError(
      f'implementation {implementation!r} is not known: '
      f'use one of {", ".join(IMPLEMENTATIONS)}'
    )
  if implementation == 'pallas' and width % LANES:
    raise errors.UserError(
      f'implementation pallas takes a d_model that is a multiple of {LANES}, '
      f"not {width}: use None or 'gather'"
    )
  return implementation

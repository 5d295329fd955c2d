"""Which implementation of a sparse operation a device and a shape get."""

import jax

from sae_jax.config import UserError

IMPLEMENTATIONS = ('gather', 'dense')

# Smallest N / K at which gathering rows beats a dense product of [B, N].
# cpu: experiments/benchmark_sparse.py on two x86 cores. Dense over gather took
#   8.7x at N/K 128, 2.6x at 32, 0.6x at 8 (D 576, N 4,096); 5.8x at 1,024,
#   1.8x at 64, 1.1x at 32 (D 768, N 32,768).
# tpu: the compiler's estimate at D 768 on v5p; no time was measured.
_GATHER_FROM_RATIO = {'cpu': 32, 'tpu': 600}


def choose(n_latents: int, k: int, implementation: str | None) -> str:
  """The named implementation, or the faster one for the shape if None.

  Raises:
    UserError: if the name is unknown.
  """
  if implementation is None:
    ratio = _GATHER_FROM_RATIO.get(jax.default_backend(), 600)
    return 'gather' if n_latents >= ratio * k else 'dense'
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'implementation {implementation!r} is not known: '
      f'use one of {", ".join(IMPLEMENTATIONS)}'
    )
  return implementation

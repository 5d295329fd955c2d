"""The work of the kernels as XLA does it, for `costs` to compare with."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp

from sae_jax.ops import adam
from sae_jax.ops.adam_rows import reference as adam_reference

_F32, _BF16, _I32 = jnp.float32, jnp.bfloat16, jnp.int32
ADAM = {'b1': 0.9, 'b2': 0.999, 'eps': 6.25e-10, 'ema_decay': 0.999}


@dataclasses.dataclass(frozen=True)
class Probe:
  """A program to compile.

  Attributes:
    function: to compile.
    arguments: shape and dtype of each.
    sizes: sizes that it chose for the chip, by name.
  """

  function: Callable
  arguments: list[tuple[tuple[int, ...], Any]]
  sizes: dict[str, float]


def xla_matmul(batch: int, d: int, n: int) -> Probe:
  """XLA's product alone, which writes all pre-activations."""

  def function(x_BD, w_ND):
    return jnp.dot(x_BD, w_ND.T, preferred_element_type=_F32)

  return Probe(function, [((batch, d), _BF16), ((n, d), _BF16)], {})


def xla_gather_sum(batch: int, d: int, n: int, k: int) -> Probe:
  """XLA's decoding by a gather."""

  def function(vals_BK, idx_BK, w_ND):
    return jnp.einsum('bk,bkd->bd', vals_BK, w_ND[idx_BK])

  per_slot = (batch, k)
  return Probe(
    function, [(per_slot, _F32), (per_slot, _I32), ((n, d), _F32)], {}
  )


def xla_sampled_products(batch: int, d: int, n: int, k: int) -> Probe:
  """XLA's gradient of the values by a gather."""

  def function(g_BD, idx_BK, w_ND):
    return jnp.einsum('bd,bkd->bk', g_BD, w_ND[idx_BK])

  return Probe(
    function, [((batch, d), _F32), ((batch, k), _I32), ((n, d), _F32)], {}
  )


def xla_segment_sums(batch: int, d: int, n: int, k: int) -> Probe:
  """XLA's gradients of both matrices by scatters."""

  def function(vals_BK, grads_BK, idx_BK, g_BD, x_BD):
    return [
      jnp.zeros((n, d), _F32).at[idx_BK].add(a_BK[:, :, None] * b_BD[:, None])
      for a_BK, b_BD in ((vals_BK, g_BD), (grads_BK, x_BD))
    ]

  per_slot = (batch, k)
  return Probe(
    function,
    [
      (per_slot, _F32),
      (per_slot, _F32),
      (per_slot, _I32),
      ((batch, d), _F32),
      ((batch, d), _F32),
    ],
    {},
  )


def xla_adam_rows(d: int, n: int) -> Probe:
  """The optimiser's pass by XLA."""

  def function(*matrices):
    corrections = adam.corrections(jnp.int32(3), ADAM['b1'], ADAM['b2'])
    return adam_reference.adam_rows(
      *matrices, 1e-4, corrections, 1.0, None, **ADAM
    )

  return Probe(function, [((n, d), _F32)] * 5, {})

"""Rotary positions: their angles, and the rotation of pairs.

Source: RoFormer (arXiv:2104.09864); stretching by Llama 3.1's rule.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subject import architecture


def _stretch(
  rate_H: np.ndarray, scaling: architecture.RopeScaling
) -> np.ndarray:
  if scaling.kind == 'linear':
    return rate_H / scaling.factor
  if scaling.kind == 'factors':
    return rate_H / np.array(scaling.factors)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns_H = scaling.original_length * rate_H / (2 * math.pi)
  # A long wavelength makes few turns within the original length.
  blend_H = np.clip((turns_H - low) / (high - low), 0, 1)
  return (1 - blend_H) * rate_H / scaling.factor + blend_H * rate_H


def tables(
  config: architecture.TransformerConfig, n_positions: int
) -> tuple[np.ndarray, np.ndarray]:
  """cos and sin of the angles, float32 [kinds, n_positions, H].

  Kind 0 is for blocks without a window; kind 1, which exists with
  `local_rope_base`, for blocks with one. Computed in float64 on the host, since
  angles of far positions lose digits in float32.
  """
  width = config.rotary_dim or config.d_head

  def rates(base):
    return base ** (-np.arange(0, width, 2, dtype=np.float64) / width)

  kinds = [rates(config.rope_base)]
  if config.rope_scaling is not None:
    kinds[0] = _stretch(kinds[0], config.rope_scaling)
  if config.local_rope_base:
    kinds.append(rates(config.local_rope_base))
  angle = np.arange(n_positions)[None, :, None] * np.stack(kinds)[:, None]
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, pairs: str):
  """Rotates the first 2H coordinates of a head in pairs; keeps the rest.

  Args:
    x: [..., T, E].
    cos: cosines of the angles, [..., T, H], with as many axes as x.
    sin: sines of the angles, likewise.
    pairs: `TransformerConfig.rope_pairs`.
  """
  width = 2 * cos.shape[-1]
  turning, passing = x[..., :width], x[..., width:]
  if pairs == 'interleaved':
    pair_axis, a, b = -1, turning[..., 0::2], turning[..., 1::2]
  else:
    pair_axis, (a, b) = -2, jnp.split(turning, 2, axis=-1)
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=pair_axis)
  turned = turned.reshape(turning.shape).astype(x.dtype)
  if not passing.shape[-1]:
    return turned
  return jnp.concatenate([turned, passing], axis=-1)

"""Rows of unit norm, and gradients along them."""

import jax
import jax.numpy as jnp


def unit_rows(w_ND: jax.Array) -> jax.Array:
  """Rows divided by their norms; a zero row stays zero."""
  norm_N1 = jnp.linalg.norm(w_ND, axis=-1, keepdims=True)
  return w_ND / jnp.where(norm_N1 > 0, norm_N1, 1)


def project_rows(grad_ND: jax.Array, unit_ND: jax.Array) -> jax.Array:
  """The gradient without its component along each unit row.

  Args:
    grad_ND: gradient of the decoder.
    unit_ND: the decoder, rows of unit norm.

  Returns:
    g - <g, w> w by row: to first order a step along it keeps the norms, so
    that Adam's moments hold no motion that the renormalisation undoes.
  """
  return grad_ND - (grad_ND * unit_ND).sum(-1, keepdims=True) * unit_ND

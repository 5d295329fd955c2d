"""The optimiser's step of the decoder in plain jax.numpy and optax."""

import jax
import jax.numpy as jnp
import optax

from sae_jax.ops import rows


def squared_norm(p_ND: jax.Array, g_ND: jax.Array) -> jax.Array:
  """The squared norm of the projected gradient."""
  return optax.tree.norm(rows.project_rows(g_ND, p_ND), squared=True)


def adam_rows(
  p_ND,
  mu_ND,
  nu_ND,
  ema_ND,
  g_ND,
  rate,
  count,
  scale,
  only_if,
  *,
  b1,
  b2,
  eps,
  ema_decay,
):
  """See `api.adam_rows`."""
  old = (p_ND, mu_ND, nu_ND, ema_ND)
  g_ND = rows.project_rows(g_ND, p_ND)
  squares = optax.tree.norm(g_ND, squared=True)
  step_ND, adam = optax.scale_by_adam(b1, b2, eps).update(
    scale * g_ND, optax.ScaleByAdamState(count, mu_ND, nu_ND)
  )
  p_ND = rows.unit_rows(p_ND - (rate * step_ND).astype(p_ND.dtype))
  _, ema = optax.ema(ema_decay, debias=True).update(
    p_ND, optax.EmaState(count, ema_ND)
  )
  new = (p_ND, adam.mu, adam.nu, ema.ema)
  if only_if is not None:
    new = tuple(jnp.where(only_if, a, b) for a, b in zip(new, old))
  return *new, squares

"""The optimiser's step of the decoder in plain jax.numpy and optax."""

import jax
import optax

from sae_jax.ops import adam, rows


def squared_norm(
  p_ND: jax.Array, g_ND: jax.Array, project: bool = True
) -> jax.Array:
  """See `api.squared_norm`."""
  if project:
    g_ND = rows.project_rows(g_ND, p_ND)
  return optax.tree.norm(g_ND, squared=True)


def adam_rows(
  p_ND,
  mu_ND,
  nu_ND,
  ema_ND,
  g_ND,
  rate,
  corrections,
  scale,
  only_if,
  *,
  project=True,
  **settings,
):
  """See `api.adam_rows`."""
  if project:
    g_ND = rows.project_rows(g_ND, p_ND)
  new = adam.step(
    p_ND,
    mu_ND,
    nu_ND,
    ema_ND,
    g_ND,
    rate,
    corrections,
    scale,
    only_if,
    constrain=rows.unit_rows,
    **settings,
  )
  return *new, optax.tree.norm(g_ND, squared=True)

"""Causal attention of grouped queries."""

import functools
import math

import jax
import jax.numpy as jnp


def _attend_group(
  query_QTE: jax.Array,
  key_UE: jax.Array,
  value_UE: jax.Array,
  seen_TU: jax.Array,
  scale: float | jax.Array,
  softcap: float,
) -> jax.Array:
  """Attention of the query heads that share a key-value head."""
  scores_QTU = jnp.einsum(
    'QTE,UE->QTU', query_QTE, key_UE, preferred_element_type=jnp.float32
  )
  scores_QTU *= scale
  if softcap:
    scores_QTU = softcap * jnp.tanh(scores_QTU / softcap)
  scores_QTU = jnp.where(seen_TU[None], scores_QTU, -jnp.inf)
  weights_QTU = jax.nn.softmax(scores_QTU, axis=-1).astype(value_UE.dtype)
  return jnp.einsum('QTU,UE->QTE', weights_QTU, value_UE)


def attend(
  query_BGQTE: jax.Array,
  key_BGUE: jax.Array,
  value_BGUE: jax.Array,
  seen: jax.Array,
  scale: float | jax.Array,
  softcap: float = 0.0,
) -> jax.Array:
  """Weighted means of values, mixed_BGQTE.

  Args:
    query_BGQTE: queries.
    key_BGUE: keys.
    value_BGUE: values.
    seen: which key positions each query position attends to, at least one:
      boolean TU for all sequences, or BTU.
    scale: multiplies the scores.
    softcap: c of c tanh(score / c); 0 for none.
  """
  attend_group = functools.partial(_attend_group, scale=scale, softcap=softcap)
  if seen.ndim == 3:
    over_groups = jax.vmap(attend_group, in_axes=(0, 0, 0, None))
    return jax.vmap(over_groups)(query_BGQTE, key_BGUE, value_BGUE, seen)
  n_groups = math.prod(key_BGUE.shape[:2])
  groups = [
    x.reshape((n_groups, *x.shape[2:]))
    for x in (query_BGQTE, key_BGUE, value_BGUE)
  ]
  # On a CPU one group at a time stays in cache, which was faster end to end;
  # accelerators need the whole batch at once.
  out = jax.lax.platform_dependent(
    *groups,
    cpu=lambda *g: jax.lax.map(lambda group: attend_group(*group, seen), g),
    default=jax.vmap(lambda *g: attend_group(*g, seen)),
  )
  return out.reshape(query_BGQTE.shape)

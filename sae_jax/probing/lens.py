"""Decoder directions: the tokens they vote for, and nearest neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subject import Subject

# A TPU multiplies float32 in bfloat16 by default, which swaps near ties.
_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnums=2)
def _votes(params, w_ND, n_votes):
  unembed_VD = params.get('unembed', params['embed'])
  logits_NV = jnp.matmul(
    w_ND * params['final_norm'], unembed_VD.T, precision=_EXACT
  )
  logits_NV -= logits_NV.mean(-1, keepdims=True)
  up, up_ids = jax.lax.top_k(logits_NV, n_votes)
  down, down_ids = jax.lax.top_k(-logits_NV, n_votes)
  return up_ids, up, down_ids, -down


def votes(
  subject: Subject, w_dec_ND: np.ndarray, n_votes: int, chunk: int = 256
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Tokens that each decoder row pushes up and down most (logit lens).

  The row goes through the final norm's weights and the unembedding, as if no
  block lay between; the norm's data-dependent scale is left out and each row
  of logits has its mean over the vocabulary removed.

  Args:
    subject: the model.
    w_dec_ND: decoder rows.
    n_votes: tokens up, and as many down.
    chunk: rows at a time, which bounds the memory at chunk x V.

  Returns:
    up_ids, up_logits, down_ids, down_logits, each [N, n_votes], the strongest
    first.
  """
  head = {
    name: subject.params[name]
    for name in ('embed', 'unembed', 'final_norm')
    if name in subject.params
  }
  chunks = []
  for start in range(0, len(w_dec_ND), chunk):
    rows = np.asarray(w_dec_ND[start : start + chunk])
    fill = ((0, chunk - len(rows)), (0, 0))
    strongest = _votes(head, np.pad(rows, fill), n_votes)
    chunks.append([np.asarray(a)[: len(rows)] for a in strongest])
  up_ids, up, down_ids, down = (np.concatenate(a) for a in zip(*chunks))
  return up_ids, up, down_ids, down


@functools.partial(jax.jit, static_argnums=3)
def _nearest(unit_ND, rows_SD, first, count):
  cosine_SN = jnp.matmul(rows_SD, unit_ND.T, precision=_EXACT)
  own_S = first + jnp.arange(rows_SD.shape[0])
  itself_SN = own_S[:, None] == jnp.arange(unit_ND.shape[0])
  cosines, ids = jax.lax.top_k(jnp.where(itself_SN, -2, cosine_SN), count)
  return ids, cosines


def neighbours(
  w_dec_ND: np.ndarray, count: int, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
  """The latents with the most similar decoder rows.

  Args:
    w_dec_ND: decoder rows.
    count: neighbours of each, fewer than N.
    chunk: rows at a time, which bounds the memory at chunk x N.

  Returns:
    ids and cosines, each [N, count], the nearest first, never itself.
  """
  norm_N1 = np.linalg.norm(w_dec_ND, axis=1, keepdims=True)
  unit_ND = jnp.asarray(w_dec_ND / np.where(norm_N1 > 0, norm_N1, 1))
  chunks = []
  for start in range(0, len(unit_ND), chunk):
    nearest = _nearest(unit_ND, unit_ND[start : start + chunk], start, count)
    chunks.append([np.asarray(a) for a in nearest])
  ids, cosines = (np.concatenate(a) for a in zip(*chunks))
  return ids, cosines

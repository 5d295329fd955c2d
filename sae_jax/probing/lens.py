"""Decoder directions: the tokens they vote for, and nearest neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subject import capture, Subject

# A TPU multiplies float32 in bfloat16 by default, which swaps near ties.
_EXACT = jax.lax.Precision.HIGHEST

# Matrix that puts a site's activations into the stream, of those it has one.
_OUTPUT = {'z': 'attn_out', 'mlp_act': 'down'}
# What a block's output is normed by before it is added, where it is.
_POST_NORM = {
  'z': 'attn_post_norm',
  'attn_raw': 'attn_post_norm',
  'mlp_act': 'ffn_post_norm',
  'mlp_raw': 'ffn_post_norm',
}
# What is read from the stream, and reaches it only by way of a softmax or a
# nonlinearity: its directions have no logits.
_WITHOUT_VOTES = ('attn_in', 'q', 'k', 'v', 'mlp_in')


def has_votes(site: capture.Site) -> bool:
  """Whether a row at the site is in the stream, or a matrix puts it there."""
  return site.name not in _WITHOUT_VOTES


def _normed(config, weight_D, w_ND):
  """A norm without the scale and the bias that depend on no row."""
  if config.norm == 'layer':
    w_ND -= w_ND.mean(-1, keepdims=True)
  return w_ND * weight_D


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, site, params, w_ND):
  """What each row adds to the logits, as far as it is linear."""
  blocks = params['blocks']
  if site.name in _OUTPUT:
    matrix_JD = blocks[_OUTPUT[site.name]][site.block]
    w_ND = jnp.matmul(w_ND, matrix_JD, precision=_EXACT)
  if config.post_norms and site.name in _POST_NORM:
    w_ND = _normed(config, blocks[_POST_NORM[site.name]][site.block], w_ND)
  if site.name != 'final_norm':
    w_ND = _normed(config, params['final_norm'], w_ND)
  unembed_VD = params.get('unembed', params['embed'])
  return jnp.matmul(w_ND, unembed_VD.T, precision=_EXACT)


@functools.partial(jax.jit, static_argnums=2)
def _strongest(logits_NV, is_token_V, n_votes):
  mean_N1 = logits_NV.mean(-1, keepdims=True, where=is_token_V)
  logits_NV -= mean_N1
  up, up_ids = jax.lax.top_k(
    jnp.where(is_token_V, logits_NV, -jnp.inf), n_votes
  )
  down, down_ids = jax.lax.top_k(
    jnp.where(is_token_V, -logits_NV, -jnp.inf), n_votes
  )
  return up_ids, up, down_ids, -down


def tokens_of(subject: Subject) -> np.ndarray:
  """Which rows of the embedding have a token: bool [V].

  Some models pad their embedding with rows that no text reaches.
  """
  ids = np.fromiter(subject.tokenizer.get_vocab().values(), np.int64)
  is_token_V = np.zeros(subject.config.vocab_size, bool)
  is_token_V[ids[ids < len(is_token_V)]] = True
  return is_token_V


def votes(
  subject: Subject,
  site: capture.Site,
  w_dec_ND: np.ndarray,
  n_votes: int,
  chunk: int = 256,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Tokens that each decoder row pushes up and down most (logit lens).

  The row goes through the final norm (its centring, if it has one, and its
  weights) and the unembedding, as if no block lay between. A row at a
  feed-forward's or a head's hidden activations first goes through the matrix,
  and the norm if there is one, that adds them to the stream. Norms'
  data-dependent scales are left out. Rows of the embedding that have no token
  take no part, and each row of logits has its mean over the tokens removed.

  Args:
    subject: the model.
    site: where the rows are directions; see `has_votes`.
    w_dec_ND: decoder rows.
    n_votes: tokens up, and as many down; fewer where there are fewer tokens.
    chunk: rows at a time, which bounds the memory at chunk x V.

  Returns:
    up_ids, up_logits, down_ids, down_logits, each [N, n_votes], the strongest
    first. At a site without votes all ids are -1 and all logits 0.
  """
  is_token_V = tokens_of(subject)
  n_votes = min(n_votes, int(is_token_V.sum()))
  if not has_votes(site):
    ids = np.full((len(w_dec_ND), n_votes), -1)
    return ids, np.zeros(ids.shape), ids, np.zeros(ids.shape)
  chunks = []
  for start in range(0, len(w_dec_ND), chunk):
    rows = np.asarray(w_dec_ND[start : start + chunk])
    fill = ((0, chunk - len(rows)), (0, 0))
    logits_NV = _logits(
      subject.config, site, subject.params, np.pad(rows, fill)
    )
    strongest = _strongest(logits_NV, is_token_V, n_votes)
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

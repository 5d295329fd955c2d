"""`autoencode` by kernels, with a hand-written backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops import chip, pairs, scopes, varying
from sae_jax.ops.decode import blocks as blocks_lib
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.dense import matmul
from sae_jax.ops.encode_topk import exact
from sae_jax.ops.top_k import api as top_k_api
from sae_jax.ops.weight_grad import kernel as weight_grad_kernel


def autoencode(
  x_BD,
  w_enc_ND,
  b_lat_N,
  w_dec_ND,
  ks,
  b_pre_D,
  mask_N,
  axis,
  dtype,
  candidates,
  recall,
  tally_N,
):
  """See `autoencode.api`; returns what its `Coded` holds, in that order."""
  x_BD = varying.match(x_BD, w_enc_ND)
  if tally_N is None:
    tally_N = jnp.zeros_like(b_lat_N)
  others = (b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, tally_N)
  others = (varying.match(a, x_BD) for a in others)
  static = ks, axis, dtype, candidates, recall
  return _autoencode(*static, mask_N, x_BD, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _autoencode(ks, axis, dtype, candidates, recall, mask_N, *arrays):
  return _forward(ks, axis, dtype, candidates, recall, mask_N, *arrays)[0]


def _forward(
  ks,
  axis,
  dtype,
  candidates,
  recall,
  mask_N,
  x_BD,
  b_pre_D,
  w_enc_ND,
  b_lat_N,
  w_dec_ND,
  tally_N,
):
  del tally_N
  batch = x_BD.shape[0]
  most = min(ks[-1], w_enc_ND.shape[0])
  centred_BD = x_BD - b_pre_D
  with jax.named_scope(scopes.ENCODER):
    found_BK, idx_BK, failed_B, recall = exact.encode_topk(
      centred_BD,
      w_enc_ND,
      b_lat_N,
      mask_N,
      min(most, candidates or most),
      dtype,
      recall=recall,
    )
  width = found_BK.shape[1]
  codes, exhausted = [], varying.zeros((), bool, found_BK)
  for k in ks:
    won_B = top_k_api.winners(found_BK[:, :k], axis, k, kernels=True)
    if width < min(k, most):
      exhausted |= (won_B == width).any()
    won_BK = jnp.arange(min(k, width)) < won_B[:, None]
    codes.append(jnp.where(won_BK, jax.nn.relu(found_BK[:, :k]), 0))
  # Of the codes for the greatest k the others are the first in each row.
  sharded = axis is not None and jax.lax.axis_size(axis) > 1
  expected = _expected(batch, ks, width, axis)
  tokens = decode_tiles.block_tokens(
    batch, x_BD.shape[1], width, expected / (batch * width)
  )
  blocks = pairs.blocks(codes[-1], idx_BK, tokens, pack=sharded)
  if width < most:
    # What exhausts the candidates is done again in any case.
    slots = _slots(blocks, expected)
    exhausted |= (blocks.count_G > slots).any()
    blocks = blocks.some(0, slots)
  inside = tuple(_inside(blocks, vals_BK) for vals_BK in codes[:-1])
  sums = functools.partial(
    jax.named_scope(scopes.DECODER)(blocks_lib.sums),
    blocks,
    w_ND=w_dec_ND,
    batch=batch,
    dtype=dtype,
    expected=expected,
  )
  models = tuple(
    sums(jnp.where(chosen_GR, blocks.vals_GR, 0)) for chosen_GR in inside
  )
  models += (sums(blocks.vals_GR),)
  first = codes[0]
  out = (
    first,
    idx_BK[:, : first.shape[1]],
    models,
    failed_B.mean(dtype=x_BD.dtype),
    exhausted,
    varying.match(jnp.asarray(recall, x_BD.dtype), found_BK),
  )
  saved = mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, blocks, inside
  return out, saved


def _expected(batch, ks, width, axis):
  """Active pairs of a shard, if each has its share of the winners."""
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  return min(batch * width, -(-batch * ks[-1] // shards))


def _slots(blocks, expected):
  """How many of each block's slots to look at, at a time."""
  n_slots = blocks.vals_GR.shape[0] * blocks.tokens * blocks.k
  return pairs.slots(blocks.tokens, blocks.k, expected / n_slots)


def _inside(blocks, vals_BK):
  """Which of the pairs are active in the codes of a lesser k."""
  active_B = (vals_BK != 0).sum(1, dtype=jnp.int32)
  active_GT = pairs.pad_tokens(active_B, blocks.tokens).reshape(
    -1, blocks.tokens
  )
  least_GR = jnp.take_along_axis(active_GT, blocks.token_GR, axis=1)
  return blocks.place_GR % blocks.k < least_GR


def _backward(ks, axis, dtype, candidates, recall, saved, cotangents):
  del candidates, recall
  mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, blocks, inside = saved
  gs = cotangents[2]
  batch, n_latents = x_BD.shape[0], w_enc_ND.shape[0]
  # ReLU: pairs that are not active have no gradient.
  chosen = [(g_BD, mask) for g_BD, mask in zip(gs, inside)]
  chosen.append((gs[-1], blocks.vals_GR != 0))
  expected = _expected(batch, ks, blocks.k, axis)
  grads_GR = sum(
    jnp.where(
      mask_GR, blocks_lib.products(blocks, g_BD, w_dec_ND, dtype, expected), 0
    )
    for g_BD, mask_GR in chosen
  )
  vals = [jnp.where(mask_GR, blocks.vals_GR, 0) for _, mask_GR in chosen]
  (dec_ND, enc_ND), (used_N, bias_N) = _weight_grads(
    blocks, grads_GR, vals, gs, x_BD - b_pre_D, n_latents, dtype, expected
  )
  return (
    None if mask_N is None else np.zeros(mask_N.shape, jax.dtypes.float0),
    blocks_lib.sums(blocks, grads_GR, w_enc_ND, batch, dtype, expected).astype(
      x_BD.dtype
    ),
    -matmul(bias_N, w_enc_ND).astype(b_pre_D.dtype),
    enc_ND.astype(w_enc_ND.dtype),
    bias_N.astype(b_lat_N.dtype),
    dec_ND.astype(w_dec_ND.dtype),
    used_N.astype(b_lat_N.dtype),
  )


def _weight_grads(
  blocks, grads_GR, vals, gs, centred_BD, n_latents, dtype, expected
):
  """Gradients of decoder and encoder, and the sums of their weights."""
  slots = _slots(blocks, expected)

  def of_some(start):
    count, latent_P, token_P, enc_P, *decs = pairs.by_latent(
      blocks.some(start, slots),
      n_latents,
      *(pairs.window(a, start, slots) for a in (grads_GR, *vals)),
    )
    sums = functools.partial(
      weight_grad_kernel.segment_sums,
      latent_P,
      token_P,
      n_latents=n_latents,
      count=count,
      expected=expected,
      dtype=dtype,
      interpret=chip.interpret(),
    )
    (dec_ND, enc_ND), (used_N, bias_N) = sums(
      (decs[-1], enc_P), (gs[-1], centred_BD)
    )
    # Of the least k, the first, in the end.
    for dec_P, g_BD in zip(reversed(decs[:-1]), reversed(gs[:-1])):
      (more_ND,), (used_N,) = sums((dec_P,), (g_BD,))
      dec_ND += more_ND
    return (dec_ND, enc_ND), (used_N, bias_N)

  found = of_some(0)
  if slots == blocks.vals_GR.shape[1]:
    return found

  # A sort of all slots would take longer by their number and more, few of which
  # are real, and the compiler minutes.
  def add(carry):
    start, found = carry
    return start + slots, jax.tree.map(jnp.add, found, of_some(start))

  start = varying.match(jnp.int32(slots), blocks.count_G)
  _, found = jax.lax.while_loop(
    lambda carry: carry[0] < blocks.count_G.max(), add, (start, found)
  )
  return found


_autoencode.defvjp(_forward, _backward)

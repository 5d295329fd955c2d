"""`autoencode` by kernels, with a hand-written backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops import chip, pairs, scopes, varying
from sae_jax.ops.autoencode.coded import Coded, How
from sae_jax.ops.decode import blocks as blocks_lib
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.dense import matmul
from sae_jax.ops.encode_topk import exact
from sae_jax.ops.top_k import api as top_k_api
from sae_jax.ops.weight_grad import kernel as weight_grad_kernel


def autoencode(
  how: How, x_BD, w_enc_ND, b_lat_N, w_dec_ND, b_pre_D, mask_N, tally_N
) -> Coded:
  """See `autoencode.api`."""
  x_BD = varying.match(x_BD, w_enc_ND)
  if tally_N is None:
    tally_N = jnp.zeros_like(b_lat_N)
  others = (b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, tally_N)
  others = (varying.match(a, x_BD) for a in others)
  return _autoencode(how, mask_N, x_BD, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _autoencode(how, mask_N, *arrays):
  return _forward(how, mask_N, *arrays)[0]


def _forward(how, mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, tally_N):
  # Only its cotangent is of use, see `_backward`.
  del tally_N
  batch, ks = x_BD.shape[0], how.ks
  widest = min(ks[-1], w_enc_ND.shape[0])
  with jax.named_scope(scopes.ENCODER):
    offered_BK, idx_BK, failed_B, recall = exact.encode_topk(
      x_BD - b_pre_D,
      w_enc_ND,
      b_lat_N,
      mask_N,
      min(widest, how.candidates or widest),
      how.dtype,
      recall=how.recall,
    )
  width = offered_BK.shape[1]

  # Each list is in descending order, so that what wins of it is a prefix and
  # shards need not tell each other more than its length. A list that is won
  # whole may have been cut short of more winners: that is what a second look
  # is for (`retry`). With as many candidates as winners it cannot happen.
  codes, exhausted = [], varying.zeros((), bool, offered_BK)
  for k in ks:
    won_B = top_k_api.winners(offered_BK[:, :k], how.axis, k, kernels=True)
    if width < min(k, widest):
      exhausted |= (won_B == width).any()
    won_BK = jnp.arange(min(k, width)) < won_B[:, None]
    codes.append(jnp.where(won_BK, jax.nn.relu(offered_BK[:, :k]), 0))

  # One set of pairs serves all ks: in each row the codes for a lesser k are the
  # first of those for the greatest. On one shard nearly every slot is active;
  # on many most are not, and packing them to the front lets the decoder's
  # kernel pass over the rest.
  sharded = how.shards > 1
  expected = _expected(how, batch, width)
  tokens = decode_tiles.block_tokens(
    batch, x_BD.shape[1], width, expected / (batch * width)
  )
  blocks = pairs.blocks(codes[-1], idx_BK, tokens, pack=sharded)
  if width < widest:
    # With few candidates a block keeps as many slots as it is likely to need,
    # not all: they are saved for the backward pass. A block that is fuller has
    # lost pairs, which counts as exhausted, and is done again in any case.
    slots = _slots(blocks, expected)
    exhausted |= (blocks.count_G > slots).any()
    blocks = blocks.cut(0, slots)
  inside = tuple(_inside(blocks, vals_BK) for vals_BK in codes[:-1])

  sums = functools.partial(
    jax.named_scope(scopes.DECODER)(blocks_lib.sums),
    blocks,
    w_ND=w_dec_ND,
    batch=batch,
    dtype=how.dtype,
    expected=expected,
  )
  models = tuple(
    sums(jnp.where(chosen_GR, blocks.vals_GR, 0)) for chosen_GR in inside
  )
  models += (sums(blocks.vals_GR),)
  first_BK = codes[0]
  coded = Coded(
    vals_BK=first_BK,
    idx_BK=idx_BK[:, : first_BK.shape[1]],
    models=models,
    failed=failed_B.mean(dtype=x_BD.dtype),
    exhausted=exhausted,
    recall=varying.match(jnp.asarray(recall, x_BD.dtype), offered_BK),
  )
  # Neither codes nor candidates: the pairs hold all that is active.
  saved = mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, blocks, inside
  return coded, saved


def _expected(how, batch, width):
  """Active pairs of a shard, if each has its share of the winners."""
  return min(batch * width, -(-batch * how.ks[-1] // how.shards))


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


def _backward(how, saved, cotangents):
  mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, w_dec_ND, blocks, inside = saved
  gs, dtype = cotangents.models, how.dtype
  batch, n_latents = x_BD.shape[0], w_enc_ND.shape[0]
  # ReLU: pairs that are not active have no gradient.
  chosen = [(g_BD, mask) for g_BD, mask in zip(gs, inside)]
  chosen.append((gs[-1], blocks.vals_GR != 0))
  expected = _expected(how, batch, blocks.k)
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

  def of_window(start):
    count, latent_P, token_P, enc_P, *decs = pairs.by_latent(
      blocks.cut(start, slots),
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
    # Largest k first, so that `used_N` is that of the first k in the end.
    for dec_P, g_BD in zip(reversed(decs[:-1]), reversed(gs[:-1])):
      (of_k_ND,), (used_N,) = sums((dec_P,), (g_BD,))
      dec_ND += of_k_ND
    return (dec_ND, enc_ND), (used_N, bias_N)

  total = of_window(0)
  if slots == blocks.vals_GR.shape[1]:
    return total

  # One sort of all slots, few of which are real, would take longer by more than
  # their number, and minutes to compile.
  def add(carry):
    start, total = carry
    return start + slots, jax.tree.map(jnp.add, total, of_window(start))

  start = varying.match(jnp.int32(slots), blocks.count_G)
  _, total = jax.lax.while_loop(
    lambda carry: carry[0] < blocks.count_G.max(), add, (start, total)
  )
  return total


_autoencode.defvjp(_forward, _backward)

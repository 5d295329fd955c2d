"""Programs whose cycles the TPU compiler can estimate, one for each question.

Its estimate is right for straight code, for a grid, and for one loop of known
length within it. So numbers that depend on data in training are constants here
(how many slots of a block are real, which pairs belong to which block of
latents), and of nested loops a program has only the inner one. The difference
of two sizes of one program is the cost of one more block, chunk or row; `costs`
adds them up.
"""

import contextlib
import dataclasses
import functools
import math
from unittest import mock

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from experiments.kernels.xla import ADAM, Probe
from sae_jax.ops import chip, pairs, row_copies, sorting_network
from sae_jax.ops.adam_rows import kernel as adam_kernel
from sae_jax.ops.chip import LANES, SUBLANES
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.encode_topk import exact as encode_exact
from sae_jax.ops.encode_topk import kernel as encode_kernel
from sae_jax.ops.encode_topk import reference as encode_reference
from sae_jax.ops.encode_topk import tiles as encode_tiles
from sae_jax.ops.weight_grad import kernel as grad_kernel
from sae_jax.ops.weight_grad import tiles as grad_tiles

_F32, _BF16, _I32 = jnp.float32, jnp.bfloat16, jnp.int32


def encode_bodies(batch: int, d: int, n: int, k: int, blocks: int) -> Probe:
  """The encoder's kernel of a shape on `blocks` blocks of two basic blocks.

  A basic block of the kernel works on a part of the bins and of the tokens, and
  its cost does not depend on the number of others. Whole blocks would not
  always fit, since the estimate counts VMEM twice.
  """
  tiles = encode_tiles.choose(batch, d, n, k, _BF16)
  bins = tiles.rows // tiles.depth * tiles.unrolled
  part = dataclasses.replace(tiles, bins=bins, tokens=2 * tiles.lanes)
  rows, cores = bins * tiles.depth, chip.cores()
  shapes = ((cores * part.tokens, d), (blocks * rows, d), (blocks * rows,))
  unit = min(pl.next_power_of_2(k), _steps_unit(tiles))
  again = encode_tiles.failing_share(k, tiles.bins, tiles.kept)
  again += encode_tiles.grouped_share(n, k, tiles.group)
  return Probe(
    functools.partial(
      encode_kernel.encode_topk, k=SUBLANES, tiles=part, dtype=_BF16
    ),
    [(shapes[0], _BF16), (shapes[1], _BF16), (shapes[2], _F32)],
    {
      'tokens': tiles.tokens,
      'rows': tiles.bins * tiles.depth,
      'bodies': tiles.bins // bins * tiles.tokens // tiles.lanes,
      'bodies_of_block': 2,
      'cores': cores,
      'bins': tiles.bins,
      'kept': tiles.kept,
      'group': tiles.group,
      'passes': math.ceil(again * batch / encode_exact.REDO_TOKENS),
      'select_units': -(-tiles.kept * tiles.bins // SUBLANES // unit),
      'select_unit': unit,
    },
  )


def _steps_unit(tiles):
  return pl.next_power_of_2(tiles.kept * tiles.bins // SUBLANES)


def encode_whole(batch: int, d: int, n: int, k: int, kernel: int) -> Probe:
  """The exact encoder of a shape, with the kernel or as XLA does it."""
  encode = encode_exact.encode_topk if kernel else encode_reference.encode_topk

  def function(x_BD, w_ND, b_N):
    return encode(x_BD, w_ND, b_N, None, k, _BF16)[:2]

  return Probe(function, [((batch, d), _F32), ((n, d), _F32), ((n,), _F32)], {})


def encode_again(d: int, n: int, k: int) -> Probe:
  """A pass for tokens that the encoder's kernel could not vouch for."""

  def function(x_BD, w_ND, b_N):
    return encode_reference.encode_topk(
      x_BD, w_ND, b_N, None, k, _BF16, kernels=True
    )

  x_BD = ((encode_exact.REDO_TOKENS, d), _F32)
  return Probe(function, [x_BD, ((n, d), _BF16), ((n,), _F32)], {})


def select_units(k: int, unit: int, units: int) -> Probe:
  """The last selection of 128 tokens, from lists of `units` units."""
  candidates = unit * units * SUBLANES
  steps = SUBLANES * sorting_network.scratch_steps(candidates, k)

  def body(vals_ref, idx_ref, out_vals, out_idx, vals_scratch, idx_scratch):
    vals_scratch[:candidates] = vals_ref[...]
    idx_scratch[:candidates] = idx_ref[...]
    sorting_network.top_k(
      vals_scratch, idx_scratch, candidates, k, out_vals, out_idx
    )

  def function(vals, idx):
    return pl.pallas_call(
      body,
      out_shape=[
        jax.ShapeDtypeStruct((k, LANES), kind) for kind in (_F32, _I32)
      ],
      scratch_shapes=[
        pltpu.VMEM((steps, LANES), kind) for kind in (_F32, _I32)
      ],
      name='select',
    )(vals, idx)

  shape = candidates, LANES
  return Probe(function, [(shape, _F32), (shape, _I32)], {})


@contextlib.contextmanager
def _all_real(layout, real):
  """Gives every chunk of a row kernel the same number of rows."""
  real = max(1, round(real / layout.chunks))

  def count(counts_ref, chunk, exists):
    del counts_ref, chunk
    return jnp.where(exists, real, 0)

  with (
    mock.patch.object(decode_kernel, '_count', count),
    _plain_products(decode_kernel),
  ):
    yield


def slots(batch: int, d: int, k: int, active: float) -> int:
  """Pairs that are sorted, real or not."""
  tokens = decode_tiles.block_tokens(batch, d, k, active)
  return -(-batch // tokens) * pairs.slots(tokens, k, active)


def _unmasked(product, a, *others):
  """A product whose factor the compiler does not recognise as a selection.

  It would fold a selection into the product's own mask, which the estimate's
  type check refuses for bfloat16. The `minimum` costs next to nothing: one
  comparison for each register of the factor.
  """
  return product(jnp.minimum(a, jnp.finfo(a.dtype).max), *others)


def _plain_products(module):
  """Changes a kernel's products so that the compiler can estimate them."""
  product = functools.partial(_unmasked, row_copies.multiply)
  return mock.patch.object(module, 'multiply', product)


def gather(
  kind: str, batch: int, d: int, n: int, k: int, active: float, blocks: int
) -> Probe:
  """`gather_sum` or `sampled_products` over `blocks` blocks of tokens.

  Or 'row_copies', which is `gather_sum` without its sums. With 0 blocks the
  kernel is as it is in use, over all tokens.
  """
  tokens = decode_tiles.block_tokens(batch, d, k, active)
  known, real = blocks > 0, tokens * k * active
  blocks = blocks or -(-batch // tokens)
  slots = pairs.slots(tokens, k, active)
  layout = decode_tiles.choose(blocks, slots, d, tokens)

  def function(rows, token, weights, count, g_BD, w_ND):
    common = {'block_tokens': tokens, 'dtype': _BF16}
    with _all_real(layout, real) if known else contextlib.nullcontext():
      if kind == 'sampled_products':
        return decode_kernel.sampled_products(
          rows, token, count, g_BD, w_ND, **common
        )
      copies = mock.patch.object(decode_kernel, '_sum_part', lambda *_: None)
      with copies if kind == 'row_copies' else contextlib.nullcontext():
        return decode_kernel.gather_sum(
          rows, token, weights, count, w_ND, **common
        )

  per_slot = (blocks, slots)
  return Probe(
    function,
    [
      (per_slot, _I32),
      (per_slot, _I32),
      (per_slot, _F32),
      ((blocks,), _I32),
      ((blocks * tokens, d), _F32),
      ((n, d), _F32),
    ],
    {'tokens': tokens, 'slots': layout.slots, 'chunks': layout.chunks},
  )


class _Every:
  """The list 0, ..., 0, 1, ..., 1, 2, ... of runs of `per` equal numbers."""

  def __init__(self, per: int):
    self._per = per

  def __getitem__(self, place):
    return place // self._per


class _Bounds:
  """A list of known numbers that takes a traced index."""

  def __init__(self, values: list[int]):
    self._values = values

  def __getitem__(self, place):
    picked = jnp.int32(self._values[0])
    for i, value in enumerate(self._values[1:], 1):
      picked = jnp.where(place >= i, value, picked)
    return picked


def segment_sums(
  batch: int, d: int, n: int, k: int, active: float, chunks: int
) -> Probe:
  """Both weight gradients over `chunks` chunks of pairs, spread evenly.

  Every chunk of pairs has equally many blocks of latents, or every block
  equally many chunks. With 0 chunks the kernel is as it is in use, over all
  pairs.
  """
  expected, n_pairs = round(batch * k * active), slots(batch, d, k, active)
  packed = grad_tiles.packs(expected, batch)
  layout = grad_tiles.choose(n_pairs, expected, n, d, 2, 1 if packed else 2)
  real_chunks = -(-expected // layout.pairs)
  n_blocks = -(-n // layout.latents)
  blocks_of_chunk = max(1, round(n_blocks / real_chunks))
  chunks_of_block = max(1, round(real_chunks / n_blocks))
  n_items = chunks * blocks_of_chunk
  blocks = n_items // chunks_of_block
  parts = layout.pairs // row_copies.PART
  bounds = [0, n_items]
  if layout.cores == 2:
    bounds.insert(1, n_items // 2)

  def items(*_):
    zeros = jnp.zeros(n_items, _I32)
    return real_items(zeros[:1], np.array(bounds), zeros, zeros, zeros)

  real_items = grad_kernel.Items

  class Known(real_items):
    """The same items, known to the compiler."""

    def __new__(cls, count, _, *others):
      del others
      return real_items(
        count,
        _Bounds(bounds),
        _Every(blocks_of_chunk),
        _Every(chunks_of_block),
        None,
      )

    def __init__(self, *_):
      pass

  def span(items, layout, chunk, block):
    del items, layout, chunk
    if blocks_of_chunk == 1:
      return 0, parts
    # A block's pairs begin and end within a part, as a rule.
    place = block % blocks_of_chunk
    first = place * parts // blocks_of_chunk
    stop = ((place + 1) * parts - 1) // blocks_of_chunk + 1
    return first, stop

  def function(latent, row, enc, dec, g_BD, x_BD):
    with (
      mock.patch.object(grad_kernel, '_items', items),
      mock.patch.object(grad_kernel, 'Items', Known),
      mock.patch.object(
        grad_kernel,
        '_count',
        lambda items, layout, chunk, counts: jnp.where(counts, layout.pairs, 0),
      ),
      mock.patch.object(grad_kernel, '_span', span),
      _plain_products(grad_kernel),
      mock.patch.object(grad_kernel.tiles, 'choose', lambda *_: layout),
    ):
      Known._fields = real_items._fields
      return grad_kernel.segment_sums(
        latent,
        row,
        (dec, enc),
        (g_BD, x_BD),
        blocks * layout.latents,
        jnp.int32(0),
        dtype=_BF16,
        expected=expected,
      )

  def whole(latent, row, enc, dec, g_BD, x_BD):
    return grad_kernel.segment_sums(
      latent,
      row,
      (dec, enc),
      (g_BD, x_BD),
      n,
      jnp.int32(0),
      dtype=_BF16,
      expected=expected,
    )

  per_pair = (chunks * layout.pairs or n_pairs,)
  return Probe(
    function if chunks else whole,
    [
      (per_pair, _I32),
      (per_pair, _I32),
      (per_pair, _F32),
      (per_pair, _F32),
      ((batch, d), _F32),
      ((batch, d), _F32),
    ],
    {
      'pairs': layout.pairs,
      'latents': layout.latents,
      'packed': float(packed),
      'chunks': real_chunks,
      'blocks': n_blocks,
      'blocks_of_chunk': blocks_of_chunk,
      'chunks_of_block': chunks_of_block,
    },
  )


def pair_sort(batch: int, d: int, k: int, active: float) -> Probe:
  """XLA's sort of all candidates by latent, with token and both values."""

  def function(latent, token, grads, vals):
    return jax.lax.sort(
      (latent, token, grads, vals), num_keys=2, is_stable=False
    )

  kinds = (_I32, _I32, _F32, _F32)
  n_pairs = slots(batch, d, k, active)
  return Probe(function, [((n_pairs,), kind) for kind in kinds], {})


def adam_rows(d: int, n: int) -> Probe:
  """The optimiser's pass over n rows."""

  def function(scalars, *matrices):
    return adam_kernel.adam_rows(scalars, *matrices, guarded=False, **ADAM)

  return Probe(function, [((5,), _F32), *[((n, d), _F32)] * 5], {})


def nested(outer: int, inner: int) -> Probe:
  """A loop inside of a loop, which the estimate counts too few times."""

  def body(x_ref, out_ref):
    out_ref[...] = x_ref[...]

    def once(i, carry):
      out_ref[...] = out_ref[...] * 1.5 + x_ref[...]
      return carry

    def again(i, carry):
      return jax.lax.fori_loop(0, inner, once, carry)

    jax.lax.fori_loop(0, outer, again, 0)

  shape = (SUBLANES, LANES)
  return Probe(
    lambda x: pl.pallas_call(
      body, out_shape=jax.ShapeDtypeStruct(shape, _F32), name='nested'
    )(x),
    [(shape, _F32)],
    {},
  )

"""Programs whose cycles the TPU compiler can estimate, one for each question.

Its estimate is right for straight code, for a grid, and for one loop of known
length within it. So what is data in training is made constant here (how many
slots of a block are real, which pairs belong to which block of latents), and
where loops are nested a program holds the inner one alone. The difference of
two sizes of one program is what one more of something costs; `costs`
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
  """The encoder's kernel of a shape, with two basic blocks to so many blocks.

  A basic block of the kernel is for some of the bins and some of the tokens,
  and what it costs does not depend on how many more there are; but the
  estimate counts VMEM twice, so that whole blocks would not always fit.
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
  """The last selection of 128 tokens, from lists of so many units."""
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
def _all_real(plan, real):
  """Every chunk of a row kernel has the same number of rows."""
  real = max(1, round(real / plan.chunks))

  def count(counts_ref, chunk, exists):
    del counts_ref, chunk
    return jnp.where(exists, real, 0)

  with (
    mock.patch.object(decode_kernel, '_count', count),
    _plain_products(decode_kernel),
  ):
    yield


def slots(batch: int, d: int, k: int, active: float) -> int:
  """Pairs that are looked at, real or not."""
  tokens = decode_tiles.block_tokens(batch, d, k, active)
  return -(-batch // tokens) * pairs.slots(tokens, k, active)


def _unmasked(product, a, *others):
  """A product whose factor is no selection, as far as the compiler knows.

  It folds one into the product's own mask, which the estimate's type check
  refuses for bfloat16. A comparison for each of the factor's registers is next
  to nothing.
  """
  return product(jnp.minimum(a, jnp.finfo(a.dtype).max), *others)


def _plain_products(module):
  """Makes a kernel's products such that there is an estimate of them."""
  product = functools.partial(_unmasked, row_copies.multiply)
  return mock.patch.object(module, 'multiply', product)


def gather(
  kind: str, batch: int, d: int, n: int, k: int, active: float, blocks: int
) -> Probe:
  """`gather_sum` or `sampled_products` over so many blocks of tokens.

  Or 'row_copies', the former without its sums. Without a number the kernel as
  it is, over all tokens.
  """
  tokens = decode_tiles.block_tokens(batch, d, k, active)
  known, real = blocks > 0, tokens * k * active
  blocks = blocks or -(-batch // tokens)
  slots = pairs.slots(tokens, k, active)
  plan = decode_tiles.plan(blocks, slots, d, tokens)

  def function(rows, token, weights, count, g_BD, w_ND):
    common = {'block_tokens': tokens, 'dtype': _BF16}
    with _all_real(plan, real) if known else contextlib.nullcontext():
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
    {'tokens': tokens, 'slots': plan.slots, 'chunks': plan.chunks},
  )


class _Every:
  """The list in which `per` neighbours are one chunk, or one block."""

  def __init__(self, per: int):
    self._per = per

  def __getitem__(self, place):
    return place // self._per


class _Bounds:
  """Known numbers, by an index that need not be."""

  def __init__(self, values: list[int]):
    self._values = values

  def __getitem__(self, place):
    found = jnp.int32(self._values[0])
    for i, value in enumerate(self._values[1:], 1):
      found = jnp.where(place >= i, value, found)
    return found


def segment_sums(
  batch: int, d: int, n: int, k: int, active: float, chunks: int
) -> Probe:
  """Both weight gradients over so many chunks of pairs, spread evenly.

  A chunk of pairs has some blocks of latents, or a block some chunks. Without
  a number the kernel as it is, over all pairs.
  """
  expected, n_pairs = round(batch * k * active), slots(batch, d, k, active)
  packed = grad_tiles.packs(expected, batch)
  plan = grad_tiles.plan(n_pairs, expected, n, d, 2, 1 if packed else 2)
  real_chunks = -(-expected // plan.pairs)
  n_blocks = -(-n // plan.latents)
  blocks_of_chunk = max(1, round(n_blocks / real_chunks))
  chunks_of_block = max(1, round(real_chunks / n_blocks))
  n_items = chunks * blocks_of_chunk
  blocks = n_items // chunks_of_block
  parts = plan.pairs // row_copies.PART
  bounds = [0, n_items]
  if plan.cores == 2:
    bounds.insert(1, n_items // 2)

  def items(*_):
    some = jnp.zeros(n_items, _I32)
    return real_items(some[:1], np.array(bounds), some, some, some)

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

  def span(items, plan, chunk, block):
    del items, plan, chunk
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
        lambda items, plan, chunk, counts: jnp.where(counts, plan.pairs, 0),
      ),
      mock.patch.object(grad_kernel, '_span', span),
      _plain_products(grad_kernel),
      mock.patch.object(grad_kernel.tiles, 'plan', lambda *_: plan),
    ):
      Known._fields = real_items._fields
      return grad_kernel.segment_sums(
        latent,
        row,
        (dec, enc),
        (g_BD, x_BD),
        blocks * plan.latents,
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

  per_pair = (chunks * plan.pairs or n_pairs,)
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
      'pairs': plan.pairs,
      'latents': plan.latents,
      'packed': float(packed),
      'chunks': real_chunks,
      'blocks': n_blocks,
      'blocks_of_chunk': blocks_of_chunk,
      'chunks_of_block': chunks_of_block,
    },
  )


def pair_sort(batch: int, d: int, k: int, active: float) -> Probe:
  """XLA's sort of all candidates by latent, with what goes along."""

  def function(latent, token, grads, vals):
    return jax.lax.sort(
      (latent, token, grads, vals), num_keys=2, is_stable=False
    )

  kinds = (_I32, _I32, _F32, _F32)
  n_pairs = slots(batch, d, k, active)
  return Probe(function, [((n_pairs,), kind) for kind in kinds], {})


def adam_rows(d: int, n: int) -> Probe:
  """The optimiser's pass over so many rows."""

  def function(scalars, *matrices):
    return adam_kernel.adam_rows(scalars, *matrices, guarded=False, **ADAM)

  return Probe(function, [((5,), _F32), *[((n, d), _F32)] * 5], {})


def nested(outer: int, inner: int) -> Probe:
  """A loop inside of a loop, of which the estimate counts too little."""

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

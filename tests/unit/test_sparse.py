"""The sparse operations against dense ones: values, gradients, ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors, ops
from sae_jax.ops import dispatch
from sae_jax.ops.encode_topk import reference as encode_reference
from sae_jax.ops.top_k import reference as top_k_reference
from tests.support.programs import QUICKLY
from tests.support.top_k_checks import ADVERSARIAL, stable_top_k

# B, N, K, D: plain, one latent active, all active, D odd.
SHAPES = [(6, 40, 5, 16), (3, 7, 1, 4), (4, 6, 6, 3), (1, 64, 9, 17)]


def quick(f):
  """A jitted function that compiles quickly."""
  return jax.jit(f, compiler_options=QUICKLY)


def arrays(shape, seed=0):
  batch, n, k, d = shape
  rng = np.random.default_rng(seed)
  return {
    'x_BD': rng.standard_normal((batch, d)),
    'w_ND': rng.standard_normal((n, d)),
    'b_N': rng.standard_normal(n),
    'vals_BK': rng.standard_normal((batch, k)),
    'idx_BK': rng.integers(0, n, (batch, k)).astype(np.int32),
    'g_BD': rng.standard_normal((batch, d)),
    'g_BK': rng.standard_normal((batch, k)),
  }


def assert_same(sparse, dense, args, has_aux=False):
  """Values and gradients of each implementation are those of dense ones."""
  names = 'gather', 'dense'
  places = tuple(range(len(args)))
  totals = [*(functools.partial(sparse, name) for name in names), dense]

  @quick
  def run(*args):
    return [
      jax.value_and_grad(total, places, has_aux=has_aux)(*args)
      for total in totals
    ]

  *found, want = run(*args)
  for name, got in zip(names, found, strict=True):
    jax.tree.map(
      lambda x, y, name=name: np.testing.assert_allclose(
        x, y, rtol=1e-10, atol=1e-11, err_msg=name
      ),
      got,
      want,
    )


def dense_codes(vals_BK, idx_BK, n):
  return (vals_BK[:, :, None] * jax.nn.one_hot(idx_BK, n)).sum(1)


@pytest.mark.parametrize('shape', SHAPES)
def test_decode_and_its_gradients_equal_the_dense_product(shape):
  with jax.enable_x64(True):
    a = arrays(shape)
    n = shape[1]
    # A repeated index must add up, not overwrite.
    a['idx_BK'][:, -1] = a['idx_BK'][:, 0]

    def sparse_total(implementation, vals_BK, w_ND):
      out_BD = ops.decode(
        vals_BK, a['idx_BK'], w_ND, implementation=implementation
      )
      return (out_BD * a['g_BD']).sum()

    def dense_total(vals_BK, w_ND):
      return (dense_codes(vals_BK, a['idx_BK'], n) @ w_ND * a['g_BD']).sum()

    args = a['vals_BK'], a['w_ND']
    assert_same(sparse_total, dense_total, args)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('masked', [False, True])
def test_encode_topk_and_its_gradients_equal_the_dense_ones(shape, masked):
  with jax.enable_x64(True):
    a = arrays(shape)
    k = shape[2]
    mask_N = np.arange(shape[1]) % 2 == 0 if masked else None
    k = min(k, mask_N.sum()) if masked else k
    g_BK = a['g_BK'][:, :k]

    def sparse_total(implementation, x_BD, w_ND, b_N):
      vals_BK, idx_BK = ops.encode_topk(
        x_BD, w_ND, b_N, k, mask_N=mask_N, implementation=implementation
      )
      return (vals_BK * g_BK).sum(), (vals_BK, idx_BK)

    def dense_total(x_BD, w_ND, b_N):
      pre_BN = x_BD @ w_ND.T + b_N
      if masked:
        pre_BN = jnp.where(mask_N, pre_BN, -1e9)
      order_BN = jnp.argsort(-pre_BN, axis=1, stable=True)
      idx_BK = order_BN[:, :k]
      vals_BK = jnp.take_along_axis(pre_BN, idx_BK, 1)
      return (vals_BK * g_BK).sum(), (vals_BK, idx_BK)

    args = a['x_BD'], a['w_ND'], a['b_N']
    assert_same(sparse_total, dense_total, args, has_aux=True)


def test_a_mask_with_too_few_latents_fills_with_minus_infinity():
  a = arrays((4, 12, 5, 8))
  mask_N = np.zeros(12, bool)
  mask_N[[3, 7]] = True
  vals_BK, idx_BK = ops.encode_topk(
    a['x_BD'], a['w_ND'], a['b_N'], 5, mask_N=mask_N
  )
  assert np.isneginf(vals_BK[:, 2:]).all()
  assert np.isfinite(vals_BK[:, :2]).all()
  assert set(np.unique(idx_BK[:, :2])) == {3, 7}


@functools.partial(jax.jit, static_argnames='k', compiler_options=QUICKLY)
def all_top_k(x_BN, k):
  return (
    top_k_reference.bucketed_top_k(x_BN, k, 16),
    top_k_reference.sorted_top_k(x_BN, k),
    ops.top_k(x_BN, k),
  )


@pytest.mark.parametrize('name', ADVERSARIAL)
@pytest.mark.parametrize('k', [1, 7, 16])
def test_bucketed_top_k_equals_a_stable_sort(name, k):
  x_BN = ADVERSARIAL[name](np.random.default_rng(1)).astype(np.float32)
  want_vals, want_idx = stable_top_k(x_BN, k)
  for got in all_top_k(x_BN, k):
    np.testing.assert_array_equal(got[0], want_vals)
    np.testing.assert_array_equal(got[1], want_idx)


# Of the wider ones 32 buckets of 512 are searched by buckets once more.
@pytest.mark.parametrize('n', [16_384, 50_257, 2**19])
def test_top_k_takes_buckets_for_wide_rows_with_the_same_result(n):
  x_BN = np.random.default_rng(2).integers(0, 50, (3, n))
  x_BN = x_BN.astype(np.float32)
  # Of these some are among the best.
  x_BN[2, 20 : n - 5] = -np.inf
  got = ops.top_k(x_BN, 32)
  want = stable_top_k(x_BN, 32)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])


def strided_top_k(x_BN, k, n_buckets):
  """A plausible mistake: buckets of every n_buckets-th entry."""
  batch, n = x_BN.shape
  x_BGW = x_BN.reshape(batch, n // n_buckets, n_buckets).transpose(0, 2, 1)
  _, bucket = jax.lax.top_k(x_BGW.max(-1), k)
  bucket = jnp.sort(bucket, axis=-1)
  near = jnp.take_along_axis(x_BGW, bucket[:, :, None], 1)
  vals, place = jax.lax.top_k(near.reshape(batch, -1), k)
  width = n // n_buckets
  chosen = jnp.take_along_axis(bucket, place // width, 1)
  return vals, place % width * n_buckets + chosen


def test_control_strided_buckets_break_ties_wrongly():
  x_BN = ADVERSARIAL['few values'](np.random.default_rng(1))
  assert (
    strided_top_k(jnp.asarray(x_BN), 7, 16)[1] != stable_top_k(x_BN, 7)[1]
  ).any()


@pytest.mark.parametrize('batch', [1, 7, 12, 13])
def test_blocks_of_tokens_change_nothing(monkeypatch, batch):
  with jax.enable_x64(True):
    a = arrays((batch, 40, 5, 16))

    def total(x_BD, w_ND, b_N):
      vals_BK, idx_BK = ops.encode_topk(x_BD, w_ND, b_N, 5, b_pre_D=x_BD[0])
      return (vals_BK * a['g_BK']).sum(), (vals_BK, idx_BK)

    args = a['x_BD'], a['w_ND'], a['b_N']
    run = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    want = quick(run)(*args)
    # Five tokens fit, so that none of these batches is cut evenly.
    monkeypatch.setattr(encode_reference, 'BLOCK_BYTES', 5 * 40 * 8)
    # A function of its own: what was traced above has no blocks.
    got = quick(lambda *args: run(*args))(*args)
    np.testing.assert_array_equal(got[0][1][1], want[0][1][1])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)
    blocks = str(jax.make_jaxpr(total)(*args)).count('scan')
    assert blocks == (batch > 5)


def test_rounded_products_are_summed_in_full():
  ones = jnp.ones((1, 4099))
  # bfloat16 has no 4099.
  assert ops.matmul(ones, ones.T, jnp.bfloat16) == 4099
  third = jnp.full((1, 1), 1 / 3)
  assert ops.matmul(third, jnp.ones((1, 1)), jnp.bfloat16) != third
  assert ops.matmul(third, jnp.ones((1, 1))) == third


def test_errors_say_what_to_do():
  with pytest.raises(errors.UserError, match=r'k 9 exceeds the 8 latents'):
    ops.top_k(np.zeros((1, 8)), 9)
  with pytest.raises(errors.UserError, match=r"'fast' is not known: use one"):
    ops.decode(
      np.zeros((1, 1)), np.zeros((1, 1), int), np.zeros((4, 2)),
      implementation='fast',
    )  # fmt: skip


KERNELS = [
  (
    'decode',
    lambda name, a: (
      lambda vals_BK, w_ND: ops.decode(
        vals_BK, a['idx_BK'], w_ND, implementation=name
      )
    ),
    ('vals_BK', 'w_ND'),
    'g_BD',
  ),
  (
    'encode_topk',
    lambda name, a: (
      lambda x_BD, w_ND, b_N: ops.encode_topk(
        x_BD, w_ND, b_N, 4, mask_N=np.arange(50) % 3 > 0, implementation=name
      )[0]
    ),
    ('x_BD', 'w_ND', 'b_N'),
    'g_BK',
  ),
]


def outputs_and_gradients(f, cotangent, *args):
  out, back = jax.vjp(f, *args)
  return out, *back(cotangent)


@pytest.mark.parametrize('case', KERNELS, ids=[case[0] for case in KERNELS])
def test_kernels_by_name_equal_the_gathers_with_their_gradients(case):
  _, make, names, cotangent = case
  a = {
    name: array.astype(np.float32) if array.dtype == float else array
    for name, array in arrays((11, 50, 4, 128)).items()
  }
  found = []
  for name in ('pallas', 'gather'):
    run = quick(functools.partial(outputs_and_gradients, make(name, a)))
    found.append(run(a[cotangent], *(a[n] for n in names)))
  for got, want in zip(*found, strict=True):
    np.testing.assert_allclose(
      got, want, rtol=1e-5, atol=3e-6 * np.abs(want).max()
    )


def test_dispatch_follows_the_ratio_of_latents_to_active_ones(monkeypatch):
  assert dispatch.choose(4096, 32, None) == 'gather'
  assert dispatch.choose(4096, 256, None) == 'dense'
  assert dispatch.choose(4096, 256, 'gather') == 'gather'
  with pytest.raises(errors.UserError, match='multiple of 128, not 576'):
    dispatch.choose(4096, 8, 'pallas', 576)
  # On a TPU rows are dearer beside products.
  monkeypatch.setattr(dispatch.target, 'platform', lambda: 'tpu')
  assert dispatch.choose(450 * 32, 32, None, 768) == 'pallas'
  assert dispatch.choose(450 * 32 - 1, 32, None, 768) == 'dense'
  assert dispatch.choose(450 * 32, 32, None, 576) == 'gather'

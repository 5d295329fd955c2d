"""`autoencode` by kernels where shards hold few, or most, of the winners."""

import functools

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops import pairs
from sae_jax.ops.autoencode import fused

SHARDS, BATCH, N, D, K = 8, 16, 512, 128, 32


def arrays(crowded):
  rng = np.random.default_rng(7)
  x_BD = rng.standard_normal((BATCH, D))
  w_enc_ND, w_dec_ND = rng.standard_normal((2, N, D)) / np.sqrt(D)
  b_N = np.zeros(N)
  if crowded:
    # So many of its 64 latents win, for every token.
    b_N[64 : 64 + crowded] = 100
  g_BD = rng.standard_normal((BATCH, D))
  return [a.astype(np.float32) for a in (x_BD, w_enc_ND, b_N, w_dec_ND, g_BD)]


def program(implementation, candidates=None):
  """Models and gradients over eight shards, and which lists were too short.

  Kernels that are interpreted take seconds to compile, so what a test leaves
  out is left out when the program runs.

  Returns:
    A jitted function of `arrays`, and of whether pairs are looked at again.
  """
  line = jax.make_mesh(
    (SHARDS,), ('latent',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  loop = jax.lax.while_loop

  @functools.partial(
    jax.shard_map,
    mesh=line,
    in_specs=(P(), P('latent'), P('latent'), P('latent'), P(), P()),
    out_specs=(P(), (P('latent'),) * 3, P('latent')),
    check_vma=False,
  )
  def whole(x_BD, w_enc_ND, b_N, w_dec_ND, g_BD, again):
    def rounds(cond, body, start):
      return loop(lambda carry: again & cond(carry), body, start)

    def loss(w_enc_ND, b_N, w_dec_ND):
      coded = ops.autoencode(
        x_BD,
        w_enc_ND,
        b_N,
        w_dec_ND,
        (K,),
        b_pre_D=np.zeros(D, np.float32),
        axis='latent',
        implementation=implementation,
        candidates=candidates,
      )
      (model_BD,) = coded.models
      return (model_BD * g_BD).sum(), (model_BD, coded.exhausted)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(fused.jax.lax, 'while_loop', rounds)
      grads, (model_BD, short) = jax.grad(loss, (0, 1, 2), has_aux=True)(
        w_enc_ND, b_N, w_dec_ND
      )
    return jax.lax.psum(model_BD, 'latent'), grads, short[None]

  return jax.jit(whole)


def run(program, given, again=True):
  """What `program` gives, with the three gradients beside the models."""
  model_BD, grads, short = program(*given, again)
  return (model_BD, *grads), np.asarray(short)


@pytest.fixture(scope='module')
def gather():
  """By gathers, which look at every pair at once."""
  return program('gather')


@pytest.fixture(scope='module')
def kernels():
  """By kernels, in rounds."""
  return program('pallas')


def assert_same(found, want):
  for got, other in zip(found, want, strict=True):
    scale = np.abs(other).max()
    np.testing.assert_allclose(got, other, rtol=1e-5, atol=3e-6 * scale)


# Of 512 slots 128 are looked at, at a time: 64 are real on a shard, or all.
@pytest.mark.parametrize('crowded', [0, 32])
def test_pairs_that_crowd_a_shard_are_summed_in_rounds(
  gather, kernels, crowded
):
  assert pairs.slots(BATCH, K, 1 / SHARDS) == 128 < BATCH * K
  given = arrays(crowded)
  want, _ = run(gather, given)
  assert_same(run(kernels, given)[0], want)
  # Control: the first round alone will do only where winners lie evenly.
  first, _ = run(kernels, given, again=False)
  if crowded:
    with pytest.raises(AssertionError):
      assert_same(first, want)
  else:
    assert_same(first, want)


def test_a_block_with_more_pairs_than_are_looked_at_is_told(
  monkeypatch, gather
):
  # No token has 24 winners on a shard, but blocks have more than 128.
  crowded, even = arrays(20), arrays(0)
  few = program('pallas', candidates=24)
  want, _ = run(gather, even)
  found, short = run(few, even)
  assert not short.any()
  assert_same(found, want)
  found, short = run(few, crowded)
  np.testing.assert_array_equal(short, np.arange(SHARDS) == 1)
  # Where it is told, for something is missing.
  want, _ = run(gather, crowded)
  with pytest.raises(AssertionError):
    assert_same(found, want)
  # Control: with room for all pairs it is not told, and nothing is missing.
  monkeypatch.setattr(pairs, 'slots', lambda tokens, k, active: tokens * k)
  found, short = run(program('pallas', candidates=24), crowded)
  assert not short.any()
  assert_same(found, want)


def test_windows_of_slots_are_all_of_them_once():
  rng = np.random.default_rng(0)
  vals_BK = rng.standard_normal((6, 5)) * (rng.random((6, 5)) < 0.4)
  idx_BK = rng.integers(0, 50, (6, 5), np.int32)
  blocks = pairs.blocks(vals_BK.astype(np.float32), idx_BK, 3, pack=True)
  parts = [blocks.cut(start, 4) for start in range(0, 15, 4)]
  for name in ('latent_GR', 'token_GR', 'vals_GR', 'place_GR'):
    joined = np.concatenate([getattr(part, name) for part in parts], 1)
    np.testing.assert_array_equal(joined[:, :15], getattr(blocks, name))
    assert not joined[:, 15:].any()
  for group in range(2):
    real = int(blocks.count_G[group])
    counts = [int(part.count_G[group]) for part in parts]
    assert sum(counts) == real == (vals_BK[3 * group :][:3] != 0).sum()
    assert counts == [min(4, max(0, real - start)) for start in range(0, 15, 4)]

"""The second look of `autoencode` where candidates of a shard were too few."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops import micro_batches
from sae_jax.ops.autoencode import retry
from sae_jax.training import shards as shards_lib

SHARDS, BATCH, N, D, K = 2, 8, 64, 128, 16


def arrays(crowded):
  """A batch, an autoencoder and cotangents; all winners on a shard, or not."""
  rng = np.random.default_rng(3)
  x_BD, g_BD = rng.standard_normal((2, BATCH, D))
  w_enc_ND, w_dec_ND = rng.standard_normal((2, N, D)) / np.sqrt(D)
  b_N = np.zeros(N)
  if crowded:
    b_N[: N // SHARDS] = 100
  return [a.astype(np.float32) for a in (w_enc_ND, b_N, w_dec_ND, x_BD, g_BD)]


def program(seen):
  """Gradients, the model of each token and diagnostics, over two shards.

  Args:
    seen: gets the tokens and `candidates` that each pass is traced with.

  Returns:
    A jitted function of the first three of `arrays`, of the others side by
    side, and of whether a second look is allowed.
  """
  line = jax.make_mesh(
    (SHARDS,), ('latent',), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def passes(weights, tokens, candidates):
    seen.append((len(tokens), candidates))
    x_BD, g_BD = tokens[:, :D], tokens[:, D:]

    def loss(weights):
      w_enc_ND, b_N, w_dec_ND = weights
      coded = ops.autoencode(
        x_BD,
        w_enc_ND,
        b_N,
        w_dec_ND,
        (K,),
        b_pre_D=jnp.zeros(D),
        axis='latent',
        implementation='pallas',
        candidates=candidates,
      )
      return (coded.models[0] * g_BD).sum(), coded

    grads, coded = jax.grad(loss, has_aux=True)(weights)
    return (grads, coded.diagnostics), coded.models[0], coded.exhausted

  @functools.partial(
    jax.shard_map,
    mesh=line,
    in_specs=((P('latent'),) * 3, P(), P()),
    out_specs=((P('latent'),) * 3, P(), P()),
    check_vma=False,
  )
  def whole(weights, tokens, allowed):
    zero = jnp.zeros(())
    start = (jax.tree.map(jnp.zeros_like, weights), ops.Diagnostics(zero, zero))
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(retry, 'anywhere', lambda *args: allowed & anywhere(*args))
      (grads, diagnostics), model_BD = ops.with_few_candidates(
        functools.partial(passes, weights),
        start,
        tokens,
        k=K,
        n_latents=N // SHARDS,
        latent_axis='latent',
      )
    total = jax.lax.psum((model_BD, diagnostics), 'latent')
    return grads, *total

  anywhere = retry.anywhere
  return jax.jit(whole)


def arguments(given, allowed=True):
  """Of `program`, of what `arrays` gives."""
  return tuple(given[:3]), np.concatenate(given[3:], 1), allowed


def run(program, given, allowed=True):
  """The gradients and the model, and the diagnostics."""
  grads, model_BD, diagnostics = program(*arguments(given, allowed))
  return (*grads, model_BD), jax.tree.map(float, diagnostics)


def wanted(given):
  """The same by one pass of dense products on one device, in float64."""
  *weights, x_BD, g_BD = (a.astype(np.float64) for a in given)
  w_enc_ND, b_N, w_dec_ND = weights
  pre_BN = x_BD @ w_enc_ND.T + b_N
  last_B1 = np.sort(pre_BN, 1)[:, -K][:, None]
  z_BN = np.where(pre_BN >= last_B1, np.maximum(pre_BN, 0), 0)
  pre_g_BN = (g_BD @ w_dec_ND.T) * (z_BN > 0)
  return pre_g_BN.T @ x_BD, pre_g_BN.sum(0), z_BN.T @ g_BD, z_BN @ w_dec_ND


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_what_few_candidates_miss_is_found_again(monkeypatch):
  # Enough of a shard for winners that lie evenly, and too few for the others.
  monkeypatch.setattr(retry.candidates, 'width', lambda *_: 15)
  seen = []
  # One program for all: kernels that are interpreted take long to compile.
  looks = program(seen)
  for crowded in (False, True):
    given = arrays(crowded)
    got, diagnostics = run(looks, given)
    assert_same(got, wanted(given))
    assert diagnostics.recall == SHARDS * BATCH
    # Fewer are those that the kernel of a shard cannot vouch for by itself.
    assert (diagnostics.redone == SHARDS * BATCH) == crowded
    # Control: without the second look winners are missing where they crowd.
    first, diagnostics = run(looks, given, allowed=False)
    assert diagnostics.redone < SHARDS * BATCH
    if crowded:
      with pytest.raises(AssertionError):
        assert_same(first, wanted(given))
    else:
      assert_same(first, wanted(given))
  # Longer lists are of fewer tokens at a time.
  assert set(seen) == {(BATCH, 15), (BATCH // 2, None)}


def test_lists_that_hold_every_winner_are_looked_at_once(monkeypatch):
  monkeypatch.setattr(retry.candidates, 'width', lambda *_: K)
  seen = []
  jax.eval_shape(program(seen), *arguments(arrays(True)))
  assert seen == [(BATCH, None)]


def test_a_batch_is_cut_into_even_micro_batches():
  assert micro_batches.number(96, 3) == 3
  assert micro_batches.number(50, 4) == 5
  assert micro_batches.number(96, 1) == 1
  assert micro_batches.number(3, 9) == 3
  # A second look never works on more tokens at once than the config allows.
  two = shards_lib.Shards(micro_batches=2)
  assert two.with_micro_batches(96, 1).micro_batches == 2
  assert two.with_micro_batches(96, 3).micro_batches == 3


def test_a_fold_is_the_pass_over_all_tokens():
  x_BD = np.arange(24.0).reshape(8, 3)

  def run(x_BD):
    return (x_BD**2).sum(), 2 * x_BD

  for number in (1, 2, 8):
    total, kept = micro_batches.fold(run, jnp.zeros(()), number, x_BD)
    assert total == (x_BD**2).sum()
    np.testing.assert_array_equal(kept, 2 * x_BD)


def test_diagnostics_are_sums_over_tokens():
  coded = ops.autoencode(
    *(jnp.asarray(a) for a in (arrays(False)[3], *arrays(False)[:3])),
    (K,),
    b_pre_D=jnp.zeros(D),
    implementation='dense',
  )
  assert dataclasses.asdict(coded.diagnostics) == {
    'redone': 0,
    'recall': BATCH,
  }

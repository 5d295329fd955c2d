"""The training step with kernels: the same run as without them."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops.autoencode import candidates
from sae_jax.ops.weight_grad import kernel as weight_grad_kernel
from tests.support import step_runs
from tests.support.kernel_steps import config, rows


def test_candidates_are_seldom_too_few():
  # One winner of 256 is expected on each of 256 shards.
  assert candidates.width(256, 256, 131_072) == 16
  assert candidates.width(32, 256, 131_072) == 8
  assert candidates.width(32, 1, 131_072) == 32
  shard_TK = np.random.default_rng(2).integers(0, 8, (20_000, 32))
  most_T = [np.bincount(row, minlength=8).max() for row in shard_TK]
  offered = candidates.width(32, 8, 100)
  # A batch of 100 tokens fails once in a thousand times, a token once in
  # 100,000; with half as many candidates nearly every token would.
  assert (np.array(most_T) >= offered).mean() < 1e-3
  assert (np.array(most_T) >= offered // 2).mean() > 0.1


def test_control_a_lost_pair_is_seen(monkeypatch):
  right = weight_grad_kernel.segment_sums

  def wrong(latent_P, row_P, weights, tables, *, count, **more):
    return right(latent_P, row_P, weights, tables, count=count - 1, **more)

  monkeypatch.setattr(weight_grad_kernel, 'segment_sums', wrong)
  # Another program than the one that is cached.
  made = dataclasses.replace(config(), steps=3)
  plain = step_runs.run(made, (1, 1), rows(), 'gather')
  with pytest.raises(AssertionError):
    step_runs.assert_same_run(
      step_runs.run(made, (1, 1), rows(), 'pallas'), plain
    )


@pytest.mark.parametrize('implementation', ['gather', 'dense', 'pallas'])
def test_the_backward_pass_says_how_much_latents_were_used(implementation):
  rng = np.random.default_rng(2)
  x_BD, w_enc_ND, w_dec_ND = (
    rng.standard_normal((n, 128)).astype(np.float32) for n in (12, 200, 200)
  )
  b_N, b_D = np.zeros(200, np.float32), np.zeros(128, np.float32)

  def total(tally_N, factor):
    coded = ops.autoencode(
      x_BD,
      w_enc_ND,
      b_N,
      w_dec_ND,
      (3, 12),
      b_pre_D=b_D,
      implementation=implementation,
      tally_N=tally_N,
    )
    error = sum(((factor * model - x_BD) ** 2).sum() for model in coded.models)
    return error, (coded.vals_BK, coded.idx_BK)

  run = jax.jit(jax.grad(total, has_aux=True))
  for factor in (0.0, 1.0):
    used_N, (vals_BK, idx_BK) = run(np.zeros(200, np.float32), factor)
    want_N = np.zeros(200)
    # Of the first k, and whatever the loss.
    np.add.at(want_N, idx_BK[:, :3], np.asarray(vals_BK)[:, :3])
    assert 20 < (want_N > 0).sum() < 40
    np.testing.assert_allclose(used_N, want_N, rtol=1e-5)


def test_a_weight_that_is_no_number_reaches_dense_models():
  rng = np.random.default_rng(3)
  x_BD, w_ND = (
    rng.standard_normal((n, 128)).astype(np.float32) for n in (4, 40)
  )
  w_ND[7, 5] = np.nan
  zeros = np.zeros(40, np.float32), np.zeros(128, np.float32)
  coded = ops.autoencode(
    x_BD, w_ND, zeros[0], w_ND, (3,), b_pre_D=zeros[1], implementation='dense'
  )
  assert np.isnan(coded.models[0]).any(1).all()


@pytest.mark.parametrize('ks', [(4,), (3, 12)])
def test_one_backward_pass_equals_that_of_its_parts(ks):
  rng = np.random.default_rng(1)
  x_BD, w_enc_ND, w_dec_ND = (
    rng.standard_normal((n, 128)).astype(np.float32) for n in (12, 200, 200)
  )
  b_N, b_D = rng.standard_normal(200), 0.1 * rng.standard_normal(128)
  cotangents = rng.standard_normal((len(ks), 12, 128)).astype(np.float32)

  def total(implementation, x_BD, b_D, w_enc_ND, b_N, w_dec_ND):
    coded = ops.autoencode(
      x_BD,
      w_enc_ND,
      b_N,
      w_dec_ND,
      ks,
      b_pre_D=b_D,
      implementation=implementation,
    )
    parts = zip(coded.models, cotangents, strict=True)
    return sum((m * g).sum() for m, g in parts), (coded.vals_BK, coded.idx_BK)

  args = (
    x_BD,
    b_D.astype(np.float32),
    w_enc_ND,
    b_N.astype(np.float32),
    w_dec_ND,
  )
  run = jax.jit(
    jax.value_and_grad(total, range(1, 6), has_aux=True), static_argnums=0
  )
  (_, codes), grads = run('pallas', *args)
  (_, want_codes), want = run('gather', *args)
  np.testing.assert_allclose(codes[0], want_codes[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(codes[1], want_codes[1])
  for got, other in zip(grads, want, strict=True):
    scale = np.abs(other).max()
    np.testing.assert_allclose(got, other, rtol=1e-5, atol=2e-6 * scale)

"""The training step with kernels: the same run on every mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax.ops.autoencode import candidates
from tests.support import runs, step_runs
from tests.support.kernel_steps import config, rows


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_kernels_change_nothing_but_rounding(shape):
  plain = step_runs.run(config(), shape, rows(), 'gather')
  kernels = step_runs.run(config(), shape, rows(), 'pallas')
  step_runs.assert_same_run(kernels, plain)
  assert max(row['aux'] for row in plain[0]) > 0
  # At a recall of one nothing is said of it, as nothing is lost.
  assert 'expected_recall' not in kernels[0][0]
  assert any(row['grad_norm'] > 0.25 for row in plain[0])
  for a, b in zip(
    jax.tree.leaves(kernels[3].sae), jax.tree.leaves(plain[3].sae)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_keeps_its_bits_with_kernels():
  made = config()
  made = dataclasses.replace(
    made,
    steps=3,
    optimizer=dataclasses.replace(made.optimizer, freeze='encoder'),
  )
  plain = step_runs.run(made, (2, 4), rows(), 'gather')
  kernels = step_runs.run(made, (2, 4), rows(), 'pallas')
  step_runs.assert_same_run(kernels, plain)
  assert max(row['aux'] for row in plain[0]) > 0
  start = step_runs.state_lib.init_state(
    made, step_runs.make_mesh(2, 4), rows()[:500]
  ).sae
  last = kernels[3].sae
  runs.assert_same_bits(last.w_enc_ND, start.w_enc_ND)
  # Control: the decoder, by the kernel, moves.
  assert (np.asarray(last.w_dec_ND) != np.asarray(start.w_dec_ND)).any()


def test_a_shard_that_offers_too_few_candidates_is_asked_again(monkeypatch):
  made = dataclasses.replace(config(), steps=2)
  made = dataclasses.replace(
    made,
    sae=dataclasses.replace(made.sae, n_latents=256, k=16),
    objective=dataclasses.replace(made.objective, k_aux=0),
  )
  shape = (1, 2)
  # Sixteen are chosen of two shards of which each offers fifteen.
  monkeypatch.setattr(candidates, 'width', lambda *_: 15)
  rows_BD = rows()

  def run(implementation):
    found = step_runs.run(made, shape, rows_BD, implementation)
    return found, [values.pop('redone', 0) for values in found[0]]

  def most(found):
    """Of a shard's latents, those that a token selects at the most."""
    return found[1].reshape(*found[1].shape[:2], 2, 128).sum(-1).max(-1)

  (plain, _), (kernels, redone) = run('gather'), run('pallas')
  step_runs.assert_same_run(kernels, plain)
  assert max(redone) < 1
  assert most(plain).max() <= 15

  # The first shard's latents look alike, and win every token.
  first = step_runs.state_lib.init_state

  def init(*args):
    state = first(*args)
    shifted = state.sae.b_lat_N.at[:128].add(10.0)
    return state.replace(sae=state.sae.replace(b_lat_N=shifted))

  monkeypatch.setattr(step_runs.state_lib, 'init_state', init)
  (plain, _), (kernels, redone) = run('gather'), run('pallas')
  step_runs.assert_same_run(kernels, plain)
  assert redone == [1.0, 1.0]
  # Without the second look a latent of every token would be missing, and
  # test_autoencode_retry.py shows that gradients then differ.
  assert (most(plain) == 16).all()


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_an_approximate_run_says_what_recall_it_has(shape):
  made = config()
  made = dataclasses.replace(
    made,
    sae=dataclasses.replace(made.sae, n_latents=512, k=8),
    objective=dataclasses.replace(made.objective, topk_recall=0.9),
    steps=3,
  )
  near = step_runs.run(made, shape, rows(), 'pallas')
  sure = step_runs.run(made, shape, rows(), 'gather')
  values, want = near[0][0], sure[0][0]
  assert 'expected_recall' not in want
  assert 0.9 <= values['expected_recall'] < 1
  assert values['redone'] == 0
  # Some other latents are active, and little is lost by it.
  same = (near[1][0] & sure[1][0]).sum() / sure[1][0].sum()
  assert same > 0.7
  np.testing.assert_allclose(values['nmse'], want['nmse'], rtol=0.1)

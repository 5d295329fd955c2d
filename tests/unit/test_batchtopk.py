"""BatchTopK against a sort and a dense objective, and its threshold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax.autoencoder.nonlinearity import batchtopk
from sae_jax.training import objective, step, train
from sae_jax.training import state as state_lib
from tests.support import (
  batchtopk_checks,
  dense_reference,
  objective_checks,
  planted,
  step_runs,
)


@pytest.mark.parametrize('kind', batchtopk_checks.KINDS)
def test_the_smallest_active_value_is_that_of_a_sort(kind):
  pre_BN, n_active = batchtopk_checks.values(kind)
  find = jax.jit(batchtopk.smallest_active, static_argnums=1)
  for n in (1, n_active, pre_BN.size):
    assert find(pre_BN, n) == batchtopk_checks.by_sorting(pre_BN, n)
  with jax.enable_x64(True):
    wide_BN = jnp.asarray(pre_BN, jnp.float64) * (1 + 1e-12)
    got = find(wide_BN, n_active)
    assert got == batchtopk_checks.by_sorting(np.asarray(wide_BN), n_active)
  # Control: the next one is another value, unless there is a reason.
  if kind in ('plain', 'no numbers', 'tiny'):
    assert find(pre_BN, n_active) != batchtopk_checks.by_sorting(
      pre_BN, n_active + 1
    )


@pytest.mark.parametrize('micro_batches', [1, 2, 5])
def test_gradients_equal_dense_autodiff(micro_batches):
  with jax.enable_x64(True):
    sae, x_BD, dead_N = objective_checks.problem()
    k = objective_checks.CONFIG.k
    sae_config = dataclasses.replace(
      objective_checks.CONFIG, activation='batchtopk'
    )
    value, terms, grads = objective_checks.ours(
      sae, x_BD, dead_N, sae_config=sae_config, micro_batches=micro_batches
    )
    args = sae, x_BD, dead_N
    want, (nmse, aux), want_grads = objective_checks.dense(
      *args, codes=dense_reference.batch_codes
    )
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(terms.nmse, nmse, rtol=1e-12)
    np.testing.assert_allclose(terms.aux, aux, rtol=1e-12)
    assert float(aux) > 0 and terms.l0 == k
    assert objective_checks.largest_difference(grads, want_grads) < 1e-10
    pre_BN = autoencoder.pre_activations(sae_config, sae, x_BD)
    fired_BN = dense_reference.batch_codes(pre_BN, k) > 0
    np.testing.assert_array_equal(terms.fired_N, fired_BN.any(0))
    np.testing.assert_allclose(
      terms.observed['threshold'],
      batchtopk_checks.by_sorting(np.asarray(pre_BN), 20 * k),
    )
    # Control: k of every token, or of each half of the batch, is another loss.
    assert len(set((np.asarray(fired_BN).sum(1)).tolist())) > 1
    _, _, other = objective_checks.dense(*args)
    assert objective_checks.largest_difference(grads, other) > 1e-4
    halves = [
      objective_checks.dense(
        sae, half_BD, dead_N, codes=dense_reference.batch_codes
      )[2]
      for half_BD in (x_BD[:10], x_BD[10:])
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert objective_checks.largest_difference(grads, mean) > 1e-4


def test_the_threshold_follows_the_steps_that_are_taken():
  made = dataclasses.replace(batchtopk_checks.config(), on_nonfinite='skip')
  where = step_runs.make_mesh(1, 1)
  state = state_lib.init_state(made, where, step_runs.ROWS[:500])
  x_BD, _ = autoencoder.preprocess(made.sae, state.sae, step_runs.ROWS[:500])
  pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
  threshold = float(state.sae.extra['threshold'])
  np.testing.assert_allclose(
    threshold, batchtopk_checks.by_sorting(pre_BN, 2000), rtol=1e-4
  )
  do = step.make_step(made, where)
  bad_BD = step_runs.ROWS[:64].copy()
  bad_BD[3] = np.nan
  for i in range(4):
    rows_BD = step_runs.ROWS[64 * i :][:64]
    x_BD, _ = autoencoder.preprocess(made.sae, state.sae, rows_BD)
    pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
    state, seen = do(state, rows_BD)
    smallest = batchtopk_checks.by_sorting(pre_BN, 4 * 64)
    np.testing.assert_allclose(seen['threshold'], smallest, rtol=1e-4)
    threshold = 0.99 * threshold + 0.01 * smallest
    state, skipped = do(state, bad_BD)
    assert not skipped['finite']
    got = float(state.sae.extra['threshold'])
    np.testing.assert_allclose(got, threshold, rtol=1e-5)
  # Tokens are encoded by it alone: one by one as all together.
  vals_BN, idx_BN = autoencoder.encode(made.sae, state.sae, x_BD)
  pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
  want_BN = np.where(pre_BN > got, pre_BN, 0)
  np.testing.assert_allclose(vals_BN, want_BN, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(idx_BN, np.tile(np.arange(64), (64, 1)))
  one_BN, _ = autoencoder.encode(made.sae, state.sae, x_BD[:1])
  np.testing.assert_allclose(one_BN, vals_BN[:1], rtol=1e-5, atol=1e-6)


def test_weights_that_are_no_numbers_reach_the_loss():
  sae, x_BD, dead_N = objective_checks.problem()
  sae_config = dataclasses.replace(
    objective_checks.CONFIG, activation='batchtopk'
  )
  value, _, _ = objective_checks.ours(sae, x_BD, dead_N, sae_config=sae_config)
  assert np.isfinite(value)
  spoilt = sae.replace(w_enc_ND=sae.w_enc_ND.at[7, 2].set(jnp.nan))
  value, _, _ = objective_checks.ours(
    spoilt, x_BD, dead_N, sae_config=sae_config
  )
  assert np.isnan(value)


def test_codes_of_a_run_have_k_active_latents_on_average(store, tmp_path):
  workdir = str(tmp_path / 'run')
  train.train(
    batchtopk_checks.run_config(
      steps=400, log_every=50, checkpoint_every=0, mesh_latent=1
    ),
    store,
    workdir,
  )
  trained = checkpoint.load(workdir, average=False)
  rows_BD = planted.activations(4000)[-2000:]
  x_BD, _ = autoencoder.preprocess(trained.config, trained.sae, rows_BD)
  vals_BN, _ = autoencoder.encode(trained.config, trained.sae, x_BD)
  active_B = (np.asarray(vals_BN) > 0).sum(1)
  assert abs(active_B.mean() - 4) < 0.5 and np.ptp(active_B) > 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'multi_topk': 2}, 'multi_topk 2 needs topk, the activation is batchtopk'),
    ({'topk_recall': 0.9}, 'topk_recall 0.9 needs topk'),
    ({'sparsity_weight': 0.1}, 'does nothing with batchtopk, whose k sets'),
  ],
)
def test_terms_that_do_not_fit_are_refused(options, message):
  with pytest.raises(errors.UserError, match=message):
    objective.check(
      batchtopk_checks.config().sae, objective.ObjectiveConfig(**options)
    )

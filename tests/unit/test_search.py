"""The best latents of tasks, against a fit of all pre-activations at once."""

import jax
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax import mesh as mesh_lib
from sae_jax.probing import newton, pooled, probes, search
from tests.support import task_search


def on_one_device(trained):
  mesh = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  return pooled.on_mesh(trained, mesh), mesh


@pytest.fixture(scope='module')
def searched():
  """An autoencoder of 300 latents in blocks of 128, and two tasks."""
  with pytest.MonkeyPatch.context() as patch:
    # The last block is not full.
    patch.setattr(newton, 'columns', lambda: 128)
    patch.setattr(search, '_CPU_BLOCKS', 2)
    trained, mesh = on_one_device(task_search.make_trained(300))
    training = task_search.make_training(trained)
    best = search.search(trained, mesh, training, 5, all_losses=True)
  return trained, training, best


def test_it_finds_what_a_fit_of_all_latents_finds(searched):
  trained, training, best = searched
  for task, of_task in zip(training, best):
    pre_PN = np.asarray(
      autoencoder.pre_activations(trained.config, trained.sae, task.x_PD)
    )
    for kind, labels_P in (
      (of_task.latent, task.labels_P),
      (of_task.permuted, task.permuted_P),
    ):
      fitted = probes.fit_probes(pre_PN, labels_P)
      order = probes.best_first(fitted.train_ce_N, np.arange(300), 5)
      np.testing.assert_array_equal(kind.latent_Q, order)
      for chosen, every in zip(kind.probes_Q, fitted):
        np.testing.assert_allclose(chosen, every[order], rtol=1e-4, atol=1e-5)
    fitted = probes.fit_probes(pre_PN, task.labels_P)
    np.testing.assert_allclose(of_task.train_ce_N, fitted.train_ce_N, atol=1e-6)
  assert [of_task.latent.latent_Q[0] for of_task in best] == [7, 211]


def test_random_directions_are_known_by_their_numbers(searched):
  trained, training, best = searched
  for task, of_task in zip(training, best):
    along_PN = search.along_directions(
      task.x_PD, task.x_PD, 0, np.arange(trained.config.n_latents)
    )
    fitted = probes.fit_probes(along_PN, task.labels_P)
    order = probes.best_first(fitted.train_ce_N, np.arange(300), 5)
    np.testing.assert_array_equal(of_task.random.latent_Q, order)
    np.testing.assert_allclose(
      of_task.random.probes_Q.train_ce_N, fitted.train_ce_N[order], atol=1e-6
    )
  # As isotropic as they are said to be, and no two alike.
  rows_ND = np.asarray(search._drawn(0, np.arange(300), 12))
  unit_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
  assert np.abs(unit_ND @ unit_ND.T - np.eye(300)).max() < 0.99
  np.testing.assert_allclose(rows_ND.T @ rows_ND / 300, np.eye(12), atol=0.3)
  other_ND = np.asarray(search._drawn(1, np.arange(300), 12))
  assert np.abs(other_ND - rows_ND).min() > 0


def test_of_equal_latents_the_lower_one_is_chosen():
  made = task_search.make_trained(300)
  # Latent 3 is 7 again, and 5 almost: rounding alone tells them apart.
  sae = made.sae
  w_enc_ND = sae.w_enc_ND.at[3].set(sae.w_enc_ND[7])
  w_enc_ND = w_enc_ND.at[5].set(sae.w_enc_ND[7] * 1.0000001)
  b_lat_N = sae.b_lat_N.at[3].set(sae.b_lat_N[7]).at[5].set(0.0)
  changed = task_search.replaced(made, w_enc_ND=w_enc_ND, b_lat_N=b_lat_N)
  trained, mesh = on_one_device(changed)
  training = task_search.make_training(made)
  (best, _) = search.search(trained, mesh, training, 3)
  np.testing.assert_array_equal(best.latent.latent_Q, [3, 5, 7])


def test_latents_that_are_not_finite_are_passed_over(caplog):
  made = task_search.make_trained(300)
  w_enc_ND = made.sae.w_enc_ND.at[7].set(np.nan).at[9].set(np.inf)
  trained, mesh = on_one_device(task_search.replaced(made, w_enc_ND=w_enc_ND))
  training = task_search.make_training(made)
  (best, _) = search.search(trained, mesh, training, 3, all_losses=True)
  assert not {7, 9} & set(best.latent.latent_Q)
  assert np.isfinite(best.train_ce_N).all()
  assert '2 of 300 features hold values that are not finite' in caplog.text


def test_shuffled_labels_score_as_chance():
  made = task_search.make_trained(300)
  trained, mesh = on_one_device(made)
  aucs, of_latents = [], []
  for seed in range(12):
    train, test = (
      task_search.make_training(made, seed=2 * seed + side)[0]
      for side in (0, 1)
    )
    (best,) = search.search(trained, mesh, [train], 3)
    for scores, kind, fitted_P, labels_P in (
      (of_latents, best.latent, train.labels_P, test.labels_P),
      (aucs, best.permuted, train.permuted_P, test.permuted_P),
    ):
      pre_PQ = pooled.pre_activations(trained, test.x_PD, kind.latent_Q)
      first = probes.Probes(*(a[:1] for a in kind.probes_Q))
      scores.append(
        probes.held_out(
          kind.latent_Q[0], first, fitted_P, pre_PQ[:, 0], labels_P
        ).test_auc
      )
  assert abs(np.mean(aucs) - 0.5) < 0.05
  # With the labels as they are the same latents do score.
  assert np.mean(of_latents) > 0.9


def test_errors_name_the_numbers():
  made = task_search.make_trained(300)
  trained, mesh = on_one_device(made)
  task = task_search.make_training(made)[0]
  with pytest.raises(errors.UserError, match='labels hold 0 zeros'):
    search.search(
      trained, mesh, [task._replace(labels_P=0 * task.labels_P + 1)]
    )

"""PCA against numpy's SVD in float64, and what the controls must not find."""

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.probing import baselines, probes


def _rows(n_rows=600, width=24, offset=0.0, seed=0):
  """Rows with a known spread along each of `width` rotated directions."""
  rng = np.random.default_rng(seed)
  rotation_DD = np.linalg.qr(
    np.random.default_rng(99).standard_normal((width, width))
  )[0]
  scale_D = 2.0 ** -np.arange(0, width / 2, 0.5)
  x_BD = rng.standard_normal((n_rows, width)) * scale_D @ rotation_DD + offset
  return x_BD.astype(np.float32)


def _batches(x_BD, sizes=(1, 250, 7, 0, 342)):
  return np.split(x_BD, np.cumsum(sizes)[:-1])


def _direct_fvu(x_BD, x_hat_BD):
  x_BD, x_hat_BD = x_BD.astype(np.float64), np.asarray(x_hat_BD, np.float64)
  return np.sum((x_BD - x_hat_BD) ** 2) / np.sum((x_BD - x_BD.mean(0)) ** 2)


@pytest.mark.parametrize('offset', [0.0, 1e3])
def test_components_match_the_svd(offset):
  x_BD = _rows(offset=offset)
  pca = baselines.fit_pca(_batches(x_BD))
  centred = x_BD.astype(np.float64)
  centred = centred - centred.mean(0)
  _, singular_K, vectors_KD = np.linalg.svd(centred, full_matrices=False)
  np.testing.assert_allclose(pca.variance_K, singular_K**2 / 600, rtol=1e-9)
  overlap_K = np.abs(np.sum(pca.components_KD * vectors_KD, 1))
  np.testing.assert_allclose(overlap_K, 1, atol=1e-9)
  np.testing.assert_allclose(pca.mean_D, x_BD.astype(np.float64).mean(0))
  np.testing.assert_allclose(pca.total_variance, centred.var(0).sum())


def test_a_float32_sum_of_squares_would_not_do():
  x_BD = _rows(offset=1e3)
  mean_D = x_BD.mean(0)
  naive_DD = x_BD.T @ x_BD / 600 - np.outer(mean_D, mean_D)
  naive_K = np.linalg.eigvalsh(naive_DD)[::-1]
  exact_K = baselines.fit_pca([x_BD]).variance_K
  assert np.abs(naive_K / exact_K - 1).max() > 1


def test_the_cut_into_batches_does_not_matter():
  x_BD = _rows(offset=5.0)
  one = baselines.fit_pca([x_BD])
  other = baselines.fit_pca(_batches(x_BD[::-1]))
  np.testing.assert_allclose(one.variance_K, other.variance_K, rtol=1e-9)


def test_fvu_is_the_tail_of_the_spectrum_on_the_fitted_rows():
  x_BD = _rows(offset=2.0)
  pca = baselines.fit_pca([x_BD])
  tail_K1 = 1 - np.append(0, np.cumsum(pca.variance_K)) / pca.total_variance
  fvu_K1 = baselines.pca_fvu(pca, _batches(x_BD))
  np.testing.assert_allclose(fvu_K1, tail_K1, rtol=1e-9, atol=1e-14)
  assert abs(fvu_K1[0] - 1) < 1e-12 and fvu_K1[-1] < 1e-12


def _projected(mean_D, components_KD, x_BD):
  """Rows on the span of the components through the mean, in float64."""
  away_BD = x_BD.astype(np.float64) - mean_D
  return mean_D + away_BD @ components_KD.T @ components_KD


def test_fvu_on_held_out_rows_is_that_of_the_reconstruction():
  pca = baselines.fit_pca([_rows(offset=2.0)], n_components=8)
  held_out_BD = _rows(n_rows=300, offset=2.05, seed=1)
  fvu_K1 = baselines.pca_fvu(pca, [held_out_BD[:100], held_out_BD[100:]])
  assert fvu_K1.shape == (9,)
  assert fvu_K1[0] > 1
  for k in (0, 1, 3, 8):
    x_hat_BD = _projected(pca.mean_D, pca.components_KD[:k], held_out_BD)
    np.testing.assert_allclose(
      fvu_K1[k], _direct_fvu(held_out_BD, x_hat_BD), rtol=1e-4
    )
  # Any other directions of the same number do worse.
  other_KD = np.linalg.qr(np.random.default_rng(5).standard_normal((24, 8)))[0]
  x_hat_BD = _projected(pca.mean_D, other_KD.T, held_out_BD)
  assert _direct_fvu(held_out_BD, x_hat_BD) > 2 * fvu_K1[8]


def test_few_rows_span_few_components():
  x_BD = _rows(n_rows=10)
  pca = baselines.fit_pca([x_BD])
  assert pca.components_KD.shape == (9, 24)
  assert baselines.pca_fvu(pca, [x_BD])[-1] < 1e-12
  assert (pca.variance_K >= 0).all()


def test_pca_errors_name_the_numbers():
  x_BD = _rows()
  with pytest.raises(errors.UserError, match='PCA of 0 rows'):
    baselines.fit_pca([])
  with pytest.raises(
    errors.UserError, match='n_components 25 must be from 1 to 24'
  ):
    baselines.fit_pca([x_BD], n_components=25)
  with pytest.raises(errors.UserError, match=r'shape \(600, 23\): .* width 24'):
    baselines.fit_pca([x_BD, x_BD[:, 1:]])
  with pytest.raises(errors.UserError, match='FVU of 5 rows without variance'):
    baselines.pca_fvu(baselines.fit_pca([x_BD]), [np.ones((5, 24))])
  x_BD[3, 4] = np.nan
  with pytest.raises(errors.UserError, match='1 of 600 rows'):
    baselines.fit_pca([x_BD])


def _task(seed=0, n_prompts=300, n_latents=40, width=16):
  """Labels that one latent knows, spread thinly over unequal channels."""
  rng = np.random.default_rng(seed)
  y_P = np.arange(n_prompts) % 2
  unit_PD = rng.standard_normal((n_prompts, width))
  unit_PD += 2.5 * (y_P[:, None] - 0.5) / np.sqrt(width)
  resid_PD = unit_PD * 2.0 ** np.arange(width) + 100
  feature_PN = rng.standard_normal((n_prompts, n_latents))
  feature_PN[:, 7] = unit_PD.sum(1)
  cut = 2 * n_prompts // 3
  sides = (feature_PN, resid_PD, y_P)
  return *(a[:cut] for a in sides), *(a[cut:] for a in sides)


def test_activations_know_less_than_the_latent_that_knows():
  train_PN, train_PD, train_P, test_PN, test_PD, test_P = _task()
  score = probes.score_task(train_PN, train_P, test_PN, test_P)
  sides = train_PD, train_P, test_PD, test_P
  scores = baselines.of_activations(*sides)
  assert scores.keys() < baselines.CONTROL_DEFINITIONS.keys()
  assert score.best_latent == 7 and score.test_auc > 0.9
  for name, control in scores.items():
    assert control.test_auc < score.test_auc - 0.05, name
    assert control.test_ce > score.test_ce + 0.05, name
  assert scores['channel'] == probes.score_task(*sides)
  assert scores == baselines.of_activations(*sides)


def test_the_principal_direction_is_found_where_it_is_the_label():
  rng = np.random.default_rng(0)
  y_P = np.arange(200) % 2
  # Far from zero, where a product in float32 would round it away.
  resid_PD = rng.standard_normal((200, 12)) + 3 * y_P[:, None] + 1e4
  scores = baselines.of_activations(
    resid_PD[:120], y_P[:120], resid_PD[120:], y_P[120:]
  )
  assert scores['pca'].best_latent == 0
  assert scores['pca'].test_auc > 0.99

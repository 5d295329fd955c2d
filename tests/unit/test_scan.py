"""The scan on one device against what is computed densely."""

import dataclasses

import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.probing import baselines
from sae_jax.probing.scan import codes as codes_lib
from sae_jax.probing.scan import rows
from tests.support import planted, scans

# Statistics alone: each kind of example takes long to compile.
FEW = {'top_examples': 0, 'random_examples': 0, 'near_examples': 0}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return scans.data(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def scanned(data, tmp_path_factory):
  """A scan by TopK with all that there is, and what it was of."""
  of, control = scans.trained(data), scans.trained(data, 3, n_latents=32)
  workdir = tmp_path_factory.mktemp('scan')
  result = scans.scan(
    scans.config(), of, data, workdir, controls={'other': control}
  )
  return result, of, control


def assert_columns(result, scan_config, of, data):
  want, vals_RN, idx_RN = scans.naive(scan_config, of, data)
  columns = scans.columns(result)
  scans.assert_same({name: columns[name] for name in want}, want, 2e-6)
  codes = codes_lib.open_codes(result.codes)
  vals_RK, idx_RK = codes.read(0, codes.n_rows)
  assert len(vals_RK) == len(vals_RN)
  np.testing.assert_allclose(vals_RK, vals_RN[:, : codes.k], atol=1e-6)
  np.testing.assert_array_equal(idx_RK, idx_RN[:, : codes.k])
  assert not vals_RN[:, codes.k :].any()
  return codes


def test_columns_and_codes_equal_dense_ones(scanned, data):
  result, of, _ = scanned
  codes = assert_columns(result, scans.config(), of, data)
  assert (codes.k, codes.n_rows) == (scans.K, 900)
  # Controls: a latent's neighbour, and the row after.
  want, *_ = scans.naive(scans.config(), of, data)
  for name in want:
    assert (np.roll(want[name], 1, 0) != want[name]).any()
  assert (result.rows, result.most_active) == (900, scans.K)
  # A control of the test of twins.
  assert result.tied == 0


def test_metrics_are_those_that_training_sums(scanned, data):
  result, of, control = scanned
  test = data.test_rows[:250]
  for name, autoencoder_ in (('trained', of), ('other', control)):
    want = scans.naive_quality(autoencoder_, data, test)
    got = result.quality[name]
    for field in dataclasses.fields(want):
      np.testing.assert_allclose(
        getattr(got, field.name), getattr(want, field.name), rtol=1e-6
      )
    np.testing.assert_array_equal(got.density_N, want.density_N)
  # Control: another autoencoder has other metrics.
  assert abs(result.metrics.nmse - result.quality['other'].nmse) > 1e-3


def test_curves_by_position_and_the_ratio_of_norms(scanned, data):
  result, of, _ = scanned
  test = data.test_rows[:250]
  raw_RD = data.read_rows(test.start, test.stop)
  x_RD, _ = autoencoder.preprocess(of.config, of.sae, raw_RD)
  vals_RK, idx_RK = autoencoder.encode(of.config, of.sae, x_RD)
  x_RD = np.asarray(x_RD, np.float64)
  y_RD = np.asarray(autoencoder.decode(of.sae, vals_RK, idx_RK), np.float64)
  norms = np.linalg.norm(x_RD, axis=1), np.linalg.norm(y_RD, axis=1)
  of_row = {
    'nmse': ((x_RD - y_RD) ** 2).sum(1) / of.mse_of_mean,
    'cosine': (x_RD * y_RD).sum(1) / norms[0] / norms[1],
    'l0': (np.asarray(vals_RK) > 0).sum(1),
    'norm_ratio': norms[1] / norms[0],
  }
  _, position_R = rows.documents_and_positions(data, test.start, test.stop)
  curves = result.curves['trained']
  np.testing.assert_array_equal(
    curves['tokens'], np.bincount(position_R, minlength=20)
  )
  for name, of_R in of_row.items():
    assert np.isnan(curves[name][0])
    want_T = [of_R[position_R == t].mean() for t in range(1, 20)]
    np.testing.assert_allclose(curves[name][1:], want_T, rtol=1e-6)
    # Control: the curve is not flat, so a wrong position would be seen.
    assert name == 'l0' or np.ptp(want_T) > 1e-3
  np.testing.assert_allclose(
    result.norm_ratio['trained'], of_row['norm_ratio'].mean(), rtol=1e-6
  )


def test_fvu_of_principal_components_is_that_of_two_passes(scanned, data):
  result, of, _ = scanned

  def inputs(start, stop):
    raw_RD = data.read_rows(start, stop)
    yield autoencoder.preprocess(of.config, of.sae, raw_RD)[0]

  test = data.test_rows[:250]
  for components in (1, 3, 15):
    pca = baselines.fit_pca(inputs(0, 700), components)
    want = baselines.pca_fvu(pca, inputs(test.start, test.stop))[-1]
    np.testing.assert_allclose(
      result.fvu_pca(components), want, rtol=1e-6, atol=1e-8
    )
  # Control: of other rows it is another.
  pca = baselines.fit_pca(inputs(0, 300), 3)
  other = baselines.pca_fvu(pca, inputs(test.start, test.stop))[-1]
  assert abs(result.fvu_pca(3) - other) > 1e-4


def test_numbers_of_rows_may_pass_32_bits(scanned, data, tmp_path, monkeypatch):
  first = 2**32 - 300
  plain = rows.batch_of

  def shifted(*args):
    *others, part = args
    pca, test = (
      range(of.start + first, of.stop + first) for of in (part.pca, part.test)
    )
    part = dataclasses.replace(
      part,
      start=part.start + first,
      stop=part.stop + first,
      pca=pca,
      test=test,
    )
    return plain(*others, part)

  monkeypatch.setattr(rows, 'batch_of', shifted)
  result, of, control = scanned
  got = scans.scan(
    scans.config(), of, data, tmp_path, controls={'other': control}
  )
  columns, want = scans.columns(got), scans.columns(result)
  for name in ('top_rows', 'near_rows'):
    rows_NM = np.where(want[name] >= 0, want[name] + first, -1)
    np.testing.assert_array_equal(columns[name], rows_NM)
  assert (columns['top_rows'] >= 2**32).any()
  for name in ('count', 'top_values', 'random_rows'):
    # Other numbers of rows are another sample.
    same = np.array_equal(columns[name], want[name])
    assert same == (name != 'random_rows')
  assert first <= columns['random_rows'].max() < first + 900


@pytest.mark.parametrize(
  'activation, preprocessing',
  [
    ('topk', 'layer_norm'),
    ('batchtopk', 'dataset'),
    ('jumprelu', 'none'),
    ('relu', 'center_unit_norm'),
  ],
)
def test_every_nonlinearity_and_preprocessing(
  data, tmp_path, activation, preprocessing, monkeypatch
):
  # ReLU has more active latents than the first codes have room for.
  monkeypatch.setattr('sae_jax.probing.scan.run._FIRST_WIDTH', 4)
  # Batches do not divide 900 rows, and there are no test rows among them.
  config = scans.config(**FEW, batch_rows=250, pca_rows=0)
  of = scans.trained(data, activation=activation, preprocessing=preprocessing)
  result = scans.scan(config, of, data, tmp_path)
  codes = assert_columns(result, config, of, data)
  if activation == 'relu':
    assert codes.k == 64 and 32 < result.most_active <= 64
  want = scans.naive_quality(of, data, data.test_rows[:250])
  np.testing.assert_allclose(result.metrics.nmse, want.nmse, rtol=1e-6)
  np.testing.assert_allclose(result.metrics.l0, want.l0, rtol=1e-6)
  np.testing.assert_array_equal(result.metrics.density_N, want.density_N)


def test_rows_of_components_alone_are_no_features(data, tmp_path):
  config = scans.config(**FEW, batch_rows=250, feature_rows=300)
  of = scans.trained(data, preprocessing='layer_norm')
  result = scans.scan(config, of, data, tmp_path)
  assert_columns(result, config, of, data)
  want = inputs_fvu(of, data, 700)
  np.testing.assert_allclose(result.fvu_pca(3), want, rtol=1e-6)
  # Control: the rows of features alone have other components.
  assert abs(want - inputs_fvu(of, data, 300)) > 1e-4


def inputs_fvu(of, data, fitted):
  """FVU of three components of the first rows, on the test rows."""

  def inputs(start, stop):
    raw_RD = data.read_rows(start, stop)
    yield autoencoder.preprocess(of.config, of.sae, raw_RD)[0]

  test = data.test_rows[:250]
  pca = baselines.fit_pca(inputs(0, fitted), 3)
  return baselines.pca_fvu(pca, inputs(test.start, test.stop))[-1]


def test_a_row_that_is_not_finite_is_named(tmp_path):
  rows_RD = planted.activations(1140)
  rows_RD[700, 3] = np.nan
  data = scans.data(tmp_path, rows_RD=rows_RD)
  good = scans.data(tmp_path / 'good')
  with pytest.raises(
    errors.UserError, match=r'^row 700 of store .* not finite'
  ):
    scans.scan(
      scans.config(**FEW), scans.trained(good), data, tmp_path / 'scan'
    )


def test_a_gap_below_rounding_is_counted(data, tmp_path):
  of = scans.trained(data, preprocessing='layer_norm')
  w_enc_ND = np.array(of.sae.w_enc_ND)
  # Each latent has a twin: with an odd k one of a pair is just left out.
  w_enc_ND[1::2] = w_enc_ND[::2]
  sae = of.sae.replace(w_enc_ND=w_enc_ND, b_lat_N=0 * of.sae.b_lat_N)
  config = scans.config(**FEW, batch_rows=250, pca_rows=0)
  odd = dataclasses.replace(of.config, k=3)
  result = scans.scan(
    config, dataclasses.replace(of, sae=sae, config=odd), data, tmp_path
  )
  assert result.tied == 900


def test_nothing_that_varies_is_an_error(tmp_path):
  rows_RD = planted.activations(1140)
  data = scans.data(tmp_path, rows_RD=rows_RD)
  of = scans.trained(data, preprocessing='layer_norm')
  rows_RD[data.test_rows.start :] = rows_RD[0]
  same = scans.data(tmp_path / 'same', rows_RD=rows_RD)
  config = scans.config(**FEW, batch_rows=250, pca_rows=0)
  with pytest.raises(errors.UserError, match='differ by no more than rounding'):
    scans.scan(config, of, same, tmp_path / 'scan')

"""The autoencoder's functions against float64 numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from sae_jax import autoencoder, errors
from sae_jax.ops import rows as rows_lib

# Their results are compared, not their speed.
compiled = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
preprocess = compiled(autoencoder.preprocess, static_argnums=0)
restore = compiled(autoencoder.restore)
encode = compiled(autoencoder.encode, static_argnums=0)
decode = compiled(autoencoder.decode)
geometric_median = compiled(autoencoder.geometric_median)


@functools.cache
def make(preprocessing='center_unit_norm', **kwargs):
  values = {'d_model': 24, 'n_latents': 96, 'k': 6} | kwargs
  config = autoencoder.SaeConfig(preprocessing=preprocessing, **values)
  rng = np.random.default_rng(0)
  raw_BD = 3 + rng.standard_normal((500, 24)) * np.linspace(0.5, 4, 24)
  raw_BD = raw_BD.astype(np.float32)
  raw_BD.setflags(write=False)
  sae = autoencoder.init_weights(config, jax.random.key(0))
  start = None
  if config.decoder_init == 'data':
    start = autoencoder.data_start(config, raw_BD, 1)
  sae, mse_of_mean = autoencoder.fit_inputs(
    config, sae, jnp.asarray(raw_BD), start
  )
  return config, sae, raw_BD, mse_of_mean


def preprocessed(name, raw_BD):
  """The preprocessings' definitions, in float64."""
  raw_BD = raw_BD.astype(np.float64)
  centred = raw_BD - raw_BD.mean(1, keepdims=True)
  if name == 'none':
    return raw_BD
  if name == 'center_unit_norm':
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)
  if name == 'layer_norm':
    return centred / (raw_BD.std(1, ddof=1, keepdims=True) + 1e-5)
  if name == 'unit_rms':
    return raw_BD / np.sqrt((raw_BD**2).mean(1, keepdims=True))
  centred = raw_BD - raw_BD.mean(0)
  return centred / np.sqrt((centred**2).sum(1).mean())


def test_the_decoder_bias_begins_at_the_median_or_at_the_mean():
  _, sae, raw_BD, _ = make()
  x_BD = preprocessed('center_unit_norm', raw_BD)
  median_D = geometric_median(jnp.asarray(x_BD, jnp.float32))
  np.testing.assert_allclose(sae.b_pre_D, median_D, atol=1e-6)
  _, of_mean, _, mse_of_mean = make(bias_init='mean')
  np.testing.assert_allclose(of_mean.b_pre_D, x_BD.mean(0), atol=1e-6)
  # Controls: they differ, and NMSE's constant is that of the mean in both.
  assert abs(np.asarray(median_D) - x_BD.mean(0)).max() > 1e-4
  np.testing.assert_allclose(mse_of_mean, make()[3], rtol=1e-6)


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
def test_preprocess_is_its_definition_and_restore_undoes_it(name):
  config, sae, raw_BD, _ = make(name)
  x_BD, affine = preprocess(config, sae, raw_BD)
  np.testing.assert_allclose(
    x_BD, preprocessed(name, raw_BD), rtol=2e-5, atol=2e-5
  )
  np.testing.assert_allclose(
    restore(affine, x_BD), raw_BD, rtol=1e-4, atol=1e-4
  )


def test_layer_norm_of_a_faint_token_is_its_definition():
  # Small enough that it matters where the epsilon is added.
  config, sae, raw_BD, _ = make('layer_norm')
  faint_BD = 1e-4 * raw_BD
  x_BD, _ = preprocess(config, sae, faint_BD)
  want_BD = preprocessed('layer_norm', faint_BD)
  np.testing.assert_allclose(x_BD, want_BD, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
@pytest.mark.parametrize('level', [7.0, 0.1, 1000.1, -3.3, 0.0])
def test_a_constant_token_is_finite(name, level):
  config, sae, _, _ = make(name)
  x_BD, affine = preprocess(config, sae, np.full((2, 24), level, np.float32))
  assert np.isfinite(x_BD).all()
  if name == 'center_unit_norm':
    np.testing.assert_array_equal(x_BD, 0)
    # Control: a token that varies a little is brought to unit norm.
    other_BD = level + 1e-3 * (1 + abs(level)) * np.eye(2, 24)
    other, _ = preprocess(config, sae, other_BD.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(other, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    restore(affine, x_BD),
    np.full((2, 24), level),
    rtol=1e-5,
    atol=1e-6,
  )


def test_half_precision_activations_are_widened():
  config, sae, raw_BD, _ = make()
  x_BD, _ = preprocess(config, sae, jnp.bfloat16(raw_BD))
  assert x_BD.dtype == jnp.float32


def test_encode_decode_equal_a_float64_definition():
  config, sae, raw_BD, _ = make()
  x_BD, _ = preprocess(config, sae, raw_BD)
  vals_BK, idx_BK = encode(config, sae, x_BD)
  output_BD = decode(sae, vals_BK, idx_BK)

  wide = {
    name: np.asarray(array, np.float64)
    for name, array in autoencoder.to_dict(sae).items()
  }
  x64_BD = np.asarray(x_BD, np.float64)
  pre_BN = (x64_BD - wide['b_pre_D']) @ wide['w_enc_ND'].T + wide['b_lat_N']
  want_BK = np.argsort(-pre_BN, axis=1)[:, : config.k]
  np.testing.assert_array_equal(idx_BK, want_BK)
  z_BK = np.maximum(np.take_along_axis(pre_BN, want_BK, 1), 0)
  np.testing.assert_allclose(vals_BK, z_BK, rtol=1e-4, atol=1e-6)
  want_BD = (z_BK[:, :, None] * wide['w_dec_ND'][want_BK]).sum(1)
  np.testing.assert_allclose(
    output_BD, want_BD + wide['b_pre_D'], rtol=1e-4, atol=1e-5
  )


def test_reconstruct_is_in_the_raw_space():
  config, sae, raw_BD, _ = make('layer_norm')
  config = dataclasses.replace(config, n_latents=48, k=24)
  # An orthonormal decoder with both signs of every direction loses nothing.
  eye = np.eye(24, dtype=np.float32)
  both = np.concatenate([eye, -eye])
  zeros_N = np.zeros(48, np.float32)
  sae = sae.replace(w_enc_ND=both, w_dec_ND=both, b_lat_N=zeros_N)
  reconstruct = compiled(autoencoder.reconstruct, static_argnums=0)
  got = reconstruct(config, sae, raw_BD)
  np.testing.assert_allclose(got, raw_BD, rtol=1e-4, atol=1e-4)
  # Control: without the way back it is far off.
  x_BD, _ = preprocess(config, sae, raw_BD)
  inside = decode(sae, *encode(config, sae, x_BD))
  assert abs(np.asarray(inside) - raw_BD).max() > 1


def test_fresh_autoencoder_fits_its_inputs():
  config, sae, raw_BD, mse_of_mean = make()
  norms_N = np.linalg.norm(sae.w_dec_ND, axis=1)
  np.testing.assert_allclose(norms_N, 1, rtol=1e-5)
  # The encoder is the decoder's transpose up to one factor.
  factor = np.asarray(sae.w_enc_ND) / np.asarray(sae.w_dec_ND)
  np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-4)
  x_BD, _ = preprocess(config, sae, raw_BD)
  output_BD = decode(sae, *encode(config, sae, x_BD))
  np.testing.assert_allclose(
    np.linalg.norm(np.subtract(output_BD, sae.b_pre_D)),
    np.linalg.norm(np.subtract(x_BD, sae.b_pre_D)),
    rtol=1e-4,
  )
  wide = np.asarray(x_BD, np.float64)
  np.testing.assert_allclose(
    mse_of_mean, ((wide - wide.mean(0)) ** 2).sum(1).mean(), rtol=1e-4
  )


def test_first_encoder_is_the_transpose_or_drawn_apart():
  _, sae, _, _ = make()
  w_enc_ND, w_dec_ND = map(np.asarray, (sae.w_enc_ND, sae.w_dec_ND))
  cosine_N = (w_enc_ND * w_dec_ND).sum(1) / np.linalg.norm(w_enc_ND, axis=1)
  np.testing.assert_allclose(cosine_N, 1, rtol=1e-5)
  _, apart, _, _ = make(encoder_init='independent')
  np.testing.assert_array_equal(apart.w_dec_ND, sae.w_dec_ND)
  w_enc_ND = np.asarray(apart.w_enc_ND)
  norms_N = np.linalg.norm(w_enc_ND, axis=1)
  cosine_N = (w_enc_ND * np.asarray(apart.w_dec_ND)).sum(1) / norms_N
  assert abs(cosine_N).mean() < 0.3
  # Rows of one norm, as the transpose has them.
  np.testing.assert_allclose(norms_N, norms_N[0], rtol=1e-5)


def half_whitened(x_BD, b_pre_D):
  """Unit rows of (x - b_pre) C^(-1/4), in float64."""
  x_BD = np.asarray(x_BD, np.float64)
  variance_D, axes_DD = np.linalg.eigh(np.cov(x_BD.T, bias=True))
  stretch_D = np.maximum(variance_D, 1e-6 * variance_D[-1]) ** -0.25
  rows_BD = (x_BD - np.asarray(b_pre_D)) @ (axes_DD * stretch_D) @ axes_DD.T
  return rows_BD / np.linalg.norm(rows_BD, axis=1, keepdims=True)


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
@pytest.mark.parametrize('encoder_init', ['transposed', 'independent'])
def test_a_decoder_from_the_data_is_of_different_rows_half_whitened(
  name, encoder_init
):
  values = {'encoder_init': encoder_init, 'encoder_gain': 'least_squares'}
  config, sae, raw_BD, _ = make(name, decoder_init='data', **values)
  w_dec_ND = np.asarray(sae.w_dec_ND, np.float64)
  np.testing.assert_allclose(np.linalg.norm(w_dec_ND, axis=1), 1, rtol=1e-5)
  x_BD, _ = preprocess(config, sae, raw_BD)
  rows_BD = half_whitened(x_BD, sae.b_pre_D)
  nearest_N = (w_dec_ND @ rows_BD.T).argmax(1)
  assert len(set(nearest_N)) == 96
  # What is left is a tenth of the random row, once both are put together.
  _, random, _, _ = make(name, **values)
  other_ND = rows_BD[nearest_N] + 0.1 * np.asarray(random.w_dec_ND)
  other_ND /= np.linalg.norm(other_ND, axis=1, keepdims=True)
  np.testing.assert_allclose(w_dec_ND, other_ND, atol=2e-4)
  # Control: without the whitening they are other rows.
  plain_BD = np.asarray(x_BD - sae.b_pre_D, np.float64)
  plain_BD /= np.linalg.norm(plain_BD, axis=1, keepdims=True)
  assert (w_dec_ND @ plain_BD.T).max(1).mean() < 0.99
  w_enc_ND = np.asarray(sae.w_enc_ND, np.float64)
  cosine_N = (w_enc_ND * w_dec_ND).sum(1) / np.linalg.norm(w_enc_ND, axis=1)
  if encoder_init == 'transposed':
    np.testing.assert_allclose(cosine_N, 1, rtol=1e-5)
  else:
    assert abs(cosine_N).mean() < 0.5


def test_a_decoder_from_fewer_rows_than_latents_is_refused():
  with pytest.raises(
    errors.UserError, match=r'501 latents .* from 500 rows .* sample_rows 501'
  ):
    make(n_latents=501, decoder_init='data')


@pytest.mark.parametrize('activation', ['topk', 'relu'])
@pytest.mark.parametrize('decoder_init', ['random', 'data'])
def test_the_least_squares_gain_has_the_least_error(activation, decoder_init):
  values = {'activation': activation, 'decoder_init': decoder_init}
  config, sae, raw_BD, _ = make(encoder_gain='least_squares', **values)
  x_BD, _ = preprocess(config, sae, raw_BD)

  def error(sae, factor):
    scaled = sae.replace(w_enc_ND=factor * sae.w_enc_ND)
    output_BD = decode(scaled, *encode(config, scaled, x_BD))
    return float(((output_BD - x_BD) ** 2).sum())

  errors_of = [error(sae, factor) for factor in (0.95, 1.0, 1.05)]
  assert min(errors_of) == errors_of[1]
  # Control: the norm's gain is not the best.
  _, longer, _, _ = make(encoder_gain='norm', **values)
  assert error(longer, 1.0) > 1.05 * errors_of[1]


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
def test_first_thresholds_are_small_beside_the_tokens_spread(name):
  _, sae, _, mse_of_mean = make(name, activation='jumprelu')
  np.testing.assert_allclose(
    np.exp(sae.extra['log_threshold_N']),
    1e-3 * np.sqrt(mse_of_mean),
    rtol=1e-5,
  )
  assert not make(name)[1].extra


def sum_of_distances(point_D, points_BD):
  return np.linalg.norm(points_BD - point_D, axis=1).sum()


@pytest.mark.parametrize('kind', ['cloud', 'duplicates', 'on a point', 'line'])
def test_geometric_median_is_the_minimum(kind):
  rng = np.random.default_rng(5)
  points_BD = rng.standard_normal((60, 3)) + np.array([5, 0, -1])
  if kind == 'duplicates':
    points_BD[:25] = points_BD[0]
  elif kind == 'on a point':
    # More than half of the weight: the median is that very point, where
    # plain Weiszfeld divides by zero.
    points_BD[:40] = [1.0, 2.0, 3.0]
  elif kind == 'line':
    # Skewed, and odd in number, so that the minimum is one point.
    points_BD = rng.exponential(size=(61, 1)) * [1.0, 0.0, 0.0]
  with jax.enable_x64(True):
    got_D = np.asarray(
      geometric_median(points_BD, tolerance=1e-12, max_steps=20_000)
    )
  assert np.isfinite(got_D).all()
  best = min(
    optimize.minimize(
      sum_of_distances, start, (points_BD,), method='Nelder-Mead',
      options={'xatol': 1e-10, 'fatol': 1e-12, 'maxiter': 10_000},
    ).fun
    for start in (points_BD.mean(0), np.median(points_BD, axis=0))
  )  # fmt: skip
  assert sum_of_distances(got_D, points_BD) <= best * (1 + 1e-7)
  # Control: the mean is not the geometric median of these.
  assert sum_of_distances(points_BD.mean(0), points_BD) > best * (1 + 1e-5)


def test_geometric_median_starts_on_a_data_point():
  # The mean is a data point that is not the median.
  points_BD = np.float32([0, 0, 0, 1, 4, 1])[:, None]
  got = geometric_median(points_BD, max_steps=2000)
  assert sum_of_distances(np.asarray(got), points_BD) < 6.01


def test_geometric_median_stays_on_a_heavy_point_it_starts_from():
  # The mean is 0, where five of nine points lie: the median. The pull of the
  # others is less than what holds it there; Weiszfeld's step would leave.
  points_BD = np.float32([0] * 5 + [3, -1, -1, -1])[:, None]
  assert geometric_median(points_BD) == 0


def test_geometric_median_of_equal_points_is_that_point():
  got = geometric_median(np.full((9, 4), 2.5, np.float32))
  np.testing.assert_array_equal(got, np.full(4, 2.5))


def test_unit_rows_leaves_a_zero_row():
  unit_rows = compiled(rows_lib.unit_rows)
  rows = unit_rows(np.float32([[3, 4], [0, 0]]))
  np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_bad_configs_are_refused():
  with pytest.raises(errors.UserError, match='k 9 exceeds n_latents 8'):
    autoencoder.SaeConfig(n_latents=8, k=9)
  with pytest.raises(
    errors.UserError, match="preprocessing 'fancy' is not known"
  ):
    autoencoder.SaeConfig(preprocessing='fancy')

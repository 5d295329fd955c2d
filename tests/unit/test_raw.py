"""Raw activations of any leading shape, against numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.autoencoder import nonlinearity
from sae_jax.autoencoder import raw as raw_lib
from sae_jax.checkpoint import Trained

D, N, K = 12, 40, 5
LEADING = [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (2, 3, 4)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of four tokens, so that most inputs need several."""
  monkeypatch.setattr(raw_lib, '_BLOCK_ELEMENTS', 4 * N)


def activations(*leading, seed=1):
  rng = np.random.default_rng(seed)
  raw = 3 + rng.standard_normal((*leading, D)) * np.linspace(0.5, 4, D)
  return raw.astype(np.float32)


def make(preprocessing='center_unit_norm', activation='topk'):
  config = autoencoder.SaeConfig(
    d_model=D, n_latents=N, k=K, preprocessing=preprocessing,
    activation=activation, encoder_init='independent',
  )  # fmt: skip
  sae = autoencoder.init_weights(config, jax.random.key(0))
  sae, mse = autoencoder.fit_inputs(config, sae, activations(500, seed=0))
  sae = sae.replace(
    b_lat_N=0.1 * jax.random.normal(jax.random.key(1), (N,)),
    b_pre_D=sae.b_pre_D + 0.1,
  )
  return Trained(config, sae, float(mse), step=1)


def reference(trained, raw_BD):
  """Dense codes, the autoencoder's own output and the raw one, in float64."""
  raw_BD = np.asarray(raw_BD, np.float64)
  sae = {
    name: np.asarray(array, np.float64)
    for name, array in autoencoder.to_dict(trained.sae).items()
  }
  shift, scale = raw_BD.mean(1, keepdims=True), 1.0
  if trained.config.preprocessing == 'center_unit_norm':
    scale = np.linalg.norm(raw_BD - shift, axis=1, keepdims=True)
  elif trained.config.preprocessing == 'layer_norm':
    # The epsilon is not on the way back.
    scale = raw_BD.std(1, ddof=1, keepdims=True)
  elif trained.config.preprocessing == 'unit_rms':
    shift, scale = 0.0, np.sqrt((raw_BD**2).mean(1, keepdims=True))
  elif trained.config.preprocessing == 'dataset':
    shift, scale = sae['data_mean_D'], sae['data_scale']
  else:
    shift = 0.0
  x_BD = (raw_BD - shift) / scale
  product_BN = (x_BD - sae['b_pre_D']) @ sae['w_enc_ND'].T
  z_BN = product_BN + sae['b_lat_N']
  if trained.config.activation == 'topk':
    place_BN = np.argsort(np.argsort(-z_BN, axis=1), axis=1)
    z_BN = np.where(place_BN < K, z_BN, 0)
  threshold = sae.get('threshold', np.exp(sae.get('log_threshold_N', -np.inf)))
  z_BN = np.where(z_BN > threshold, z_BN, 0)
  if trained.config.activation == 'groupmax':
    groups_BGM = z_BN.reshape(len(z_BN), K, -1)
    is_most_BGM = groups_BGM == groups_BGM.max(-1, keepdims=True)
    z_BN = np.where(is_most_BGM, groups_BGM, 0).reshape(z_BN.shape)
  if trained.config.activation == 'gated':
    magnitude_BN = product_BN * np.exp(sae['r_mag_N']) + sae['b_mag_N']
    z_BN = np.where(z_BN > 0, np.maximum(magnitude_BN, 0), 0)
  own_BD = z_BN @ sae['w_dec_ND'] + sae['b_pre_D']
  return z_BN, own_BD, own_BD * scale + shift


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
@pytest.mark.parametrize('activation', nonlinearity.NAMES)
def test_codes_and_raw_output_are_their_definitions(name, activation):
  trained = make(name, activation)
  raw_BD = activations(23)
  codes = trained.encode(raw_BD)
  z_BN, own_BD, again_BD = reference(trained, raw_BD)
  np.testing.assert_allclose(codes.dense(), z_BN, rtol=1e-4, atol=1e-5)
  decoded_BD = trained.decode(codes)
  np.testing.assert_allclose(decoded_BD, again_BD, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(trained.reconstruct(raw_BD), decoded_BD)
  # Made by hand, codes are of the autoencoder's own space.
  by_hand = raw_lib.Codes(codes.values, codes.indices, N)
  np.testing.assert_allclose(
    trained.decode(by_hand), own_BD, rtol=1e-4, atol=1e-4
  )
  # Control: the two spaces differ, and so does another token's map.
  if name == 'none':
    np.testing.assert_allclose(own_BD, again_BD)
    return
  assert np.abs(own_BD - again_BD).max() > 0.1
  if codes.affine.scale.shape[0] > 1:
    other = jax.tree.map(lambda a: np.roll(a, 1, axis=0), codes.affine)
    wrong_BD = trained.decode(codes.replace(affine=other))
    assert np.abs(wrong_BD - again_BD).max() > 0.1


@pytest.mark.parametrize('name', autoencoder.PREPROCESSING)
@pytest.mark.parametrize('leading', LEADING, ids=str)
@pytest.mark.parametrize('library', [np, jnp], ids=['numpy', 'jax'])
def test_leading_shapes_are_kept_and_tokens_stand_alone(name, leading, library):
  trained = make(name)
  raw = activations(*leading)
  codes = trained.encode(library.asarray(raw))
  assert codes.values.shape == codes.indices.shape == (*leading, K)
  assert codes.dense().shape == (*leading, N)
  output = trained.decode(codes)
  assert output.shape == raw.shape
  np.testing.assert_array_equal(
    trained.reconstruct(library.asarray(raw)), output
  )
  kind = np.ndarray if library is np else jax.Array
  leaves = jax.tree.leaves((codes, codes.dense(), output))
  assert all(isinstance(leaf, kind) for leaf in leaves)
  *_, want_BD = reference(trained, raw.reshape(-1, D))
  np.testing.assert_allclose(
    np.reshape(output, (-1, D)), want_BD, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('library', [np, jnp], ids=['numpy', 'jax'])
def test_half_precision_is_widened(library):
  trained = make()
  half = activations(9).astype(ml_dtypes.bfloat16)
  codes = trained.encode(library.asarray(half))
  assert codes.values.dtype == trained.decode(codes).dtype == np.float32
  want_BN, _, want_BD = reference(trained, half)
  np.testing.assert_allclose(codes.dense(), want_BN, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    trained.decode(codes), want_BD, rtol=1e-4, atol=1e-4
  )
  # Control: rounding to it is seen.
  assert np.abs(trained.reconstruct(activations(9)) - want_BD).max() > 1e-3


def test_double_precision_is_kept_where_jax_has_it():
  trained = make()
  raw_BD = activations(9).astype(np.float64)
  assert trained.reconstruct(raw_BD).dtype == np.float32
  with jax.enable_x64(True):
    wide = dataclasses.replace(
      trained,
      sae=jax.tree.map(lambda a: np.asarray(a, np.float64), trained.sae),
    )
    output_BD = wide.reconstruct(raw_BD)
  assert output_BD.dtype == np.float64
  *_, want_BD = reference(trained, raw_BD)
  np.testing.assert_allclose(output_BD, want_BD, rtol=1e-12)


def test_changed_values_are_decoded_with_the_tokens_own_map():
  trained = make('layer_norm')
  raw_BD = activations(6)
  codes = trained.encode(raw_BD)
  louder = codes.replace(values=2 * codes.values)
  z_BN, _, again_BD = reference(trained, raw_BD)
  scale_B1 = raw_BD.std(1, ddof=1, keepdims=True)
  added_BD = scale_B1 * (z_BN @ np.asarray(trained.sae.w_dec_ND))
  np.testing.assert_allclose(
    trained.decode(louder), again_BD + added_BD, rtol=1e-4, atol=1e-3
  )
  assert np.abs(added_BD).max() > 0.1


def test_they_are_the_functions_of_preprocessed_activations():
  trained = make()
  raw_BD = activations(4)
  x_BD, _ = autoencoder.preprocess(trained.config, trained.sae, raw_BD)
  vals_BK, idx_BK = autoencoder.encode(trained.config, trained.sae, x_BD)
  codes = trained.encode(raw_BD)
  np.testing.assert_allclose(codes.values, vals_BK, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(codes.indices, idx_BK)
  np.testing.assert_allclose(
    trained.reconstruct(raw_BD),
    autoencoder.reconstruct(trained.config, trained.sae, raw_BD),
    rtol=1e-5,
    atol=1e-5,
  )


def test_they_run_under_jit():
  trained = make('dataset')
  raw_BD = jnp.asarray(activations(6))
  codes = jax.jit(trained.encode)(raw_BD)
  want = trained.encode(raw_BD)
  np.testing.assert_array_equal(codes.indices, want.indices)
  np.testing.assert_allclose(
    jax.jit(trained.decode)(codes), trained.decode(want), rtol=1e-5, atol=1e-5
  )


def test_many_tokens_compile_one_block_and_the_rest(monkeypatch):
  trained = make()
  shapes = []
  whole = raw_lib._encode

  def seen(config, sae, raw_BD):
    shapes.append(raw_BD.shape[0])
    return whole(config, sae, raw_BD)

  monkeypatch.setattr(raw_lib, '_encode', seen)
  trained.encode(activations(11))
  assert shapes == [4, 4, 4]
  shapes.clear()
  trained.encode(activations(2, 3))
  assert shapes == [4, 2]


def test_repeated_indices_add_up_and_zeros_do_nothing():
  codes = raw_lib.Codes(np.float32([1, 2, 0]), np.int32([7, 7, 3]), n_latents=N)
  dense_N = np.zeros(N)
  dense_N[7] = 3
  np.testing.assert_array_equal(codes.dense(), dense_N)
  trained = make('none')
  sae = trained.sae
  np.testing.assert_allclose(
    trained.decode(codes), 3 * sae.w_dec_ND[7] + sae.b_pre_D, rtol=1e-6
  )


def test_what_does_not_fit_is_said_with_its_numbers():
  trained = make()
  for call in (trained.encode, trained.reconstruct):
    with pytest.raises(errors.UserError, match=r'\(3, 5\).* reads width 12'):
      call(np.zeros((3, 5), np.float32))
    with pytest.raises(errors.UserError, match=r'shape \(\),.* width 12'):
      call(np.float32(1))
  codes = trained.encode(activations(3))
  for changed, message in (
    ({'indices': codes.indices[:2]}, r'\(3, 5\) and indices of shape \(2, 5\)'),
    ({'n_latents': 41}, 'codes of 41 latents, the autoencoder has 40'),
    ({'indices': codes.indices + N}, 'of 40 latents: give 0 to 39'),
    ({'indices': codes.indices - N}, 'of 40 latents: give 0 to 39'),
    (
      {'values': codes.values[:2], 'indices': codes.indices[:2]},
      r'shape \(2, 5\) and the affine map of tokens \(3,\)',
    ),
  ):
    with pytest.raises(errors.UserError, match=message) as caught:
      trained.decode(codes.replace(**changed))
    assert '\n' not in str(caught.value)

"""What is folded into weights leaves the function as it was."""

import dataclasses

import numpy as np
import pytest

from sae_jax.interchange import folding, registry
from sae_jax.storage import tensors
from tests.support import interchange_reference as reference
from tests.support.made_autoencoders import (
  base,
  changed,
  distance,
  refused,
  TOPK,
  transcoder,
  written,
  X,
)

FOLDS = [
  {'nonlinearity': 'topk', 'k': 4, 'rescale_by_decoder_norm': True},
  {
    'nonlinearity': 'jumprelu',
    'rescale_by_decoder_norm': True,
    'normalisation': 'dataset',
    'scale_in': 0.5,
    'scale_out': 3.0,
    'subtract_b_dec': True,
  },
  {
    'nonlinearity': 'gated',
    'rescale_by_decoder_norm': True,
    'subtract_b_dec': True,
  },
  {'nonlinearity': 'gated'},
  {
    'nonlinearity': 'relu',
    'normalisation': 'dataset',
    'scale_in': 0.7,
    'scale_out': 0.7,
    'subtract_b_dec': True,
  },
  {'nonlinearity': 'relu', 'normalisation': 'layer_norm'},
  {'nonlinearity': 'relu', 'subtract_b_dec': True},
]


def by_columns(autoencoder):
  """The same, as of a file that has the matrices in the other order."""
  turned = {
    name: tensors.from_array(tensor.read().T.copy()).T
    for name, tensor in autoencoder.tensors.items()
    if name in ('w_enc_ND', 'w_dec_ND')
  }
  return dataclasses.replace(
    changed(autoencoder, turned), transposed=frozenset(turned)
  )


@pytest.mark.parametrize('semantics', FOLDS)
@pytest.mark.parametrize('subtracts', [True, False])
def test_what_is_folded_is_the_same_function(semantics, subtracts, monkeypatch):
  # Blocks of some rows, the last one short.
  blocks = tensors.Tensor.blocks
  monkeypatch.setattr(
    tensors.Tensor, 'blocks', lambda self, n_bytes=0: blocks(self, 170)
  )
  autoencoder = base(**semantics)
  for one in (autoencoder, by_columns(autoencoder)):
    other = folding.folded(one, subtracts=subtracts)
    chosen = other.semantics
    assert chosen.subtract_b_dec == subtracts
    assert not chosen.rescale_by_decoder_norm
    assert chosen.normalisation != 'dataset'
    assert distance(other, one, X) < 1e-6
    # Control: without one of its tensors being the folded one it is another.
    for name, tensor in other.tensors.items():
      if tensor is not one.tensors.get(name):
        back = changed(other, {name: one.tensors[name]})
        assert distance(back, one, X) > 1e-3, name


def test_a_latent_without_a_decoder_stays_silent():
  autoencoder = base(**TOPK, rescale_by_decoder_norm=True)
  w_dec_ND = autoencoder.tensors['w_dec_ND'].read().copy()
  w_dec_ND[3] = 0
  autoencoder = changed(autoencoder, {'w_dec_ND': tensors.from_array(w_dec_ND)})
  z_BN, y_BD = reference.evaluate(folding.folded(autoencoder), X)
  assert (z_BN[:, 3] == 0).all() and np.isfinite(y_BD).all()


def test_a_relu_after_thresholds_below_zero(tmp_path):
  """circuit-tracer has none, so the thresholds rise to 0."""
  autoencoder = transcoder(nonlinearity='jumprelu')
  assert (autoencoder.tensors['threshold_N'].read() < 0).any()
  again = written(autoencoder, 'circuit_tracer', tmp_path)
  assert not again.semantics.is_rectified
  assert distance(again, autoencoder, X) < 1e-12
  thresholds = {'threshold_N': autoencoder.tensors['threshold_N']}
  assert distance(changed(again, thresholds), autoencoder, X) > 1e-2
  # Where nothing is made positive, nothing rises.
  odd = changed(autoencoder, is_rectified=False)
  again = written(odd, 'circuit_tracer', tmp_path / 'odd')
  assert distance(again, odd, X) < 1e-12
  assert 'latents below 0' in refused(
    registry.write, odd, 'saelens', tmp_path / 'b'
  )


def test_thresholds_of_a_batch(tmp_path):
  batch = base(nonlinearity='batchtopk', k=5, threshold=0.25)
  for kind, count in (('dictionary_learning', 5), ('saelens', None)):
    again = written(batch, kind, tmp_path / kind)
    assert again.semantics.k == count
    assert distance(again, batch, X) < 1e-6
  # Without k it is no BatchTopKSAE.
  unknown = changed(batch, k=None)
  again = written(unknown, 'dictionary_learning', tmp_path / 'unknown')
  assert again.semantics.nonlinearity == 'jumprelu'
  assert distance(again, unknown, X) < 1e-12


def as_type(autoencoder, dtype, *names):
  return changed(
    autoencoder,
    {
      name: tensors.from_array(tensor.read().astype(dtype))
      for name, tensor in autoencoder.tensors.items()
      if name in names or not names
    },
  )


@pytest.mark.parametrize('dtype', [tensors.BFLOAT16, np.float16, np.float64])
def test_types_are_kept_where_nothing_is_folded(dtype, tmp_path):
  kind = np.dtype(dtype)
  half = as_type(base(**TOPK), dtype)
  again = written(half, 'saelens', tmp_path / 'a')
  assert {tensor.dtype for tensor in again.tensors.values()} == {kind}
  assert again.provenance.settings['dtype'] == kind.name
  assert distance(again, half, X) < 1e-12
  # With a bias of float32 beside it all of them are.
  single = np.dtype(np.float32)
  for other in (half, as_type(base(**TOPK), dtype, 'b_enc_N')):
    again = written(other, 'sparsify', tmp_path / str(other is half))
    assert {tensor.dtype for tensor in again.tensors.values()} == {single}
    assert distance(again, other, X) < 1e-6
  mixed = as_type(base(**TOPK), dtype, 'b_enc_N')
  again = written(mixed, 'plain', tmp_path / 'plain')
  assert again.tensors['b_enc_N'].dtype == kind
  big = as_type(base(**TOPK), '>f4')
  assert distance(written(big, 'plain', tmp_path / 'big'), big, X) < 1e-12

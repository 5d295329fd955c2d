"""Autoencoders in memory, written in a format and read again."""

import dataclasses

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.interchange import imported, registry
from sae_jax.storage import tensors
from tests.support import interchange_reference as reference


def written(autoencoder, kind, folder):
  """It, written in a format and read again."""
  url = folder / ('sae.pt' if kind == 'openai' else 'sae')
  registry.write(autoencoder, kind, url)
  assert registry.identify(url)[0] == kind
  return registry.read(url)


def distance(one, other, x):
  """The largest difference, relative to what it is of."""
  return max(
    np.abs(a - b).max() / np.abs(b).max()
    for a, b in zip(reference.evaluate(one, x), reference.evaluate(other, x))
  )


def refused(call, *args):
  """The one line of the UserError that a call raises."""
  with pytest.raises(errors.UserError) as error:
    call(*args)
  line = str(error.value)
  assert line.isprintable() and len(line) < 1100
  return line


def changed(autoencoder, arrays=None, **semantics):
  """It with other tensors or semantics."""
  return dataclasses.replace(
    autoencoder,
    tensors=autoencoder.tensors | (arrays or {}),
    semantics=dataclasses.replace(autoencoder.semantics, **semantics),
  )


def base(**semantics):
  """An autoencoder in memory, whose function the semantics choose."""
  rng = np.random.default_rng(0)
  made = imported.Semantics(**semantics)
  shapes = {'w_enc_ND': (20, 6), 'w_dec_ND': (20, 6), 'b_dec_D': 6}
  if made.nonlinearity == 'gated':
    shapes |= dict.fromkeys(('r_mag_N', 'b_mag_N', 'b_gate_N'), 20)
  else:
    shapes['b_enc_N'] = 20
  if made.nonlinearity in ('jumprelu', 'batchtopk') and made.threshold is None:
    shapes['threshold_N'] = 20
  return imported.Imported(
    format='memory',
    url='memory://a',
    d_in=6,
    d_out=6,
    n_latents=20,
    tensors={
      name: tensors.from_array(rng.standard_normal(shape).astype('f'))
      for name, shape in shapes.items()
    },
    transposed=frozenset(),
    extra={},
    semantics=made,
    provenance=imported.Provenance(),
  )


TOPK = {'nonlinearity': 'topk', 'k': 4}
X = np.random.default_rng(1).standard_normal((30, 6)) * 3 + 1
TO_MLP = imported.Provenance(
  site='blocks.2.mlp_in', target_site='blocks.2.mlp_out'
)


def transcoder(**semantics):
  """It, which reads and writes sites of a feed-forward."""
  return dataclasses.replace(base(**semantics), provenance=TO_MLP)

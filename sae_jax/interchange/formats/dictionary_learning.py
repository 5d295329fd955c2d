"""The folders of dictionary_learning: config.json and ae.pt.

What each class computes is in dictionary.py and trainers/ of version 0.1.0;
`load_dictionary` chooses by `trainer.dict_class`. An `AutoEncoder` is given a
decoder of unit norm as it is loaded, so that its latents are measured by the
norm of their rows. A scale of the activations is folded in before saving.
"""

import dataclasses
import re
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config, errors
from sae_jax.interchange import folding, imported, limits, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.files import pt_writer, reading
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import files, tensors

_CONFIG, _WEIGHTS = 'config.json', 'ae.pt'
_LINEAR = {
  'encoder.weight': ('w_enc_ND', 'nd'),
  'decoder.weight': ('w_dec_ND', 'on'),
}
_ENCODER_BIAS = {'encoder.bias': ('b_enc_N', 'n')}
_TOPK = _LINEAR | _ENCODER_BIAS | {'b_dec': ('b_dec_D', 'o')}
_PLAIN = {
  'W_enc': ('w_enc_ND', 'dn'),
  'b_enc': ('b_enc_N', 'n'),
  'W_dec': ('w_dec_ND', 'no'),
  'b_dec': ('b_dec_D', 'o'),
}
_GATED = _LINEAR | {
  'decoder_bias': ('b_dec_D', 'o'),
  'r_mag': ('r_mag_N', 'n'),
  'gate_bias': ('b_gate_N', 'n'),
  'mag_bias': ('b_mag_N', 'n'),
}
_TABLES = {
  'AutoEncoder': _LINEAR | _ENCODER_BIAS | {'bias': ('b_dec_D', 'o')},
  'AutoEncoderNew': _LINEAR
  | _ENCODER_BIAS
  | {'decoder.bias': ('b_dec_D', 'o')},
  'GatedAutoEncoder': _GATED,
  'JumpReluAutoEncoder': _PLAIN | {'threshold': ('threshold_N', 'n')},
  'AutoEncoderTopK': _TOPK,
  'BatchTopKSAE': _TOPK,
  'MatryoshkaBatchTopKSAE': _PLAIN,
}
_NUMBERS = ('k', 'threshold')
_EXTRA = {
  'AutoEncoderTopK': _NUMBERS,
  'BatchTopKSAE': _NUMBERS,
  'MatryoshkaBatchTopKSAE': (*_NUMBERS, 'group_sizes'),
}
_SEMANTICS = {
  'AutoEncoder': imported.Semantics(
    nonlinearity='relu', subtract_b_dec=True, rescale_by_decoder_norm=True
  ),
  'AutoEncoderNew': imported.Semantics(nonlinearity='relu'),
  'GatedAutoEncoder': imported.Semantics(
    nonlinearity='gated', subtract_b_dec=True
  ),
  'JumpReluAutoEncoder': imported.Semantics(nonlinearity='jumprelu'),
}
_OF_TOPK = imported.Semantics(
  nonlinearity='topk', relu_before_topk=True, subtract_b_dec=True
)
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  settings = where.json(_CONFIG)
  trainer = settings.inner('trainer')
  kind = trainer.choice('dict_class', _TABLES)
  file = where.tensors(_WEIGHTS)
  width = trainer.count('activation_dim')
  content = weights.take(
    file,
    _TABLES[kind],
    {'n': trainer.count('dict_size'), 'd': width, 'o': width},
    _EXTRA.get(kind, ()),
  )
  semantics = _SEMANTICS.get(kind) or _topk(kind, file, trainer, content)
  buffer = Settings(settings.values.get('buffer') or {}, settings.where)
  if not isinstance(buffer.values, dict):
    raise settings.error('buffer', 'where a mapping should be')
  return imported.Imported(
    format='dictionary_learning',
    url=where.url,
    **content.fields(),
    semantics=semantics,
    provenance=imported.Provenance(
      model=trainer.maybe('lm_name', str),
      site=_site(trainer),
      context_size=buffer.maybe('ctx_len', int),
      settings=dict(settings.values),
    ),
  )


def _topk(
  kind: str,
  file: reading.TensorFile,
  trainer: Settings,
  content: weights.Weights,
) -> imported.Semantics:
  """A token's k latents, or in BatchTopK those above a learnt threshold."""
  k = weights.check_k(trainer.count('k'), content.sizes['n'], trainer.where)
  if weights.scalar(file, 'k') != k:
    raise errors.UserError(
      f'{trainer.where} has k {k:,} and {file.url} has '
      f'{weights.scalar(file, "k"):g}: {place_lib.AGAIN}'
    )
  is_batch = kind != 'AutoEncoderTopK'
  return dataclasses.replace(
    _OF_TOPK,
    nonlinearity='batchtopk' if is_batch else 'topk',
    k=k,
    threshold=weights.scalar(file, 'threshold') if is_batch else None,
  )


def _site(trainer: Settings) -> str | None:
  """The module that was read, or the layer of the residual stream."""
  layer = trainer.maybe('layer', int)
  return trainer.maybe('submodule_name', str) or (
    None if layer is None else f'layer {layer}'
  )


def lack(of: imported.Imported) -> str | None:
  """See `formats.Written`."""
  return limits.lack(of, ('relu', 'topk', 'jumprelu', 'batchtopk', 'gated'))


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a folder."""
  kind = _kind(of.semantics)
  own = _SEMANTICS.get(kind, _OF_TOPK)
  of = folding.folded(
    of,
    rescales=own.rescale_by_decoder_norm,
    subtracts=own.subtract_b_dec,
  )
  if kind == 'JumpReluAutoEncoder':
    given = of.tensors | {'threshold_N': folding.thresholds(of)}
    of = dataclasses.replace(of, tensors=given)
  content = weights.give(of, _TABLES[kind])
  if kind in _EXTRA:
    threshold = -1.0 if kind == 'AutoEncoderTopK' else of.semantics.threshold
    content |= {
      'k': tensors.from_array(np.int32(of.semantics.k)),
      'threshold': tensors.from_array(np.float32(threshold)),
    }
  pt_writer.write(epath.Path(url) / _WEIGHTS, content)
  settings = config.to_json(_settings(of, kind))
  files.write_text(epath.Path(url) / _CONFIG, settings)


def _kind(semantics: imported.Semantics) -> str:
  """The class of a function; the one that needs least folding."""
  if semantics.nonlinearity == 'batchtopk':
    is_one = semantics.k is not None and semantics.threshold is not None
    return 'BatchTopKSAE' if is_one else 'JumpReluAutoEncoder'
  if semantics.nonlinearity == 'relu':
    is_unit = semantics.rescale_by_decoder_norm and semantics.subtract_b_dec
    return 'AutoEncoder' if is_unit else 'AutoEncoderNew'
  return {
    'topk': 'AutoEncoderTopK',
    'jumprelu': 'JumpReluAutoEncoder',
    'gated': 'GatedAutoEncoder',
  }[semantics.nonlinearity]


def _settings(of: imported.Imported, kind: str) -> dict[str, Any]:
  provenance = of.provenance
  trainer = {
    'dict_class': kind,
    'activation_dim': of.d_in,
    'dict_size': of.n_latents,
  }
  if kind in _EXTRA:
    trainer['k'] = of.semantics.k
  if provenance.model is not None:
    trainer['lm_name'] = provenance.model
  if provenance.site is not None:
    trainer['submodule_name'] = provenance.site
    layers = re.findall(r'\d+', provenance.site)
    if len(layers) == 1:
      trainer['layer'] = int(layers[0])
  context = provenance.context_size
  buffer = {} if context is None else {'buffer': {'ctx_len': context}}
  return {'trainer': trainer} | buffer

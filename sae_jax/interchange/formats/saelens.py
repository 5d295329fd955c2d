"""The folders of SAELens 6: cfg.json and sae_weights.safetensors.

What each architecture computes is in `sae_lens/saes/<architecture>_sae.py`. A
BatchTopK autoencoder is saved as jumprelu. Transcoders subtract no bias and
undo no normalisation, so that they are read without one alone.
"""

import dataclasses
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config, errors
from sae_jax.interchange import folding, imported, limits, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import files, safetensors
from sae_jax.subject import sites

_CONFIG, _WEIGHTS = 'cfg.json', 'sae_weights.safetensors'
# Where a run of training leaves the scale that it has not folded in.
_SCALE = 'activation_scaler.json'
_BASE = {
  'W_enc': ('w_enc_ND', 'dn'),
  'W_dec': ('w_dec_ND', 'no'),
  'b_dec': ('b_dec_D', 'o'),
}
_BIAS = {'b_enc': ('b_enc_N', 'n')}
_THRESHOLD = {'threshold': ('threshold_N', 'n')}
_GATES = {
  'b_gate': ('b_gate_N', 'n'),
  'r_mag': ('r_mag_N', 'n'),
  'b_mag': ('b_mag_N', 'n'),
}
_SKIP = {'W_skip': ('w_skip_DD', 'od')}
# Architecture -> nonlinearity, and the tensors that it has besides `_BASE`.
_ARCHITECTURES = {
  'standard': ('relu', _BIAS),
  'topk': ('topk', _BIAS),
  'jumprelu': ('jumprelu', _BIAS | _THRESHOLD),
  'gated': ('gated', _GATES),
  'transcoder': ('relu', _BIAS),
  'skip_transcoder': ('relu', _BIAS | _SKIP),
  'jumprelu_transcoder': ('jumprelu', _BIAS | _THRESHOLD),
  'jumprelu_skip_transcoder': ('jumprelu', _BIAS | _THRESHOLD | _SKIP),
}
_EXPECTED_AVERAGE = 'expected_average_only_in'
# SAELens's name -> ours.
_NORMALISATIONS = {
  'none': 'none',
  'layer_norm': 'layer_norm',
  'constant_norm_rescale': 'constant_norm_rescale',
  _EXPECTED_AVERAGE: 'dataset',
}
# The version whose folders are written.
_VERSION = '6.54.12'
# Nonlinearity -> what an autoencoder and a transcoder of it are called.
_NAMES = {
  'relu': ('standard', 'transcoder'),
  'topk': ('topk', None),
  'jumprelu': ('jumprelu', 'jumprelu_transcoder'),
  'batchtopk': ('jumprelu', 'jumprelu_transcoder'),
  'gated': ('gated', None),
}
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  settings = where.json(_CONFIG)
  metadata = _metadata(settings)
  architecture = settings.choice('architecture', _ARCHITECTURES)
  nonlinearity, table = _ARCHITECTURES[architecture]
  is_transcoder = architecture.endswith('transcoder')
  d_in = settings.count('d_in')
  content = weights.take(
    where.tensors(_WEIGHTS),
    _BASE | table,
    {
      'n': settings.count('d_sae'),
      'd': d_in,
      'o': settings.count('d_out') if is_transcoder else d_in,
    },
  )
  normalisation = _NORMALISATIONS[
    settings.choice(
      'normalize_activations',
      ('none',) if is_transcoder else _NORMALISATIONS,
      'none',
    )
  ]
  scale = None
  if normalisation == 'dataset':
    scale = _scale(where, given)
  reshape = settings.choice('reshape_activations', ('none', 'hook_z'), 'none')
  subtracted = settings.flag('apply_b_dec_to_input', True)
  if is_transcoder and subtracted:
    raise settings.error('apply_b_dec_to_input', 'which no transcoder has')
  is_topk = nonlinearity == 'topk'
  return imported.Imported(
    format='saelens',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(
      nonlinearity=nonlinearity,
      k=_k(settings, content.sizes['n']) if is_topk else None,
      normalisation=normalisation,
      scale_in=scale,
      scale_out=scale,
      subtract_b_dec=subtracted,
      rescale_by_decoder_norm=is_topk
      and settings.flag('rescale_acts_by_decoder_norm', False),
    ),
    provenance=imported.Provenance(
      model=metadata.text('model_name'),
      site=metadata.text('hook_name'),
      target_site=metadata.text('hook_name_out')
      or (imported.TARGET if is_transcoder else None),
      context_size=metadata.maybe('context_size', int),
      prepend_bos=metadata.maybe('prepend_bos', bool),
      reshape=reshape if reshape != 'none' else None,
      settings=dict(settings.values),
    ),
  )


def _k(settings: Settings, n_latents: int) -> int:
  # The library's own default.
  return weights.check_k(settings.count('k', 100), n_latents, settings.where)


def _metadata(settings: Settings) -> Settings:
  """What SAELens 6 says of the origin; UserError if another version wrote."""
  remedy = 'load it with sae-lens 6 and save it again with save_model'
  if not isinstance(settings.values.get('metadata'), dict):
    raise errors.UserError(
      f'{settings.where} has no metadata, as SAELens writes from version 6 on: '
      f'{remedy}'
    )
  metadata = settings.inner('metadata')
  version = metadata.text('sae_lens_version') or ''
  major = place_lib.major_version(version)
  if major is None or major < 6:
    raise metadata.error(
      'sae_lens_version', f'where 6 or more should be: {remedy}'
    )
  return metadata


def _scale(where: Place, given: imported.Given) -> float:
  """The factor that brings activations to a norm of sqrt(D) on average."""
  if given.scale_in is not None:
    return given.scale_in
  if where.has(_SCALE):
    return where.json(_SCALE).positive('scaling_factor')
  raise errors.UserError(
    f'{where.url} expects activations whose norm is sqrt(d_in) on average '
    f'({_EXPECTED_AVERAGE}) and does not say the scale of its model: give '
    'scale_in'
  )


def lack(of: imported.Imported) -> str | None:
  """See `formats.Written`."""
  missing = limits.lack(
    of, _NAMES, ('layer_norm', 'constant_norm_rescale'), transcodes=True
  )
  if missing or not imported.is_transcoder(of):
    return missing
  semantics = of.semantics
  if _NAMES[semantics.nonlinearity][1] is None:
    return f'the nonlinearity {semantics.nonlinearity} of a transcoder'
  if semantics.normalisation not in ('none', 'dataset'):
    return f'the normalisation {semantics.normalisation} of a transcoder'
  return None


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a folder."""
  is_transcoder = imported.is_transcoder(of)
  of = folding.folded(
    of,
    rescales=of.semantics.nonlinearity == 'topk',
    subtracts=False if is_transcoder else None,
  )
  architecture = _NAMES[of.semantics.nonlinearity][is_transcoder]
  if 'w_skip_DD' in of.tensors:
    architecture = architecture.replace('transcoder', 'skip_transcoder')
  if 'threshold_N' in dict(_ARCHITECTURES[architecture][1].values()):
    tensors = of.tensors | {'threshold_N': folding.thresholds(of)}
    of = dataclasses.replace(of, tensors=tensors)
  content = weights.give(of, _BASE | _ARCHITECTURES[architecture][1])
  safetensors.write(epath.Path(url) / _WEIGHTS, content, {'format': 'pt'})
  settings = _settings(of, architecture, content['W_enc'].dtype)
  files.write_text(epath.Path(url) / _CONFIG, config.to_json(settings))


def _settings(
  of: imported.Imported, architecture: str, dtype: np.dtype
) -> dict[str, Any]:
  semantics = of.semantics
  settings = {
    'architecture': architecture,
    'd_in': of.d_in,
    'd_sae': of.n_latents,
    'dtype': dtype.name,
    'device': 'cpu',
    'apply_b_dec_to_input': semantics.subtract_b_dec,
    'normalize_activations': semantics.normalisation,
    'reshape_activations': of.provenance.reshape or 'none',
    'metadata': _origin(of),
  }
  if architecture.endswith('transcoder'):
    settings['d_out'] = of.d_out
  if architecture == 'topk':
    settings['k'] = semantics.k
    settings['rescale_acts_by_decoder_norm'] = semantics.rescale_by_decoder_norm
  return settings


def _origin(of: imported.Imported) -> dict[str, Any]:
  """Metadata; what the library's own says besides is kept."""
  provenance = of.provenance
  own = provenance.settings.get('metadata') if of.format == 'saelens' else None
  site, target = (
    name and sites.lens_name(name)
    for name in (provenance.site, provenance.target_site)
  )
  known = {
    'model_name': provenance.model,
    'hook_name': site,
    'hook_name_out': target,
    'context_size': provenance.context_size,
    'prepend_bos': provenance.prepend_bos,
  }
  # Without the second one the library would say that it has trained it.
  versions = {'sae_lens_version': _VERSION, 'sae_lens_training_version': None}
  return {
    **versions,
    **(own or {}),
    **{
      name: value
      for name, value in known.items()
      if value not in (None, imported.TARGET)
    },
  }

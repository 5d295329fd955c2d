"""A format of our own that says in words what it is, for any other program.

autoencoder.safetensors has the tensors under the names of `imported`, axes in
the order of the name; autoencoder.json the formula and every choice of it.
"""

import dataclasses
from typing import Any

from etils import epath

from sae_jax import config, errors
from sae_jax.interchange import folding, imported, weights
from sae_jax.interchange.place import AGAIN, Place, Settings
from sae_jax.storage import files, safetensors

_CONFIG, _WEIGHTS = 'autoencoder.json', 'autoencoder.safetensors'
_KIND, _VERSION = 'sae_jax plain autoencoder', 1
_BIAS = ('b_enc_N',)
_GATES = ('r_mag_N', 'b_mag_N', 'b_gate_N')
_SIZES = {'n': 'n_latents', 'd': 'd_in', 'o': 'd_out'}
_FLAGS = (
  'is_rectified',
  'relu_before_topk',
  'subtract_b_dec',
  'rescale_by_decoder_norm',
)
_ORIGIN = ('model', 'site', 'target_site', 'reshape')
# Words of the formula: before and after, and what is active.
NORMALISED = {
  'none': ('v = x', 'y = r'),
  'layer_norm': (
    'v = (x - m) / (s + 0.00001), where m is the mean of x and s its standard '
    'deviation with d_in - 1',
    'y = r s + m',
  ),
  'constant_norm_rescale': (
    'v = x sqrt(d_in) / |x|',
    'y = r |x| / sqrt(d_in)',
  ),
  'dataset': ('v = x scale_in', 'y = r / scale_out'),
}
_ABOVE = 'z = h where h > the threshold (threshold_N if there is none), else 0'
ACTIVE = {
  'relu': 'z = max(h, 0)',
  'topk': 'z = h for the k largest h, else 0',
  'groupmax': 'z = h for the largest of each of k groups of consecutive '
  'latents, else 0',
  'jumprelu': _ABOVE,
  'batchtopk': _ABOVE,
  'gated': 'z = max(exp(r_mag_N) h + b_mag_N, 0) where h + b_gate_N > 0, '
  'else 0',
}
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  settings = where.json(_CONFIG)
  settings.choice('format', (_KIND,))
  if settings.count('version') != _VERSION:
    raise settings.error('version', f'where {_VERSION} should be')
  sizes = {letter: settings.count(name) for letter, name in _SIZES.items()}
  semantics = _semantics(settings.inner('semantics'), sizes['n'])
  _check(semantics, sizes, settings.where)
  file = where.tensors(_WEIGHTS)
  names = _names(semantics, 'w_skip_DD' in file.tensors)
  table = {name: (name, weights.axes(name)) for name in names}
  origin = settings.inner('origin')
  return imported.Imported(
    format='plain',
    url=where.url,
    **weights.take(file, table, sizes).fields(),
    semantics=semantics,
    provenance=imported.Provenance(
      **{name: origin.text(name) for name in _ORIGIN},
      context_size=origin.maybe('context_size', int),
      prepend_bos=origin.maybe('prepend_bos', bool),
      settings=dict(settings.values),
    ),
  )


def _names(semantics: imported.Semantics, has_skip: bool) -> tuple[str, ...]:
  """The tensors of a function."""
  names = ('w_enc_ND', 'w_dec_ND', 'b_dec_D')
  names += _GATES if semantics.nonlinearity == 'gated' else _BIAS
  if semantics.threshold is None and semantics.nonlinearity in (
    'jumprelu',
    'batchtopk',
  ):
    names += ('threshold_N',)
  return (*names, 'w_skip_DD') if has_skip else names


def _semantics(settings: Settings, n_latents: int) -> imported.Semantics:
  fields = {field.name for field in dataclasses.fields(imported.Semantics)}
  if settings.values.keys() != fields:
    names = ', '.join(sorted(settings.values.keys() ^ fields))
    raise errors.UserError(
      f'{settings.where} lacks or has besides: '
      f'{errors.printable(names, 100)}: {AGAIN}'
    )
  nonlinearity = settings.choice('nonlinearity', imported.NONLINEARITIES)
  normalisation = settings.choice('normalisation', imported.NORMALISATIONS)
  k = settings.values['k']
  if k is not None or nonlinearity in ('topk', 'groupmax'):
    k = weights.check_k(settings.count('k'), n_latents, settings.where)
  threshold = settings.values['threshold']
  if threshold is not None:
    threshold = settings.positive('threshold', float('-inf'))
  scales = {'scale_in': None, 'scale_out': None}
  if normalisation == 'dataset':
    scales = {name: settings.positive(name) for name in scales}
  return imported.Semantics(
    nonlinearity=nonlinearity,
    k=k,
    threshold=threshold,
    normalisation=normalisation,
    **scales,
    **{name: settings.flag(name) for name in _FLAGS},
  )


def _check(
  semantics: imported.Semantics, sizes: dict[str, int], where: str
) -> None:
  """Raises UserError for what is no function of these sizes."""
  if semantics.subtract_b_dec and sizes['d'] != sizes['o']:
    raise errors.UserError(
      f'{where} subtracts a bias of width {sizes["o"]} from activations of '
      f'width {sizes["d"]}: {AGAIN}'
    )
  if semantics.nonlinearity == 'groupmax' and sizes['n'] % semantics.k:
    raise errors.UserError(
      f'{where} has {sizes["n"]:,} latents in k {semantics.k:,} groups, which '
      f'are not of one size: {AGAIN}'
    )


def lack(of: imported.Imported) -> None:
  """See `formats.Written`: it has words for all."""
  del of


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a folder."""
  of = folding.with_bias(of)
  content = {
    name: weights.storable(weights.ordered(of, name, weights.axes(name)))
    for name in _names(of.semantics, 'w_skip_DD' in of.tensors)
  }
  safetensors.write(epath.Path(url) / _WEIGHTS, content, {'format': 'pt'})
  files.write_text(epath.Path(url) / _CONFIG, config.to_json(_settings(of)))


def _settings(of: imported.Imported) -> dict[str, Any]:
  origin = dataclasses.asdict(
    dataclasses.replace(of.provenance, settings={})
  ) | {'format': of.format}
  del origin['settings']
  names = _names(of.semantics, 'w_skip_DD' in of.tensors)
  return {
    'format': _KIND,
    'version': _VERSION,
    'formula': formula(of.semantics, 'w_skip_DD' in of.tensors),
    'd_in': of.d_in,
    'd_out': of.d_out,
    'n_latents': of.n_latents,
    'semantics': dataclasses.asdict(of.semantics),
    'tensors': {
      name: ' by '.join(_SIZES[letter] for letter in weights.axes(name))
      for name in names
    },
    'origin': origin,
  }


def formula(semantics: imported.Semantics, has_skip: bool) -> list[str]:
  """What becomes of an activation x, in lines to be followed one by one.

  Args:
    semantics: which function it is.
    has_skip: whether it has a skip connection.
  """
  before, after = NORMALISED[semantics.normalisation]
  is_gated = semantics.nonlinearity == 'gated'
  lines = [
    before,
    'u = v - b_dec_D' if semantics.subtract_b_dec else 'u = v',
    'h = w_enc_ND u' if is_gated else 'h = w_enc_ND u + b_enc_N',
  ]
  row = 'its row of w_dec_ND'
  if semantics.rescale_by_decoder_norm:
    lines += ['n = the norm of each row of w_dec_ND', 'h = h n']
    row += ' / its n'
  if semantics.relu_before_topk:
    lines.append('h = max(h, 0)')
  lines.append(ACTIVE[semantics.nonlinearity])
  if semantics.is_rectified:
    lines.append('z = max(z, 0)')
  lines += [f'r = the sum of each z times {row}, plus b_dec_D', after]
  return lines + ['y = y + w_skip_DD x'] * has_skip

"""circuit-tracer's transcoders: config.yaml and layer_{i}.safetensors.

z = activation(w_enc x + b_enc), y = w_dec z + b_dec + w_skip x; no bias is
subtracted, and neither TopK nor JumpReLU makes negative values zero
(single_layer_transcoder.py, activation_functions.py of version 0.5). One layer
is read: that of the file, or the only one of the folder.
"""

import dataclasses
import re

from etils import epath
import yaml

from sae_jax import errors
from sae_jax.interchange import folding, imported, limits, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.files import reading
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import files, safetensors
from sae_jax.subject import sites

_CONFIG = 'config.yaml'
_LAYER = re.compile(r'layer_(\d{1,6})\.safetensors')
_TABLE = {
  'W_enc': ('w_enc_ND', 'nd'),
  'W_dec': ('w_dec_ND', 'no'),
  'b_enc': ('b_enc_N', 'n'),
  'b_dec': ('b_dec_D', 'o'),
}
_THRESHOLD = 'activation_function.threshold'
_OPTIONAL = {
  'W_skip': ('w_skip_DD', 'od'),
  _THRESHOLD: ('threshold_N', 'n'),
}
_K = 'k'
_HOOK = re.compile(r'blocks\.(\d{1,6})\.(.+)')
# What the library puts before a feed-forward, which has no such hook.
_ITS_OWN = {'mlp_in': 'mlp.hook_in'}
LOOKED_FOR = (
  f'a file layer_0.safetensors, of any layer, beside {_CONFIG}, or its folder'
)


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  if where.is_folder:
    is_it = where.has(_CONFIG) and bool(_layers(where))
  else:
    path = epath.Path(where.url)
    is_layer = bool(_LAYER.fullmatch(path.name))
    is_it = is_layer and files.is_file(path.parent / _CONFIG)
  return f'layer_*.safetensors with {_CONFIG}' if is_it else None


def _layers(where: Place) -> list[str]:
  return [name for name in where.names() if _LAYER.fullmatch(name)]


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  folder, name = where, ''
  if where.is_folder:
    layers = _layers(where)
    if len(layers) != 1:
      raise errors.UserError(
        f'{where.url} has {len(layers)} layers: give the path of one, as '
        f'{where.path("layer_0.safetensors")}'
      )
    name = layers[0]
  else:
    folder = Place(epath.Path(where.url).parent)
  settings = folder.yaml(_CONFIG)
  settings.choice('model_kind', ('transcoder_set',))
  file = where.tensors(name)
  optional = {
    stored: common
    for stored, common in _OPTIONAL.items()
    if stored in file.tensors
  }
  content = weights.take(file, _TABLE | optional, extra=(_K,))
  return imported.Imported(
    format='circuit_tracer',
    url=where.url,
    **content.fields(),
    semantics=_semantics(settings, file, content.sizes['n']),
    provenance=imported.Provenance(
      model=settings.text('model_name'),
      site=_hook(settings, 'feature_input_hook', file.url),
      target_site=_hook(settings, 'feature_output_hook', file.url),
      settings=dict(settings.values),
    ),
  )


def _hook(settings: Settings, key: str, url: str) -> str | None:
  """A hook's name with the layer."""
  hook = settings.text(key)
  layer = int(_LAYER.fullmatch(epath.Path(url).name)[1])
  return hook and f'blocks.{layer}.{hook}'


def _semantics(
  settings: Settings, file: reading.TensorFile, n_latents: int
) -> imported.Semantics:
  name = settings.choice('activation', ('relu', 'topk', 'jumprelu', None))
  has_thresholds = _THRESHOLD in file.tensors
  if name is None:
    name = 'jumprelu' if has_thresholds else 'relu'
  if has_thresholds != (name == 'jumprelu'):
    raise errors.UserError(
      f'{settings.where} has the activation {name}, and {file.url} has '
      f'{"" if has_thresholds else "no "}thresholds: {place_lib.AGAIN}'
    )
  if name != 'topk':
    return imported.Semantics(nonlinearity=name, is_rectified=name == 'relu')
  k = weights.check_k(settings.count('k'), n_latents, settings.where)
  if _K in file.tensors and weights.scalar(file, _K) != k:
    raise errors.UserError(
      f'{settings.where} has k {k:,} and {file.url} has '
      f'{weights.scalar(file, _K):g}: {place_lib.AGAIN}'
    )
  return imported.Semantics(nonlinearity='topk', k=k, is_rectified=False)


def lack(of: imported.Imported) -> str | None:
  """See `formats.Written`.

  TopK is read, but the library's own loader takes it for a ReLU.
  """
  missing = limits.lack(
    of, ('relu', 'jumprelu', 'batchtopk'), transcodes=True, rectifies=False
  ) or limits.of_one_width(of)
  if missing:
    return missing
  provenance = of.provenance
  if not imported.is_transcoder(of) or provenance.target_site is None:
    return 'no site that it writes, as a transcoder has'
  for site in (provenance.site, provenance.target_site):
    if _hook_of(site) is None:
      return f'the site {site}, which names no layer'
  return None


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a folder with one layer.

  A path of a layer's file writes that layer, beside others.
  """
  path = epath.Path(url)
  layer, hook = _hook_of(of.provenance.site)
  if _LAYER.fullmatch(path.name):
    path = path.parent
    layer = int(_LAYER.fullmatch(epath.Path(url).name)[1])
  settings = {
    'model_name': of.provenance.model,
    'model_kind': 'transcoder_set',
    'feature_input_hook': hook,
    'feature_output_hook': _hook_of(of.provenance.target_site)[1],
    'scan': None,
  }
  text = yaml.safe_dump(settings, sort_keys=False)
  _check_same(path / _CONFIG, text)
  of = folding.folded(of, subtracts=False)
  given = dict(of.tensors)
  if of.semantics.nonlinearity != 'relu':
    # A ReLU after the comparison is a threshold of 0 at the least.
    least = 0 if folding.is_rectified(of) else float('-inf')
    given['threshold_N'] = folding.thresholds(of, least)
  of = dataclasses.replace(of, tensors=given)
  table = _TABLE | {
    stored: common for stored, common in _OPTIONAL.items() if common[0] in given
  }
  name = f'layer_{layer}.safetensors'
  safetensors.write(path / name, weights.give(of, table), {'format': 'pt'})
  files.write_text(path / _CONFIG, text)


def _check_same(config: epath.Path, text: str) -> None:
  """Raises UserError if other layers are of another model or place."""
  if config.exists() and config.read_text() != text:
    raise errors.UserError(
      f'{config} is of other transcoders: write this one to another folder'
    )


def _hook_of(site: str | None) -> tuple[int, str] | None:
  """A layer and the hook in it, by TransformerLens's names where known."""
  if site is None:
    return None
  try:
    parsed = sites.parse_site(site.removesuffix('.output'))
  except errors.UserError:
    parsed = None
  if parsed and parsed.block is not None and parsed.name in _ITS_OWN:
    return parsed.block, _ITS_OWN[parsed.name]
  match = _HOOK.fullmatch(sites.lens_name(str(parsed) if parsed else site))
  return (int(match[1]), match[2]) if match else None

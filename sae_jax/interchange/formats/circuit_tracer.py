"""circuit-tracer's transcoders: config.yaml and layer_{i}.safetensors.

z = activation(w_enc x + b_enc), y = w_dec z + b_dec + w_skip x; no bias is
subtracted, and neither TopK nor JumpReLU makes negative values zero
(single_layer_transcoder.py, activation_functions.py of version 0.5). One layer
is read: that of the file, or the only one of the folder.
"""

import re

from etils import epath

from sae_jax import errors
from sae_jax.interchange import imported, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.files import reading
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import files

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

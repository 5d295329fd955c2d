"""The folders of Gemma Scope 2: config.json and params.safetensors.

JumpReLU autoencoders and transcoders of one layer, some with a skip connection
(`affine_skip_connection`, an axis of what is read first). Its crosscoders and
cross-layer transcoders are of several layers and not read.
"""

from sae_jax.interchange import imported, weights
from sae_jax.interchange.place import Place

_CONFIG, _WEIGHTS = 'config.json', 'params.safetensors'
_TABLE = {
  'w_enc': ('w_enc_ND', 'dn'),
  'w_dec': ('w_dec_ND', 'no'),
  'b_enc': ('b_enc_N', 'n'),
  'b_dec': ('b_dec_D', 'o'),
  'threshold': ('threshold_N', 'n'),
}
_SKIP = {'affine_skip_connection': ('w_skip_DD', 'do')}
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  settings = where.json(_CONFIG)
  settings.choice('architecture', ('jump_relu',))
  kind = settings.choice('type', ('sae', 'transcoder', None))
  has_skip = settings.flag('affine_connection', False)
  sizes = {'n': settings.count('width')} if 'width' in settings.values else {}
  content = weights.take(
    where.tensors(_WEIGHTS), _TABLE | _SKIP if has_skip else _TABLE, sizes
  )
  site, target = (
    settings.text(f'hf_hook_point_{end}') for end in ('in', 'out')
  )
  if kind == 'transcoder':
    target = target or imported.TARGET
  return imported.Imported(
    format='gemma_scope2',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(nonlinearity='jumprelu'),
    provenance=imported.Provenance(
      model=settings.text('model_name'),
      site=site,
      target_site=target if target != site else None,
      settings=dict(settings.values),
    ),
  )

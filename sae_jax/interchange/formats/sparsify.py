"""The folders of EleutherAI's sparsify: cfg.json and sae.safetensors.

z = activation(ReLU(w_enc u + b_enc)) with u = x - b_dec, or x for a transcoder;
y = w_dec z + b_dec, and the skip connection's product with x (sparse_coder.py,
fused_encoder.py of eai-sparsify 1.3.3). A key that is absent has the library's
default.
"""

from etils import epath

from sae_jax import errors
from sae_jax.interchange import imported, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.place import Place

_CONFIG, _WEIGHTS = 'cfg.json', 'sae.safetensors'
# In the folder above, of the run that trained it.
_RUN = 'config.json'
_TABLE = {
  'encoder.weight': ('w_enc_ND', 'nd'),
  'encoder.bias': ('b_enc_N', 'n'),
  'W_dec': ('w_dec_ND', 'no'),
  'b_dec': ('b_dec_D', 'o'),
}
_SKIP = {'W_skip': ('w_skip_DD', 'od')}
_EXPANSION, _K = 32, 32
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  settings = where.json(_CONFIG)
  nonlinearity = settings.choice('activation', ('topk', 'groupmax'), 'topk')
  is_transcoder = settings.flag('transcode', False)
  has_skip = settings.flag('skip_connection', False)
  if settings.flag('signed', False):
    raise settings.error('signed', 'which sparsify has no more: train it again')
  width = settings.count('d_in')
  n_latents = settings.count('num_latents', 0, least=0)
  n_latents = n_latents or width * settings.count(
    'expansion_factor', _EXPANSION
  )
  content = weights.take(
    where.tensors(_WEIGHTS),
    _TABLE | _SKIP if has_skip else _TABLE,
    {'n': n_latents, 'd': width, 'o': width},
  )
  k = weights.check_k(settings.count('k', _K), n_latents, settings.where)
  if nonlinearity == 'groupmax' and n_latents % k:
    raise errors.UserError(
      f'{settings.where} has {n_latents:,} latents in k {k:,} groups, which '
      f'are not of one size: {place_lib.AGAIN}'
    )
  return imported.Imported(
    format='sparsify',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(
      nonlinearity=nonlinearity,
      k=k,
      relu_before_topk=True,
      subtract_b_dec=not is_transcoder,
    ),
    provenance=_provenance(where, settings),
  )


def _provenance(where: Place, settings) -> imported.Provenance:
  """A folder is named by the module; that of the run has its config."""
  module = epath.Path(where.url)
  above = Place(module.parent)
  model = context_size = None
  if above.has(_RUN):
    run = above.json(_RUN)
    model, context_size = run.maybe('model', str), run.maybe('ctx_len', int)
  return imported.Provenance(
    model=model,
    # Such as layers.10 or h.3.mlp; any other name is the user's.
    site=module.name if '.' in module.name else None,
    context_size=context_size,
    settings=dict(settings.values),
  )

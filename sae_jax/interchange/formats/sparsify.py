"""The folders of EleutherAI's sparsify: cfg.json and sae.safetensors.

z = activation(ReLU(w_enc u + b_enc)) with u = x - b_dec, or x for a transcoder;
y = w_dec z + b_dec, and the skip connection's product with x (sparse_coder.py,
fused_encoder.py of eai-sparsify 1.3.3). A key that is absent has the library's
default.
"""

from etils import epath

from sae_jax import config, errors
from sae_jax.interchange import folding, imported, limits, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import files, safetensors

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
    provenance=_provenance(where, settings, is_transcoder),
  )


def _provenance(
  where: Place, settings: Settings, is_transcoder: bool
) -> imported.Provenance:
  """A folder is named by the module; that of the run has its config."""
  module = epath.Path(where.url)
  # Such as layers.10 or h.3.mlp; any other name is the user's.
  name = module.name if '.' in module.name else None
  above = Place(module.parent)
  model = context_size = None
  if above.has(_RUN):
    run = above.json(_RUN)
    model, context_size = run.maybe('model', str), run.maybe('ctx_len', int)
  return imported.Provenance(
    model=model,
    site=f'{name}.input' if name and is_transcoder else name,
    target_site=(name or imported.TARGET) if is_transcoder else None,
    context_size=context_size,
    settings=dict(settings.values),
  )


def lack(of: imported.Imported) -> str | None:
  """See `formats.Written`."""
  return limits.lack(
    of, ('topk', 'groupmax'), transcodes=True
  ) or limits.of_one_width(of)


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a folder, whose name is that of the module."""
  is_transcoder = imported.is_transcoder(of)
  # What says which end of the module is read, too.
  of = folding.folded(of, subtracts=not is_transcoder)
  has_skip = 'w_skip_DD' in of.tensors
  content = weights.give(of, _TABLE | _SKIP if has_skip else _TABLE)
  safetensors.write(epath.Path(url) / _WEIGHTS, content, {'format': 'pt'})
  settings = {
    'activation': of.semantics.nonlinearity,
    'expansion_factor': max(1, of.n_latents // of.d_in),
    # Of training: it would change the decoder.
    'normalize_decoder': False,
    'num_latents': of.n_latents,
    'k': of.semantics.k,
    'multi_topk': False,
    'skip_connection': has_skip,
    'transcode': is_transcoder,
    'd_in': of.d_in,
  }
  files.write_text(epath.Path(url) / _CONFIG, config.to_json(settings))

"""The folders of dictionary_learning: config.json and ae.pt.

What each class computes is in dictionary.py and trainers/ of version 0.1.0;
`load_dictionary` chooses by `trainer.dict_class`. An `AutoEncoder` is given a
decoder of unit norm as it is loaded, so that its latents are measured by the
norm of their rows. A scale of the activations is folded in before saving.
"""

from sae_jax import errors
from sae_jax.interchange import imported, weights
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.files import reading
from sae_jax.interchange.place import Place, Settings

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
  return imported.Semantics(
    nonlinearity='batchtopk' if is_batch else 'topk',
    k=k,
    threshold=weights.scalar(file, 'threshold') if is_batch else None,
    relu_before_topk=True,
    subtract_b_dec=True,
  )


def _site(trainer: Settings) -> str | None:
  """The module that was read, or the layer of the residual stream."""
  layer = trainer.maybe('layer', int)
  return trainer.maybe('submodule_name', str) or (
    None if layer is None else f'layer {layer}'
  )

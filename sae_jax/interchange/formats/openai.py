"""The `.pt` files of OpenAI's sparse_autoencoder (Gao et al. 2024).

y = (w_dec z + pre_bias) std + mean with z = postact(TopK(w_enc (x^ - pre_bias)
+ latent_bias)), where x^ is layer-normalised if the activation is TopK and is x
if it is ReLU (github.com/openai/sparse_autoencoder, model.py).
"""

from sae_jax.interchange import imported, weights
from sae_jax.interchange.place import Place, Settings

_TABLE = {
  'encoder.weight': ('w_enc_ND', 'nd'),
  'latent_bias': ('b_enc_N', 'n'),
  'decoder.weight': ('w_dec_ND', 'on'),
  'pre_bias': ('b_dec_D', 'o'),
}
_STATISTICS = (
  'stats_last_nonzero',
  'latents_activation_frequency',
  'latents_mean_square',
)
LOOKED_FOR = 'a .pt file with pre_bias and latent_bias'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  if where.is_folder:
    return None
  file = where.tensors()
  is_it = file.kind == 'pt' and {'pre_bias', 'latent_bias'} <= set(file.tensors)
  return 'a .pt file with pre_bias and latent_bias' if is_it else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  file = where.tensors()
  content = weights.take(file, _TABLE, extra=_STATISTICS)
  settings = Settings(file.values, file.url)
  # A file without it is read as one of ReLU by the library.
  name = settings.choice('activation', ('TopK', 'ReLU'), 'ReLU')
  semantics = imported.Semantics(nonlinearity='relu', subtract_b_dec=True)
  if name == 'TopK':
    inner = settings.inner('activation_state_dict')
    after = inner.choice('postact_fn', ('ReLU', 'Identity'))
    semantics = imported.Semantics(
      nonlinearity='topk',
      k=weights.check_k(inner.count('k'), content.sizes['n'], file.url),
      is_rectified=after == 'ReLU',
      normalisation='layer_norm',
      subtract_b_dec=True,
    )
  return imported.Imported(
    format='openai',
    url=where.url,
    **content.fields(),
    semantics=semantics,
    provenance=imported.Provenance(settings=file.values),
  )

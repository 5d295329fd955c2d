"""The `.pt` files of OpenAI's sparse_autoencoder (Gao et al. 2024).

y = (w_dec z + pre_bias) std + mean with z = postact(TopK(w_enc (x^ - pre_bias)
+ latent_bias)), where x^ is layer-normalised if the activation is TopK and is x
if it is ReLU (github.com/openai/sparse_autoencoder, model.py).
"""

import numpy as np

from sae_jax.interchange import folding, imported, limits, weights
from sae_jax.interchange.files import pt_writer
from sae_jax.interchange.place import Place, Settings
from sae_jax.storage import tensors

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


def lack(of: imported.Imported) -> str | None:
  """See `formats.Written`."""
  semantics = of.semantics
  missing = limits.lack(of, ('topk', 'relu'), ('layer_norm',), rectifies=False)
  is_normal = semantics.normalisation == 'layer_norm'
  if missing or is_normal == (semantics.nonlinearity == 'topk'):
    return missing
  pair = f'the nonlinearity {semantics.nonlinearity} '
  return pair + ('with layer_norm' if is_normal else 'without layer_norm')


def write(of: imported.Imported, url: str) -> None:
  """See `formats.Written`; a file."""
  of = folding.folded(of, subtracts=True)
  content = weights.give(of, _TABLE) | _statistics(of)
  values = {'activation': 'ReLU', 'activation_state_dict': {}}
  if of.semantics.nonlinearity == 'topk':
    after = 'ReLU' if folding.is_rectified(of) else 'Identity'
    values = {
      'activation': 'TopK',
      'activation_state_dict': {'k': of.semantics.k, 'postact_fn': after},
    }
  pt_writer.write(url, content | values)


def _statistics(of: imported.Imported) -> dict[str, tensors.Tensor]:
  """What the library counts in training, without which it reads no file."""
  n_latents = of.n_latents
  values = {
    'stats_last_nonzero': np.zeros(n_latents, np.int64),
    'latents_activation_frequency': np.ones(n_latents, np.float32),
    'latents_mean_square': np.zeros(n_latents, np.float32),
  }
  own = of.extra if of.format == 'openai' else {}
  return {
    name: own.get(name) or tensors.from_array(value)
    for name, value in values.items()
  }

"""Qwen-Scope's `layer{n}.sae.pt`: TopK after a ReLU, no bias subtracted.

The file does not say k; its repository's name does (L0_50), so it must be
given.
"""

from sae_jax import errors
from sae_jax.interchange import imported, weights
from sae_jax.interchange.place import Place

_TABLE = {
  'W_enc': ('w_enc_ND', 'nd'),
  'W_dec': ('w_dec_ND', 'on'),
  'b_enc': ('b_enc_N', 'n'),
  'b_dec': ('b_dec_D', 'o'),
}
LOOKED_FOR = f'a .pt file with {", ".join(_TABLE)} alone'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  if where.is_folder:
    return None
  file = where.tensors()
  is_it = file.kind == 'pt' and set(file.tensors) == set(_TABLE)
  return LOOKED_FOR if is_it else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  file = where.tensors()
  content = weights.take(file, _TABLE)
  if given.k is None:
    raise errors.UserError(
      f'{file.url} does not say how many latents are active: give --k, the L0 '
      "in its repository's name"
    )
  return imported.Imported(
    format='qwen_scope',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(
      nonlinearity='topk',
      k=weights.check_k(given.k, content.sizes['n'], file.url),
      relu_before_topk=True,
    ),
    provenance=imported.Provenance(settings=file.values),
  )

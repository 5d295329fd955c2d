"""Gemma Scope's params.npz (Lieberum et al. 2024): JumpReLU.

z = ReLU(h) where h > threshold, h = w_enc x + b_enc; no bias is subtracted. The
file says nothing else: its folder's name says what it was trained on.
"""

from sae_jax.interchange import imported, weights
from sae_jax.interchange.place import Place

_FILE = 'params.npz'
_TABLE = {
  'W_enc': ('w_enc_ND', 'dn'),
  'W_dec': ('w_dec_ND', 'no'),
  'b_enc': ('b_enc_N', 'n'),
  'b_dec': ('b_dec_D', 'o'),
  'threshold': ('threshold_N', 'n'),
}
LOOKED_FOR = f'a folder with {_FILE}, or an .npz file with W_enc and threshold'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  if where.is_folder:
    return f'a folder with {_FILE}' if where.has(_FILE) else None
  file = where.tensors()
  is_it = file.kind == 'npz' and {'W_enc', 'threshold'} <= set(file.tensors)
  return 'an .npz file with W_enc and threshold' if is_it else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  content = weights.take(
    where.tensors(_FILE if where.is_folder else ''), _TABLE
  )
  return imported.Imported(
    format='gemma_scope',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(nonlinearity='jumprelu'),
    provenance=imported.Provenance(),
  )

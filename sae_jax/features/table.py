"""The feature table: what probing writes and the page reads."""

import io
import zipfile

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax.storage import files

MOMENTS = ('density', 'max', 'mean', 'std', 'skew')
SHAPES = {
  'latent_ids': ('N',),
  'count': ('N',),
  **{name: ('N',) for name in MOMENTS},
  'hist_edges': ('H + 1',),
  'hist_counts': ('N', 'H'),
  **{
    f'{kind}_{name}': ('N', f'M {kind}', 'W')[:rank]
    for kind in ('top', 'random')
    for name, rank in (('tokens', 3), ('acts', 3), ('peak', 2), ('document', 2))
  },
  **{
    f'vote_{way}_{name}': ('N', f'V {way}')
    for way in ('up', 'down')
    for name in ('ids', 'logits')
  },
  'neighbour_ids': ('N', 'neighbours'),
  'neighbour_cosines': ('N', 'neighbours'),
}
_TOKEN_ARRAYS = ('top_tokens', 'random_tokens', 'vote_up_ids', 'vote_down_ids')


def read_features(url: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads features.npz; raises UserError if it is absent or is no npz."""
  path = epath.Path(url)
  if not path.exists():
    raise errors.UserError(f'{path} does not exist: run sae-probe first')
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
    raise errors.UserError(
      f'{path} is not a readable npz file: run sae-probe again'
    ) from error


def check_features(
  features: dict[str, np.ndarray], vocabulary_size: int
) -> None:
  """Raises UserError unless the arrays fit each other and the vocabulary."""
  missing = sorted(set(SHAPES) - set(features))
  if missing:
    raise errors.UserError(
      f'features lack {", ".join(missing)}: run sae-probe of this version'
    )
  sizes = {}
  for name, axes in SHAPES.items():
    shape = np.shape(features[name])
    if len(shape) != len(axes):
      raise errors.UserError(
        f'{name} has shape {shape}: it needs the axes ({", ".join(axes)})'
      )
    for axis, size in zip(axes, shape):
      axis, size = ('H', size - 1) if axis == 'H + 1' else (axis, size)
      if size < 1:
        raise errors.UserError(
          f'{name} is empty along {axis}: run sae-probe on more tokens'
        )
      known_from, known = sizes.setdefault(axis, (name, size))
      if size != known:
        raise errors.UserError(
          f'{name} has {size} along {axis} but {known_from} has {known}: '
          'run sae-probe again'
        )
  ids = features['latent_ids']
  if len(np.unique(ids)) != len(ids):
    raise errors.UserError(
      f'latent_ids has {len(ids)} entries but only {len(np.unique(ids))} '
      'different ones: run sae-probe again'
    )
  for name in _TOKEN_ARRAYS:
    largest = int(np.max(features[name], initial=-1))
    if largest >= vocabulary_size:
      raise errors.UserError(
        f'{name} holds token {largest} but the vocabulary ends at '
        f'{vocabulary_size - 1}: use the vocabulary of the probed subject'
      )


def save(path: epath.PathLike, table: dict[str, np.ndarray]) -> None:
  """Writes the table as a compressed .npz, whole or not at all."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **table)
  files.write_bytes(path, buffer.getvalue())

"""The feature table: the arrays that probing writes and the page reads.

`ARRAYS` declares them all. Their axes: N latents, H bins of the histograms,
"M top" and "M random" examples of a latent, each a window of W tokens, and
"V up" and "V down" tokens that a latent votes for and against.
"""

import dataclasses
import io
import zipfile

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax.storage import files


@dataclasses.dataclass(frozen=True)
class Array:
  """The declaration of an array of the table.

  Attributes:
    axes: a name for each axis; axes of the same name have the same size.
    dtype: the type it is stored in.
    meaning: the meaning of one entry.
    is_token: whether entries are ids of the subject's vocabulary.
  """

  axes: tuple[str, ...]
  dtype: str
  meaning: str
  is_token: bool = False


MOMENTS = {
  'density': 'share of all tokens on which the latent fires',
  'max': 'largest activation',
  'mean': 'mean of the positive activations',
  'std': 'standard deviation of the positive activations',
  'skew': 'skewness of the positive activations',
}


def _examples(kind: str, meaning: str) -> dict[str, Array]:
  """Declarations of the examples of one kind."""
  axes = ('N', f'M {kind}', 'W')
  return {
    f'{kind}_tokens': Array(
      axes, 'int32', f'token around {meaning}; -1 outside the window', True
    ),
    f'{kind}_acts': Array(
      axes, 'float32', "the latent's activation on that token; 0 if masked"
    ),
    f'{kind}_peak': Array(
      axes[:2], 'int32', "the example's place in its window; -1: no example"
    ),
    f'{kind}_document': Array(
      axes[:2], 'int32', 'document of the example; -1: no example'
    ),
  }


def _votes(way: str) -> dict[str, Array]:
  """Declarations of the tokens that a latent votes up, or down."""
  axes = ('N', f'V {way}')
  return {
    f'vote_{way}_ids': Array(
      axes,
      'int32',
      f'token that the decoder row pushes {way} most; -1: no vote',
      True,
    ),
    f'vote_{way}_logits': Array(
      axes, 'float32', "that token's logit, less the mean over all tokens"
    ),
  }


ARRAYS = {
  'latent_ids': Array(('N',), 'int32', 'number of the latent'),
  'count': Array(('N',), 'int64', 'tokens on which the latent fires'),
  **{
    name: Array(('N',), 'float32', meaning) for name, meaning in MOMENTS.items()
  },
  'hist_edges': Array(('H + 1',), 'float32', 'activation at an edge of a bin'),
  'hist_counts': Array(('N', 'H'), 'int64', 'positive activations in a bin'),
  **_examples('top', "one of the latent's highest activations, one a document"),
  **_examples('random', "a random one of the latent's positive activations"),
  **_votes('up'),
  **_votes('down'),
  'neighbour_ids': Array(
    ('N', 'neighbours'), 'int32', 'latent with a similar decoder row'
  ),
  'neighbour_cosines': Array(
    ('N', 'neighbours'), 'float32', 'cosine of the two decoder rows'
  ),
}


def make(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A table of the arrays, each in its declared type.

  Raises:
    ValueError: if the names are not those of `ARRAYS`, or an array lacks an
      axis.
  """
  if arrays.keys() != ARRAYS.keys():
    wrong = sorted(arrays.keys() ^ ARRAYS.keys())
    raise ValueError(f'arrays that are missing or not declared: {wrong}')
  for name, array in arrays.items():
    if np.ndim(array) != len(ARRAYS[name].axes):
      raise ValueError(
        f'{name} has shape {np.shape(array)}, not the axes {ARRAYS[name].axes}'
      )
  return {
    name: np.asarray(array, ARRAYS[name].dtype)
    for name, array in arrays.items()
  }


def read(url: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads features.npz; raises UserError if it is absent or damaged."""
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


def check(table: dict[str, np.ndarray], vocabulary_size: int) -> None:
  """Raises UserError unless a table is as declared and fits the vocabulary."""
  missing = sorted(ARRAYS.keys() - table.keys())
  if missing:
    raise errors.UserError(
      f'features lack {", ".join(missing)}: run sae-probe of this version'
    )
  _check_shapes(table)
  ids = table['latent_ids']
  if len(np.unique(ids)) != len(ids):
    raise errors.UserError(
      f'latent_ids has {len(ids)} entries but only {len(np.unique(ids))} '
      'different ones: run sae-probe again'
    )
  for name, declared in ARRAYS.items():
    if not declared.is_token:
      continue
    largest = int(np.max(table[name], initial=-1))
    if largest >= vocabulary_size:
      raise errors.UserError(
        f'{name} holds token {largest} but the vocabulary ends at '
        f'{vocabulary_size - 1}: use the vocabulary of the probed subject'
      )


def _check_shapes(table: dict[str, np.ndarray]) -> None:
  """Raises UserError unless each axis has one size in all arrays."""
  sizes = {}
  for name, declared in ARRAYS.items():
    shape = np.shape(table[name])
    if len(shape) != len(declared.axes):
      raise errors.UserError(
        f'{name} has shape {shape}: it needs the axes '
        f'({", ".join(declared.axes)})'
      )
    for axis, size in zip(declared.axes, shape):
      axis, size = ('H', size - 1) if axis == 'H + 1' else (axis, size)
      if size < 1:
        raise errors.UserError(
          f'{name} is empty along {axis}: run sae-probe on more tokens'
        )
      first_name, first_size = sizes.setdefault(axis, (name, size))
      if size != first_size:
        raise errors.UserError(
          f'{name} has {size} along {axis} but {first_name} has {first_size}: '
          'run sae-probe again'
        )


def save(path: epath.PathLike, table: dict[str, np.ndarray]) -> None:
  """Writes the table as a compressed .npz, whole or not at all."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **table)
  files.write_bytes(path, buffer.getvalue())

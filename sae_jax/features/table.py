"""The feature table: the arrays that probing writes and the page reads.

`ARRAYS` declares them all. Their axes: N latents, H bins of the histograms,
"M top" and "M random" examples of a latent, each a window of W tokens, and
"V up" and "V down" tokens that a latent votes for and against.
"""

import dataclasses
import io
import math
import zipfile

from etils import epath
import numpy as np

from sae_jax import errors

# Far more than the examples of a latent take: 16 windows of 100,000 tokens.
_LATENT_BYTES = 16 * 2**20
# No bytes deflate to fewer.
_DEFLATE_RATIO = 1032


@dataclasses.dataclass(frozen=True)
class Array:
  """The declaration of an array of the table.

  Attributes:
    axes: a name for each axis; axes of the same name have the same size.
    dtype: the type it is stored in.
    meaning: the meaning of one entry.
    is_token: whether entries are ids of the subject's vocabulary.
    least: the least entry.
    most: the greatest entry.
    may_be_absent: whether an entry that is not finite stands for no number.
  """

  axes: tuple[str, ...]
  dtype: str
  meaning: str
  is_token: bool = False
  least: float = -math.inf
  most: float = math.inf
  may_be_absent: bool = False


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
      axes,
      'int32',
      f'token around {meaning}; -1 outside the window',
      True,
      least=-1,
    ),
    f'{kind}_acts': Array(
      axes,
      'float32',
      "the latent's activation on that token; 0 if masked",
      least=0,
    ),
    f'{kind}_peak': Array(
      axes[:2],
      'int32',
      "the example's place in its window; -1: no example",
      least=-1,
    ),
    f'{kind}_document': Array(
      axes[:2], 'int32', 'document of the example; -1: no example', least=-1
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
      least=-1,
    ),
    f'vote_{way}_logits': Array(
      axes, 'float32', "that token's logit, less the mean over all tokens"
    ),
  }


ARRAYS = {
  'latent_ids': Array(('N',), 'int32', 'number of the latent', least=0),
  'count': Array(('N',), 'int64', 'tokens on which the latent fires', least=0),
  **{
    name: Array(
      ('N',),
      'float32',
      meaning,
      least=-math.inf if name == 'skew' else 0,
      most=1 if name == 'density' else math.inf,
      may_be_absent=True,
    )
    for name, meaning in MOMENTS.items()
  },
  'hist_edges': Array(('H + 1',), 'float32', 'activation at an edge of a bin'),
  'hist_counts': Array(
    ('N', 'H'), 'int64', 'positive activations in a bin', least=0
  ),
  **_examples('top', "one of the latent's highest activations, one a document"),
  **_examples('random', "a random one of the latent's positive activations"),
  **_votes('up'),
  **_votes('down'),
  'neighbour_ids': Array(
    ('N', 'neighbours'),
    'int32',
    'latent with a similar decoder row; -1: none',
    least=-1,
  ),
  'neighbour_cosines': Array(
    ('N', 'neighbours'),
    'float32',
    'cosine of the two decoder rows',
    # Rounding reaches beyond one.
    least=-1.001,
    most=1.001,
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


def to_bytes(table: dict[str, np.ndarray]) -> bytes:
  """The table as a compressed .npz."""
  buffer = io.BytesIO()
  rows = {name: np.ascontiguousarray(array) for name, array in table.items()}
  np.savez_compressed(buffer, **rows)
  return buffer.getvalue()


def read(url: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads features.npz.

  Raises:
    UserError: if it is absent, or see `parse`.
  """
  path = epath.Path(url)
  if not path.exists():
    raise errors.UserError(f'{path} does not exist: run sae-probe first')
  return parse(path.read_bytes(), str(path))


def parse(
  data: bytes, name: str, n_latents: int | None = None
) -> dict[str, np.ndarray]:
  """The table that the bytes of an .npz hold.

  No array is unpacked before its name, type and size are known to be right, and
  nothing in it is run.

  Args:
    data: the bytes.
    name: the file that they were read from, for the errors.
    n_latents: number of latents that the table must have; None for any.

  Raises:
    UserError: if it is not a table as declared.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = _members(archive)
      shapes = {n: _shape(archive, member) for n, member in members.items()}
      _check_shapes(shapes)
      _check_sizes(shapes, n_latents)
      table = {n: _array(archive, member) for n, member in members.items()}
    if n_latents is not None:
      _check_latents(table, n_latents)
    return table
  except errors.UserError as error:
    raise errors.UserError(f'{name}: {error}') from None
  except MemoryError:
    raise errors.UserError(
      f'{name} has {len(data):,} bytes, too many for the memory of this '
      'machine: use a larger one, or run sae-probe with fewer examples'
    ) from None
  except Exception as error:  # A zip and its members fail in a dozen ways.
    raise errors.UserError(
      f'{name} is not a readable npz file ({errors.reason(error)}): '
      'run sae-probe again'
    ) from None


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
  """The archive's member of each array."""
  members = {info.filename: info for info in archive.infolist()}
  wanted = {f'{name}.npy': name for name in ARRAYS}
  _check_names({n.removesuffix('.npy') for n in members})
  if len(members) < len(archive.infolist()) or members.keys() - wanted.keys():
    raise ValueError(
      f'it has {len(archive.infolist())} members for {len(wanted)} arrays'
    )
  for info in members.values():
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise ValueError(f'{info.filename} is not packed as numpy packs')
    if info.file_size > _DEFLATE_RATIO * (info.compress_size + 1):
      raise ValueError(
        f'{info.filename} claims {info.file_size:,} bytes in '
        f'{info.compress_size:,}'
      )
  return {wanted[filename]: info for filename, info in members.items()}


def _check_names(names: set[str]) -> None:
  missing = sorted(ARRAYS.keys() - names)
  if missing:
    raise errors.UserError(
      f'features lack {", ".join(missing)}: run sae-probe of this version'
    )


def _shape(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[int, ...]:
  """Shape of a member, whose header and size are as they must be."""
  declared = np.dtype(ARRAYS[member.filename.removesuffix('.npy')].dtype)
  with archive.open(member) as file:
    # Of later versions of the format a header may have gigabytes.
    if np.lib.format.read_magic(file) != (1, 0):
      raise ValueError(f'{member.filename} is of another version')
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    begin = file.tell()
  if dtype != declared or is_fortran:
    raise ValueError(
      f'{member.filename} holds {dtype}, not {declared} in order of rows'
    )
  size = begin + math.prod(shape) * declared.itemsize
  if min(shape, default=0) < 0 or member.file_size != size:
    raise ValueError(
      f'{member.filename} has {member.file_size:,} bytes for the shape {shape}'
    )
  return shape


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  with archive.open(member) as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def _check_sizes(
  shapes: dict[str, tuple[int, ...]], n_latents: int | None
) -> None:
  """Raises UserError if a table is larger than its latents can need."""
  (rows,) = shapes['latent_ids']
  if n_latents is not None and rows != n_latents:
    raise errors.UserError(
      f'it holds {rows:,} latents, the report is of {n_latents:,}: '
      'run sae-probe again'
    )
  for name, shape in shapes.items():
    size = math.prod(shape) * np.dtype(ARRAYS[name].dtype).itemsize // rows
    if size > _LATENT_BYTES:
      raise errors.UserError(
        f'{name} takes {size:,} bytes for a latent, more than '
        f'{_LATENT_BYTES:,}: run sae-probe with fewer or shorter examples'
      )


def _check_latents(table: dict[str, np.ndarray], n_latents: int) -> None:
  for name in ('latent_ids', 'neighbour_ids'):
    largest = int(table[name].max())
    if largest >= n_latents:
      raise errors.UserError(
        f'{name} holds latent {largest} of {n_latents}: run sae-probe again'
      )


def check(table: dict[str, np.ndarray], vocabulary_size: int) -> None:
  """Raises UserError unless a table is as declared and fits the vocabulary."""
  _check_names(set(table))
  _check_shapes({name: np.shape(table[name]) for name in ARRAYS})
  ids = table['latent_ids']
  if len(np.unique(ids)) != len(ids):
    raise errors.UserError(
      f'latent_ids has {len(ids)} entries but only {len(np.unique(ids))} '
      'different ones: run sae-probe again'
    )
  for name, declared in ARRAYS.items():
    _check_bounds(name, declared, table[name])
    largest = int(np.max(table[name])) if declared.is_token else -1
    if largest >= vocabulary_size:
      raise errors.UserError(
        f'{name} holds token {largest} but the vocabulary ends at '
        f'{vocabulary_size - 1}: use the vocabulary of the probed subject'
      )
  if not (np.diff(table['hist_edges']) > 0).all():
    raise errors.UserError('hist_edges do not rise: run sae-probe again')
  for kind in ('top', 'random'):
    _check_peaks(kind, table[f'{kind}_peak'], table[f'{kind}_tokens'])


def _check_bounds(name: str, declared: Array, array: np.ndarray) -> None:
  """Raises UserError if an entry is not one that the array can have."""
  array = np.asarray(array)
  if declared.may_be_absent:
    array = array[np.isfinite(array)]
  if not array.size:
    return
  low, high = array.min(), array.max()
  # Of numbers that are not finite one is an end; nan is both.
  if not (np.isfinite(low) and np.isfinite(high)) or not (
    declared.least <= low and high <= declared.most
  ):
    raise errors.UserError(
      f'{name} holds numbers from {low} to {high}, which is no '
      f'{declared.meaning.partition(";")[0]}: run sae-probe again'
    )


def _check_peaks(
  kind: str, peak_NM: np.ndarray, tokens_NMW: np.ndarray
) -> None:
  """Raises UserError if an example's place is outside of its window."""
  width = np.shape(tokens_NMW)[2]
  if np.max(peak_NM) < width:
    places_NM1 = np.maximum(peak_NM, 0)[..., None]
    at_NM1 = np.take_along_axis(np.asarray(tokens_NMW), places_NM1, axis=2)
    if ((at_NM1[..., 0] >= 0) | (peak_NM < 0)).all():
      return
  raise errors.UserError(
    f'{kind}_peak names places without a token in windows of {width}: '
    'run sae-probe again'
  )


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
  """Raises UserError unless each axis has one size in all arrays."""
  sizes = {}
  for name, declared in ARRAYS.items():
    shape = shapes[name]
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

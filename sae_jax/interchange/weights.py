"""The weights of a file under common names, with shapes that agree."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

import numpy as np

from sae_jax import errors
from sae_jax.interchange import imported
from sae_jax.interchange import place as place_lib
from sae_jax.interchange.files import reading
from sae_jax.storage import tensors

# Of the letters of `Weights`' tables, those of the common names.
_AXES = {
  'w_enc_ND': 'nd',
  'w_dec_ND': 'no',
  'w_skip_DD': 'od',
  'b_dec_D': 'o',
}
_F32 = np.dtype('<f4')
_KEPT = (_F32, np.dtype('<f8'), np.dtype('<f2'), tensors.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Weights:
  """Tensors of a file by common names.

  Attributes:
    sizes: letter -> size: n latents, d width that is read, o that is written.
    tensors: see `Imported`.
    transposed: see `Imported`.
    extra: see `Imported`.
  """

  sizes: dict[str, int]
  tensors: dict[str, tensors.Tensor]
  transposed: frozenset[str]
  extra: dict[str, tensors.Tensor]

  def fields(self) -> dict[str, Any]:
    """The fields of `Imported` that they are."""
    return {
      'd_in': self.sizes['d'],
      'd_out': self.sizes['o'],
      'n_latents': self.sizes['n'],
      'tensors': self.tensors,
      'transposed': self.transposed,
      'extra': self.extra,
    }


def take(
  file: reading.TensorFile,
  table: Mapping[str, tuple[str, str]],
  sizes: Mapping[str, int] | None = None,
  extra: Collection[str] = (),
) -> Weights:
  """The weights of a file, of which no value is read.

  Args:
    file: the file.
    table: name in the file -> (common name, letters of its axes in the file).
    sizes: letter -> size that the config says.
    extra: names of other tensors that the file may have.

  Raises:
    UserError: if a tensor is missing, unknown, of no real numbers, or has a
      shape that the others or the config contradict.
  """
  missing = sorted(table.keys() - file.tensors.keys())
  unknown = sorted(file.tensors.keys() - table.keys() - set(extra))
  if missing or unknown:
    words = [f'lacks {", ".join(missing)}'] * bool(missing)
    words += [f'has {", ".join(unknown)} besides'] * bool(unknown)
    raise errors.UserError(
      f'{file.url} {" and ".join(words)}, of which the format has '
      f'{", ".join(table)}: {place_lib.AGAIN}'
    )
  known = dict(sizes or {})
  for stored, (_, letters) in table.items():
    _check(file, stored, letters, known)
  content, transposed = {}, set()
  for stored, (name, letters) in table.items():
    tensor = file.tensors[stored]
    if letters != axes(name):
      tensor = tensor.T
      transposed.add(name)
    content[name] = tensor
  return Weights(
    known,
    content,
    frozenset(transposed),
    {name: file.tensors[name] for name in extra if name in file.tensors},
  )


def give(
  of: imported.Imported, table: Mapping[str, tuple[str, str]]
) -> dict[str, tensors.Tensor]:
  """The tensors of a file, by the table that `take` reads them by.

  They have the type that they have in common, if it is one of `_KEPT`, else
  float32.
  """
  content = {
    stored: ordered(of, name, letters)
    for stored, (name, letters) in table.items()
  }
  if len({tensor.dtype for tensor in content.values()}) > 1:
    return {name: single(tensor) for name, tensor in content.items()}
  return {name: storable(tensor) for name, tensor in content.items()}


def ordered(of: imported.Imported, name: str, letters: str) -> tensors.Tensor:
  """A tensor with its axes in the order of the letters, to be read by rows."""
  is_turned = letters != axes(name)
  tensor = of.tensors[name].T if is_turned else of.tensors[name]
  if len(letters) == 2 and (
    tensor.chunk or is_turned != (name in of.transposed)
  ):
    return tensors.by_rows(tensor)
  return tensor


def storable(tensor: tensors.Tensor) -> tensors.Tensor:
  """A tensor in its own type if that is one of `_KEPT`, else float32."""
  return tensor if tensor.dtype in _KEPT else single(tensor)


def single(tensor: tensors.Tensor) -> tensors.Tensor:
  """A tensor in float32; its values are converted as they are read."""
  if tensor.dtype == _F32:
    return tensor
  return dataclasses.replace(
    tensor, dtype=_F32, part=lambda ranges: tensor.part(ranges).astype(_F32)
  )


def axes(name: str) -> str:
  """Letters of the axes of a common name, see `Weights`."""
  return _AXES.get(name, 'n')


def _check(
  file: reading.TensorFile, stored: str, letters: str, known: dict[str, int]
) -> None:
  """Compares a tensor's shape to the sizes known, to which it adds."""
  tensor = file.tensors[stored]
  if tensor.dtype.kind not in 'fV' or tensor.dtype.itemsize < 2:
    raise errors.UserError(
      f'tensor {stored} of {file.url} is of {tensor.dtype}, not of float64, '
      f'float32, float16 or bfloat16: {place_lib.AGAIN}'
    )
  if len(tensor.shape) == len(letters):
    for letter, size in zip(letters, tensor.shape):
      known.setdefault(letter, size)
  expected = tuple(known.get(letter) for letter in letters)
  if tensor.shape != expected or 0 in tensor.shape:
    axes = {'n': 'latents', 'd': 'width', 'o': 'width written'}
    words = ' by '.join(
      f'{known.get(letter, "any")} ({axes[letter]})' for letter in letters
    )
    raise errors.UserError(
      f'tensor {stored} of {file.url} is of the shape {tensor.shape}, where '
      f'its config and other tensors have {words}: {place_lib.AGAIN}'
    )


def scalar(file: reading.TensorFile, name: str) -> float:
  """The value of a tensor that is one number.

  Raises:
    UserError: if it is none, or not finite.
  """
  tensor = file.tensors.get(name)
  if tensor is None or tensor.shape not in ((), (1,)):
    shape = 'not there' if tensor is None else f'of the shape {tensor.shape}'
    raise errors.UserError(
      f'tensor {name} of {file.url} is {shape}, where one number should be: '
      f'{place_lib.AGAIN}'
    )
  value = float(tensor.read().reshape(()).astype(np.float64))
  if not np.isfinite(value):
    raise errors.UserError(
      f'tensor {name} of {file.url} is {value}: {place_lib.AGAIN}'
    )
  return value


def check_k(k: int, n_latents: int, where: str) -> int:
  """k, once it is known to be a number of latents.

  Raises:
    UserError: if there are fewer.
  """
  if not 0 < k <= n_latents:
    raise errors.UserError(
      f'{where} has k {k:,} of {n_latents:,} latents: {place_lib.AGAIN}'
    )
  return k

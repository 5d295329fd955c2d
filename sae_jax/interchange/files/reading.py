"""Files of tensors, whatever library wrote them.

The format is seen in a file's first bytes; its name says nothing. No code of a
file is run, no more is in memory than a description of at most 8 MiB and what
is asked for, and nothing is written.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from sae_jax import errors
from sae_jax.interchange.files import archive, npz, pt
from sae_jax.storage import files, safetensors, tensors

_WHAT = 'a .safetensors, .pt or .npz file'
_ZIP = b'PK\x03\x04'
# Beginnings of what is often taken for a file of tensors, and the remedy.
_OTHERS = {
  b'\x80': (f'a pickle, which would have to be run to be read: {pt.REMEDY}'),
  b'\x93NUMPY': 'a single array: save all arrays with numpy.savez',
  b'version https://git-lfs': (
    'a pointer of Git LFS and not the file: download the file itself'
  ),
  b'GGUF': 'a language model, not an autoencoder',
}


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """What is in a file of tensors.

  Attributes:
    url: where it is.
    kind: 'safetensors', 'pt' or 'npz'.
    tensors: name -> tensor, whose values are not read yet.
    values: name -> text, number, list or dict of them that is beside the
      tensors: in a safetensors file the texts of its metadata.
  """

  url: str
  kind: str
  tensors: dict[str, tensors.Tensor]
  values: dict[str, Any]


def open_tensors(url: str | os.PathLike[str]) -> TensorFile:
  """Opens a file of tensors; none stays open.

  Args:
    url: local path or URL of a file, which may be the index of several
      safetensors files (`*.safetensors.index.json`).

  Raises:
    UserError: if there is none, or it is damaged, or of no format that is read,
      or holds more than tensors and plain values.
  """
  url = os.fspath(url)
  size = files.size(url, _WHAT)
  try:
    with epath.Path(url).open('rb') as file:
      head = file.read(64)
      if head.startswith(_ZIP):
        members = archive.members(file, size)
        if pt.is_archive(members):
          return TensorFile(url, 'pt', *pt.read_archive(url, file, members))
        if npz.is_archive(members):
          content = npz.read_archive(url, file, members)
          return TensorFile(url, 'npz', content, {})
        raise ValueError(
          f'it has {len(members)} members and neither data.pkl nor arrays alone'
        )
      if head.startswith(pt.LEGACY):
        return TensorFile(url, 'pt', *pt.read_legacy(url, file, size))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f'{url} is not read as a file of tensors ({size:,} bytes, '
      f'{errors.reason(error)}): get it again, or {pt.REMEDY}'
    ) from error
  for beginning, words in _OTHERS.items():
    if head.startswith(beginning) and head[8:9] != b'{':
      raise errors.UserError(f'{url} is {words}')
  if head[8:9] == b'{':
    return TensorFile(url, 'safetensors', *safetensors.read(url))
  if head.lstrip().startswith(b'{'):
    return TensorFile(url, 'safetensors', *safetensors.read_index(url))
  raise errors.UserError(
    f'{url} is no file of tensors that is known ({size:,} bytes, the first are '
    f'{head[:8]!r}): give {_WHAT}'
  )

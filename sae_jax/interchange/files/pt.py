"""PyTorch's `.pt` files of state dicts, read without torch.

Since PyTorch 1.6 a file is a zip archive: `data.pkl` describes the tensors,
`data/<key>` are the values that they are views of, stored and not deflated,
`byteorder` names the byte order. Before, it was five pickles and the values
behind them. Both are read; tensors may be transposed, share values, and skip
some, but a value that is in a tensor twice (an expanded one) is an error.
"""

from collections.abc import Callable
import struct
from typing import Any, BinaryIO

from etils import epath

from sae_jax.interchange.files import archive, pickles
from sae_jax.storage import tensors

LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_LEGACY_PROTOCOL = 1001
_DESCRIPTION = 'data.pkl'
_LONGEST_NAME = 1000
REMEDY = (
  'save it again with torch.save(module.state_dict(), path), or as safetensors'
)

# View -> the tensor of a name.
_Place = Callable[[str, pickles.View], tensors.Tensor]


def is_archive(names: dict[str, archive.Member]) -> bool:
  """Whether the members of a zip archive are those of a `.pt` file."""
  return any(name.endswith(f'/{_DESCRIPTION}') for name in names)


def read_archive(
  url: str, file: BinaryIO, members: dict[str, archive.Member]
) -> tuple[dict[str, tensors.Tensor], dict[str, Any]]:
  """The tensors and plain values of a file that is a zip archive.

  Args:
    url: local path or URL.
    file: the opened file.
    members: of the archive.

  Returns:
    Tensors by name, those of inner dicts as 'outer.inner'; and the other
    values, in dicts as they are in the file.

  Raises:
    ValueError: if it is not whole, or no state dict.
  """
  roots = [
    name.removesuffix(_DESCRIPTION)
    for name in members
    if name.endswith(f'/{_DESCRIPTION}')
  ]
  if len(roots) != 1:
    raise ValueError(f'it has {len(roots)} descriptions of tensors')
  root = roots[0]
  if f'{root}constants.pkl' in members:
    raise ValueError('it is a TorchScript program')
  if f'{root}byteorder' in members:
    order = archive.read_whole(file, members[f'{root}byteorder'], 16)
    if order != b'little':
      raise ValueError(f'its byte order is {order.decode(errors="replace")!r}')
  description = archive.read_whole(
    file, members[root + _DESCRIPTION], pickles.LONGEST
  )
  value, end = pickles.load(description)
  if end != len(description):
    raise ValueError('something follows its description of tensors')

  def place(name: str, view: pickles.View) -> tensors.Tensor:
    storage = view.storage
    member = members.get(f'{root}data/{storage.key}')
    if member is None:
      raise ValueError(
        f'tensor {name} has no values: {storage.key!r} is absent'
      )
    if member.is_deflated:
      raise ValueError(f'the values of tensor {name} are deflated')
    _check_size(name, storage, member.size)
    return _tensor(name, view, url, archive.opener(url, member), 0)

  return _sorted_out(value, place)


def _check_size(name: str, storage: pickles.Storage, n_bytes: int) -> None:
  if n_bytes != storage.count * storage.dtype.itemsize:
    raise ValueError(
      f'tensor {name} is of {storage.count:,} {storage.dtype} values, which '
      f'have {n_bytes:,} bytes'
    )


def _tensor(
  name: str, view: pickles.View, url: str, opener: tensors.Opener, start: int
) -> tensors.Tensor:
  dtype = view.storage.dtype
  return tensors.stored(
    opener,
    start + view.offset * dtype.itemsize,
    view.shape,
    dtype,
    f'tensor {name} of {url}',
    view.strides,
  )


def _sorted_out(
  value: Any, place: _Place
) -> tuple[dict[str, tensors.Tensor], dict[str, Any]]:
  """Tensors by name, and the values that are none, of a description."""
  if not isinstance(value, dict):
    kind = 'tensor' if isinstance(value, pickles.View) else type(value).__name__
    raise ValueError(f'it holds a {kind}, not a dict of tensors')
  placed: dict[str, tensors.Tensor] = {}

  def plain(content: dict[str, Any], before: str) -> dict[str, Any]:
    values = {}
    for key, item in content.items():
      name = before + key
      if len(name) > _LONGEST_NAME:
        raise ValueError(f'it has a name of {len(name):,} characters')
      if isinstance(item, pickles.View):
        if name in placed:
          raise ValueError(f'it has two tensors of the name {name}')
        placed[name] = place(name, item)
      elif isinstance(item, dict):
        values[key] = plain(item, f'{name}.')
      else:
        _check_plain(name, item)
        values[key] = item
    return values

  return placed, plain(value, '')


def _check_plain(name: str, value: Any) -> None:
  if isinstance(value, (list, tuple)):
    for item in value:
      _check_plain(name, item)
  elif isinstance(value, (dict, pickles.View)):
    raise ValueError(f'{name} is a list with a tensor or a dict in it')


def read_legacy(
  url: str, file: BinaryIO, size: int
) -> tuple[dict[str, tensors.Tensor], dict[str, Any]]:
  """`read_archive` of a file that PyTorch wrote before 1.6."""
  file.seek(0)
  data = file.read(pickles.LONGEST)
  at = len(LEGACY)
  protocol, at = pickles.load(data, at)
  system, at = pickles.load(data, at)
  value, at = pickles.load(data, at)
  keys, at = pickles.load(data, at)
  if protocol != _LEGACY_PROTOCOL:
    raise ValueError(f'its protocol is {protocol!r:.50}')
  if not isinstance(system, dict) or system.get('little_endian') is not True:
    raise ValueError('its byte order is not little')
  if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
    raise ValueError('it has no list of the values of its tensors')
  starts = _legacy_starts(file, size, at, keys, _storages(value))

  def place(name: str, view: pickles.View) -> tensors.Tensor:
    if view.storage.key not in starts:
      raise ValueError(f'tensor {name} has no values')
    start, n_bytes = starts[view.storage.key]
    _check_size(name, view.storage, n_bytes)
    return _tensor(name, view, url, lambda: epath.Path(url).open('rb'), start)

  return _sorted_out(value, place)


def _storages(value: Any) -> dict[str, pickles.Storage]:
  """All storages of a description by key."""
  storages, level = {}, [value]
  # `load` has bounded its depth.
  while level:
    one = level.pop()
    if isinstance(one, pickles.View):
      storages[one.storage.key] = one.storage
    elif isinstance(one, dict):
      level += one.values()
    elif isinstance(one, (list, tuple)):
      level += one
  return storages


def _legacy_starts(
  file: BinaryIO,
  size: int,
  at: int,
  keys: list[str],
  storages: dict[str, pickles.Storage],
) -> dict[str, tuple[int, int]]:
  """The first byte of each storage, and its bytes."""
  starts: dict[str, tuple[int, int]] = {}
  for key in keys:
    if key not in storages or key in starts:
      raise ValueError(f'it has values {key!r:.50} of no tensor, or twice')
    count = struct.unpack('<q', archive.read_at(file, at, 8))[0]
    n_bytes = count * storages[key].dtype.itemsize
    at += 8
    if not 0 <= n_bytes <= size - at:
      raise ValueError(f'its values {key!r:.50} would have {n_bytes:,} bytes')
    starts[key] = (at, n_bytes)
    at += n_bytes
  if at != size:
    raise ValueError(f'{size - at:,} bytes follow its tensors')
  return starts

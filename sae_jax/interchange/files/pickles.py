"""The pickles of PyTorch's state dicts, read by a machine that runs nothing.

A pickle is a program, and Python's own machine calls whatever function it
names. This one knows the instructions that `torch.save` writes for
dicts, lists, tuples, texts, numbers and tensors (protocol 2, and what 4 has
instead), and of functions only their names: `_CALLS` says what a call of one
means, and any other name is an error. Nothing is imported.
"""

from collections.abc import Callable, Sequence
import dataclasses
import struct
from typing import Any

import numpy as np

from sae_jax.storage import tensors

LONGEST = 8 * 2**20
# An instruction makes an object of a hundred bytes at the most.
_MOST_STEPS = 2**17
# Of a text, an integer's bytes, and values inside values.
_LONGEST_TEXT = 2**16
_LONGEST_INTEGER = 16
_DEEPEST = 32
_MOST_VALUES = 2**18


@dataclasses.dataclass(frozen=True)
class Name:
  """A function or type that a pickle names; it is never looked up."""

  module: str
  name: str


@dataclasses.dataclass(frozen=True)
class Storage:
  """Values on which tensors are views.

  Attributes:
    key: its name in the file.
    dtype: their type.
    count: how many there are.
  """

  key: str
  dtype: np.dtype
  count: int


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor: values of a storage from `offset` on, `strides` apart."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


STORAGES = {
  'DoubleStorage': np.dtype('<f8'),
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': tensors.BFLOAT16,
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype(bool),
}


def _ordered_dict() -> dict[str, Any]:
  return {}


def _size(sizes: Any) -> tuple[int, ...]:
  return _sizes(sizes)


def _view(
  storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> View:
  # requires_grad, hooks of its gradient, and since 2.1 a mapping of metadata.
  if len(rest) > 3 or any(rest[1:]):
    raise ValueError('a tensor has hooks or metadata')
  _of(storage, Storage)
  shape, strides = _sizes(shape), _sizes(strides)
  if len(shape) != len(strides):
    raise ValueError(f'a tensor has {len(shape)} sizes, {len(strides)} strides')
  view = View(storage, _sizes((offset,))[0], shape, strides)
  if 0 not in shape:
    _check_reach(view)
  return view


def _check_reach(view: View) -> None:
  """Raises ValueError unless a tensor lies in its storage, each value once."""
  last = 0
  for step, n in sorted(zip(view.strides, view.shape)):
    if n > 1 and step <= last:
      raise ValueError(
        f'a tensor of {view.shape} has the strides {view.strides}, so that '
        'some of its values may be the same ones'
      )
    last += (n - 1) * step
  if view.offset + last >= view.storage.count:
    raise ValueError(
      f'a tensor of {view.shape} needs value {view.offset + last:,} of a '
      f'storage of {view.storage.count:,}'
    )


def _parameter(view: Any, *rest: Any) -> View:
  if len(rest) > 3 or any(rest[1:]):
    raise ValueError('a parameter has hooks or a state')
  return _of(view, View)


_REBUILD = 'torch._utils'
_CALLS: dict[Name, Callable[..., Any]] = {
  Name('collections', 'OrderedDict'): _ordered_dict,
  Name('torch', 'Size'): _size,
  Name(_REBUILD, '_rebuild_tensor'): _view,
  Name(_REBUILD, '_rebuild_tensor_v2'): _view,
  Name(_REBUILD, '_rebuild_parameter'): _parameter,
}
_TYPES = {Name('torch', name): dtype for name, dtype in STORAGES.items()}


def _of(value: Any, *kinds: type) -> Any:
  if not isinstance(value, kinds):
    raise ValueError(
      f'a {type(value).__name__} stands where a {kinds[0].__name__} should'
    )
  return value


def _sizes(values: Any) -> tuple[int, ...]:
  if len(_of(values, tuple, list)) > tensors.MOST_AXES:
    raise ValueError(f'a tensor has {len(values):,} sizes')
  for size in values:
    if type(size) is not int or not 0 <= size < tensors.LARGEST:
      raise ValueError(f'a size is {size!r:.50}')
  return tuple(values)


def _set(content: dict[Any, Any], key: Any, value: Any) -> None:
  if type(key) is not str:
    raise ValueError(f'a dict has a key of the type {type(key).__name__}')
  if key in content:
    raise ValueError(f'a dict has the key {key!r} twice')
  content[key] = value


class _Machine:
  """A pickle while it is read."""

  def __init__(self, data: bytes, at: int):
    self.data, self.at = data, at
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}

  def take(self, size: int) -> bytes:
    if size > len(self.data) - self.at:
      raise ValueError('it ends early')
    self.at += size
    return self.data[self.at - size : self.at]

  def number(self, form: str) -> Any:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def line(self) -> str:
    end = self.data.find(b'\n', self.at, self.at + _LONGEST_TEXT)
    if end < 0:
      raise ValueError('it ends in a name')
    text = self.take(end + 1 - self.at)[:-1]
    return text.decode()

  def text(self, form: str) -> str:
    size = self.number(form)
    if size > _LONGEST_TEXT:
      raise ValueError(f'it has a text of {size:,} bytes')
    return self.take(size).decode()

  def pop(self) -> Any:
    floor = self.marks[-1] if self.marks else 0
    if len(self.stack) <= floor:
      raise ValueError('it takes what it has not made')
    return self.stack.pop()

  def top(self, *kinds: type) -> Any:
    self.stack.append(self.pop())
    return _of(self.stack[-1], *kinds)

  def since_mark(self) -> list[Any]:
    if not self.marks:
      raise ValueError('it goes back to a mark that it has not made')
    start = self.marks.pop()
    values = self.stack[start:]
    del self.stack[start:]
    return values

  def last(self, count: int) -> tuple[Any, ...]:
    return tuple([self.pop() for _ in range(count)][::-1])

  def keep(self, index: int) -> None:
    self.memo[index] = self.top(object)

  def recall(self, index: int) -> Any:
    if index not in self.memo:
      raise ValueError(f'it recalls value {index:,}, which it has not kept')
    return self.memo[index]


def _global(machine: _Machine, module: str, name: str) -> Name:
  del machine
  known = Name(module, name)
  if known not in _CALLS and known not in _TYPES:
    raise ValueError(
      f'it names {module}.{name}, which no dict of tensors needs and which is '
      'not called'
    )
  return known


def _stack_global(machine: _Machine) -> Name:
  module, name = machine.last(2)
  return _global(machine, _of(module, str), _of(name, str))


def _reduce(machine: _Machine) -> Any:
  function, arguments = machine.last(2)
  call = _CALLS.get(function) if isinstance(function, Name) else None
  if call is None:
    raise ValueError(f'it calls a {type(function).__name__}')
  try:
    return call(*_of(arguments, tuple))
  except TypeError as error:
    raise ValueError(f'it calls {function.name} wrongly') from error


def _persistent(machine: _Machine) -> Storage:
  """A storage: ('storage', type, key, device, count), and None if legacy."""
  place = _of(machine.pop(), tuple)
  if len(place) not in (5, 6) or place[0] != 'storage' or any(place[5:]):
    raise ValueError('it has a reference that is to no storage')
  kind, key, count = place[1], place[2], place[4]
  if not isinstance(kind, Name) or kind not in _TYPES:
    raise ValueError('it has a storage of no known type')
  return Storage(_of(key, str), _TYPES[kind], _sizes((count,))[0])


def _build(machine: _Machine) -> None:
  """The attributes of an OrderedDict, as its _metadata: they are left out."""
  state = machine.pop()
  machine.top(dict)
  _of(state, dict)


def _set_items(machine: _Machine, values: Sequence[Any]) -> None:
  content = machine.top(dict)
  if len(values) % 2:
    raise ValueError('it has a key without a value')
  for key, value in zip(values[::2], values[1::2]):
    _set(content, key, value)


def _append(machine: _Machine, items: Sequence[Any]) -> None:
  machine.top(list).extend(items)


def _integer(machine: _Machine) -> int:
  size = machine.number('<B')
  if size > _LONGEST_INTEGER:
    raise ValueError(f'it has an integer of {size} bytes')
  return int.from_bytes(machine.take(size), 'little', signed=True)


_Step = Callable[[_Machine], Any]
# Instructions that push a value, and those that do not.
_PUSH: dict[bytes, _Step] = {
  b'N': lambda m: None,
  b'\x88': lambda m: True,
  b'\x89': lambda m: False,
  b'K': lambda m: m.number('<B'),
  b'M': lambda m: m.number('<H'),
  b'J': lambda m: m.number('<i'),
  b'\x8a': _integer,
  b'G': lambda m: m.number('>d'),
  b'X': lambda m: m.text('<I'),
  b'\x8c': lambda m: m.text('<B'),
  b'}': lambda m: {},
  b']': lambda m: [],
  b')': lambda m: (),
  b't': lambda m: tuple(m.since_mark()),
  b'\x85': lambda m: m.last(1),
  b'\x86': lambda m: m.last(2),
  b'\x87': lambda m: m.last(3),
  b'c': lambda m: _global(m, m.line(), m.line()),
  b'\x93': _stack_global,
  b'R': _reduce,
  b'Q': _persistent,
  b'h': lambda m: m.recall(m.number('<B')),
  b'j': lambda m: m.recall(m.number('<I')),
}
_ACT: dict[bytes, _Step] = {
  b'\x80': lambda m: m.take(1),
  b'\x95': lambda m: m.take(8),
  b'(': lambda m: m.marks.append(len(m.stack)),
  b'q': lambda m: m.keep(m.number('<B')),
  b'r': lambda m: m.keep(m.number('<I')),
  b'\x94': lambda m: m.keep(len(m.memo)),
  b's': lambda m: _set_items(m, m.last(2)),
  b'u': lambda m: _set_items(m, m.since_mark()),
  b'a': lambda m: _append(m, m.last(1)),
  b'e': lambda m: _append(m, m.since_mark()),
  b'b': _build,
}


def load(data: bytes, at: int = 0) -> tuple[Any, int]:
  """What a pickle describes, tensors as `View`s.

  Args:
    data: bytes that hold it.
    at: the first of its own.

  Returns:
    The value: dicts with texts as keys, lists, tuples, texts, numbers, None and
    `View`s; and the byte after it.

  Raises:
    ValueError: if it is not whole, too long or too deep, or needs more than the
      above; the message says what.
  """
  machine = _Machine(data, at)
  for _ in range(_MOST_STEPS):
    code = machine.take(1)
    if code == b'.':
      value = machine.pop()
      if machine.stack or machine.marks:
        raise ValueError('it makes more than one value')
      _check_value(value)
      return value, machine.at
    if code in _PUSH:
      machine.stack.append(_PUSH[code](machine))
    elif code in _ACT:
      _ACT[code](machine)
    else:
      raise ValueError(
        f'it has the instruction {code[0]:#04x}, which no dict of tensors needs'
      )
  raise ValueError(f'it has more than {_MOST_STEPS:,} instructions')


def _check_value(value: Any) -> None:
  """Raises ValueError if a value has others in it too deeply, or too many.

  One that is inside itself is endlessly deep; one may be in many places.
  """
  level, count = [value], 0
  for _ in range(_DEEPEST):
    inner: list[Any] = []
    for one in level:
      if isinstance(one, dict):
        inner += one.values()
      elif isinstance(one, (list, tuple)):
        inner += one
      elif isinstance(one, (Name, Storage)):
        raise ValueError(f'a {type(one).__name__.lower()} stands for a value')
      if count + len(inner) > _MOST_VALUES:
        raise ValueError(f'it has more than {_MOST_VALUES:,} values')
    count += len(inner)
    level = inner
    if not level:
      return
  raise ValueError(f'it is nested more than {_DEEPEST} deep')

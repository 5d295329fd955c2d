"""Stored tensors -> the stacked parameters of a transformer."""

from collections.abc import Callable
import dataclasses
import functools

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import errors
from sae_jax.subject import transformer


def as_is(tensor: np.ndarray) -> np.ndarray:
  """The tensor."""
  return tensor


def turned(tensor: np.ndarray) -> np.ndarray:
  """[outputs, inputs] -> [inputs, outputs]."""
  return tensor.T


def plus_one(tensor: np.ndarray) -> np.ndarray:
  """The tensor plus one, in float32."""
  return 1 + tensor.astype(np.float32)


def third(index: int, turn: bool = False):
  """Reads a third of a tensor: all queries, then all keys, then all values.

  Args:
    index: 0 for queries, 1 for keys, 2 for values.
    turn: whether the tensor is [outputs, inputs].
  """

  def read(tensor):
    tensor = tensor.T if turn else tensor
    width = tensor.shape[-1] // 3
    return tensor[..., index * width : (index + 1) * width]

  return read


def head_third(index: int, n_heads: int, turn: bool = False):
  """The same, of a tensor that holds them head by head (GPT-NeoX)."""

  def read(tensor):
    tensor = tensor.T if turn else tensor
    heads = tensor.reshape(*tensor.shape[:-1], n_heads, 3, -1)
    return heads[..., index, :].reshape(*tensor.shape[:-1], -1)

  return read


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter is stored.

  Attributes:
    tensor: the tensor's name; {} stands for the block's number.
    read: the tensor -> the parameter, of one block.
  """

  tensor: str
  read: Callable[[np.ndarray], np.ndarray] = as_is


def assemble(
  config: transformer.TransformerConfig,
  sources: dict[str, Source],
  read: Callable[[str], np.ndarray],
  url: str,
  dtype: str = 'float32',
  shardings: transformer.Params | None = None,
) -> transformer.Params:
  """Reads and stacks the parameters.

  Args:
    config: the transformer's shape.
    sources: parameter -> where it is stored; a block's parameter has the prefix
      'blocks.'.
    read: a tensor's name -> its values.
    url: of the model, for messages.
    dtype: type of the parameters.
    shardings: of the parameters, nested as they are; None for one device. Only
      in host memory is a parameter ever whole.

  Raises:
    UserError: if a tensor does not have the shape the config asks for, or is
      not of real numbers.
  """
  load = functools.partial(_load, read, url)

  def whole(name, shape):
    return np.asarray(load(sources[name], '', shape), jnp.dtype(dtype))

  def stacked(name, shape):
    source = sources[f'blocks.{name}']
    # Before memory for all is asked for.
    first = load(source, 0, shape[1:])
    values = np.empty(shape, jnp.dtype(dtype))
    values[0] = first
    for block in range(1, config.n_layers):
      values[block] = load(source, block, shape[1:])
    return values

  shapes, shardings = transformer.param_shapes(config), shardings or {}
  params = {
    name: _put(whole(name, shape), shardings.get(name))
    for name, shape in shapes.items()
    if name != 'blocks'
  }
  in_blocks = shardings.get('blocks', {})
  params['blocks'] = {
    name: _put(stacked(name, shape), in_blocks.get(name))
    for name, shape in shapes['blocks'].items()
  }
  return jax.block_until_ready(params)


def _load(read, url, source, block, shape) -> np.ndarray:
  """A parameter of a block, or of none where block is ''."""
  name = source.tensor.format(block)
  tensor = read(name)
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise errors.UserError(
      f'tensor {name} of {url} is of the type {tensor.dtype}, and not of real '
      'numbers: use a model that is not quantised, or a GGUF file'
    )
  try:
    values = source.read(tensor)
    fits = values.shape == shape
  except (IndexError, ValueError):
    fits = False
  if not fits:
    raise errors.UserError(
      f'tensor {name} of {url} has shape {tensor.shape}, which does not give '
      f'the {shape} that the config asks for: convert the model again'
    )
  # A sum is several times faster than looking at each value.
  if not np.isfinite(np.sum(values, dtype=np.float32)):
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
      logging.warning(
        '%d of %d values of tensor %s of %s are no finite numbers: activations '
        'that they reach are not either',
        bad,
        values.size,
        name,
        url,
      )
  return values


def _put(values, sharding) -> jax.Array:
  if sharding is None:
    return jnp.array(values)
  return jax.make_array_from_callback(
    values.shape, sharding, lambda index: values[index]
  )


def check_names(
  config: transformer.TransformerConfig,
  sources: dict[str, Source],
  names: set[str],
  url: str,
) -> None:
  """Compares the tensors of a file with those that the family uses.

  Raises:
    UserError: if there are too few for the blocks, or one that is not used.
  """
  if config.n_layers > len(names):
    raise errors.UserError(
      f'{url} has {len(names)} tensors, too few for the {config.n_layers:,} '
      'blocks that its config asks for: download the model again'
    )
  used = {
    source.tensor.format(block)
    for source in sources.values()
    for block in range(config.n_layers)
  }
  unknown = sorted(names - used)
  if unknown:
    raise errors.UserError(
      f'{url} has {len(unknown)} tensors that the family does not use, '
      f'as {unknown[0]}: its model is of another kind, use a plain one'
    )

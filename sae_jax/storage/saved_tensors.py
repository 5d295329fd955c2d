"""Tensors that Orbax saves as arrays, a chunk at a time.

Orbax wants an array in memory, and keeps what it has compressed of it until all
is written. Of a leaf that is a `tensors.Tensor` two chunks are in memory; what
is saved are the chunks that an array of its values would have.
"""

import asyncio
from collections.abc import Awaitable, Sequence
import functools
import itertools

from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.experimental.v1._src.serialization import (
  array_leaf_handler,
  registry,
)
import tensorstore as ts

from sae_jax.storage import tensors


class TensorHandler(array_leaf_handler.ArrayLeafHandler):
  """Saves tensors; they are read as arrays.

  One process saves all of them. The leaves of a tree are tensors or arrays, not
  both: what is said of their chunks is one file, which one handler writes.
  """

  async def serialize(
    self, params: Sequence, serialization_context
  ) -> Awaitable[None]:
    """See Orbax's `LeafHandler`."""
    return self._save(params, serialization_context)

  async def _save(self, params, serialization_context) -> None:
    folder = await serialization_context.parent_dir.await_creation()
    chunks = []
    for param in params:
      info = array_leaf_handler._create_v0_saving_paraminfo(
        param, self._context, serialization_context
      )
      spec = tensorstore_utils.build_array_write_spec(
        info=info,
        arg=array_leaf_handler._create_v0_savearg(param, self._context),
        global_shape=param.value.shape,
        local_shape=param.value.shape,
        dtype=param.value.dtype,
        use_ocdbt=info.is_ocdbt_checkpoint,
        process_index=0 if info.is_ocdbt_checkpoint else None,
      )
      array = await ts.open(
        ts.Spec(spec.json), create=True, open=True, context=info.ts_context
      )
      await _write(param.value, array, spec.metadata.chunk_shape)
      chunks.append(spec.metadata)
    store = self._context.array_options.saving.array_metadata_store
    await store.write(folder, chunks, process_index=0)


async def _write(
  tensor: tensors.Tensor, array: ts.TensorStore, chunk: Sequence[int]
) -> None:
  """Writes a chunk while the next one is read."""
  corners = itertools.product(
    *(range(0, size, step) for size, step in zip(tensor.shape, chunk))
  )
  writing = None
  for corner in corners:
    ranges = tuple(
      (start, min(start + step, size))
      for start, step, size in zip(corner, chunk, tensor.shape)
    )
    block = await asyncio.to_thread(tensor.part, ranges)
    if writing is not None:
      await writing
    writing = array[tuple(slice(*one) for one in ranges)].write(
      block, can_reference_source_data_indefinitely=True
    )
    writing.commit.force()
  await writing


@functools.cache
def register() -> None:
  """Has Orbax take tensors for leaves that it can save, in this process.

  Whoever saves none does without: these parts of Orbax are not for others.
  """
  registry.STANDARD_TYPE_AND_ABSTRACT_TYPE_AND_TYPESTR_TO_HANDLER.append(
    (tensors.Tensor, tensors.Tensor, ['jax.Array'], TensorHandler)
  )

"""Orbax on every kind of storage: its settings for a URL."""

from collections.abc import Callable
import functools
import gc
import logging
import os
import sys
from typing import Any, TypeVar
import warnings

from etils import epath
import jax
from orbax.checkpoint import v1
from orbax.checkpoint._src.serialization import tensorstore_utils

from sae_jax import errors
from sae_jax.storage import locks, saved_arrays
from sae_jax.storage import url as url_lib

_Loaded = TypeVar('_Loaded')

# Warnings at every checkpoint that is not in OCDBT, as in buckets, where they
# are needless. Elsewhere they say that nothing can be read again.
_ALARMS = ('Skipping merge of OCDBT', 'TensorStore data files not found')

# The folder of a tree's arrays in that of the tree.
_TREE = 'arrays'

# Whoever reads a part of a chunk, such as a process of another mesh, reads and
# unpacks all of it. In a bucket each is a file.
_CHUNK_BYTES = 2**26


def context(url: str, timeout_s: int | None = None) -> v1.Context:
  """Orbax's settings for checkpoints under a URL.

  A checksum is saved with each chunk of an array, and compared by whoever reads
  the chunk.

  Args:
    url: local path or URL.
    timeout_s: seconds after which a save is given up; None for Orbax's own.

  Raises:
    UserError: if the URL's kind is not known, or its bucket does not exist.
  """
  _mend_orbax()
  if url_lib.backend(url).makes_buckets:
    # A misspelt URL must not make another bucket.
    bucket = url_lib.bucket(url)
    if not epath.Path(bucket).exists():
      raise errors.UserError(
        f'{url} cannot be used, there is no bucket {bucket}: make it, or check '
        'the URL and your access'
      )
  settings = v1.Context()
  settings.array.saving.use_zarr3 = True
  settings.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  if timeout_s is not None:
    settings.asynchronous.timeout_secs = timeout_s
  if url_lib.is_remote(url):
    # If a bucket's answer to a write is lost, a transaction on OCDBT takes its
    # own write for another's, and the checkpoint fails with ALREADY_EXISTS.
    settings.array.saving.use_ocdbt = False
    # Buckets cannot rename: a file that is written last marks it as whole.
    settings.atomicity.mode = v1.options.AtomicityMode.COMMIT_FILE
  return settings


def save_tree(url: str, tree: Any) -> None:
  """Saves a tree of arrays; every process saves its own shards.

  Args:
    url: the folder, which must not be there.
    tree: the arrays.

  Raises:
    UserError: see `context`.
  """
  with context(url):
    # Orbax writes to no relative path.
    folder = epath.Path(url_lib.absolute(url))
    v1.save(folder, tree, checkpointable_name=_TREE)


def load_tree(url: str, wanted: Any, remedy: str) -> Any:
  """Reads a tree of arrays; every process reads its own shards.

  Args:
    url: the folder, from `save_tree` or Orbax's StandardCheckpointer.
    wanted: shapes, dtypes and shardings of its arrays.
    remedy: what the user can do if it is damaged.

  Raises:
    UserError: if it cannot be read, naming the first array that is damaged; see
      also `context`.
  """
  with context(url):
    folder = epath.Path(url_lib.absolute(url))
    # Of StandardCheckpointer they lie in the folder itself.
    name = _TREE if (folder / _TREE).exists() else None
    arrays = folder / (name or '')

    def load():
      saved_arrays.check_json(os.fspath(arrays), remedy)
      return v1.load(folder, wanted, checkpointable_name=name)

    return explained(load, folder, [arrays], remedy)


def explained(
  load: Callable[[], _Loaded],
  url: epath.Path,
  folders: list[epath.Path],
  remedy: str,
) -> _Loaded:
  """What a function loads with Orbax, or what of it is damaged.

  Args:
    load: the function.
    url: the checkpoint.
    folders: those in it whose arrays it loads.
    remedy: what the user can do if they are damaged.

  Raises:
    UserError: if the checkpoint cannot be read, naming the first array that is
      damaged.
  """
  try:
    return load()
  except Exception as error:
    failure = _failure(error, url, folders, remedy)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    # The reading of other arrays, which Orbax leaves half done, complains as it
    # is thrown away.
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)
      gc.collect()
  finally:
    sys.unraisablehook = hook
  raise failure


def _failure(error, url, folders, remedy) -> Exception:
  """A UserError; the error's cause, if that is not in the checkpoint."""
  cause = error
  # Orbax wraps what TensorStore says into a dump of all that was wanted.
  while cause.__cause__ is not None:
    cause = cause.__cause__
  if isinstance(
    cause, (errors.UserError, MemoryError, jax.errors.JaxRuntimeError)
  ):
    return cause.with_traceback(None)
  for folder in folders:
    try:
      damaged = saved_arrays.first_damaged(os.fspath(folder))
    except ValueError:
      continue
    if damaged:
      name = os.path.join(os.path.relpath(folder, url), damaged[0])
      return errors.UserError(
        f'array {os.path.normpath(name)} of {url} is damaged ({damaged[1]}): '
        f'{remedy}'
      )
  return errors.UserError(
    f'{url} cannot be read ({type(cause).__name__}: {errors.reason(cause)}): '
    f'check your access; if it is damaged: {remedy}'
  )


@functools.cache
def _mend_orbax() -> None:
  """Makes Orbax do what no setting of it does."""
  # It turns `s3://bucket/folder` into the local path `s3:/bucket/folder`.
  plain = tensorstore_utils.build_kvstore_tspec

  @functools.wraps(plain)
  def build_kvstore_tspec(
    directory: str, name: str | None = None, **options
  ) -> dict[str, Any]:
    known = url_lib.is_known(directory)
    if not known or url_lib.backend(directory).orbax_knows:
      return locks.without(plain(directory, name, **options))
    if options.get('use_ocdbt', True):
      raise ValueError(f'{directory} is not opened with OCDBT')
    return url_lib.kvstore(os.path.join(directory, name or ''))

  tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec

  # It stores no checksum of arrays, and has no setting for codecs.
  plain_write = tensorstore_utils.build_array_write_spec

  @functools.wraps(plain_write)
  def build_array_write_spec(*args, **options):
    spec = plain_write(*args, **options)
    saved_arrays.add_digests(spec.json)
    return spec

  tensorstore_utils.build_array_write_spec = build_array_write_spec

  for name in ('absl', None):
    logging.getLogger(name).addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
  """Whether a warning is none of those that say nothing of buckets."""
  if not any(alarm in str(record.msg) for alarm in _ALARMS):
    return True
  arguments = record.args if isinstance(record.args, tuple) else ()
  return not any(url_lib.has_scheme(str(argument)) for argument in arguments)

"""Orbax on every kind of storage: its settings for a URL."""

import functools
import os
from typing import Any

from etils import epath
from orbax import checkpoint as ocp
from orbax.checkpoint import v1
from orbax.checkpoint._src.serialization import tensorstore_utils

from sae_jax import errors
from sae_jax.storage import url as url_lib


def context(url: str) -> v1.Context:
  """Orbax's settings for checkpoints under a URL.

  Raises:
    UserError: if the URL's kind is not known, or its bucket does not exist.
  """
  _prepare(url)
  settings = v1.Context()
  if url_lib.is_remote(url):
    # If a bucket's answer to a write is lost, a transaction on OCDBT takes its
    # own write for another's, and the checkpoint fails with ALREADY_EXISTS.
    settings.array.saving.use_ocdbt = False
    # Buckets cannot rename: a file that is written last marks it as whole.
    settings.atomicity.mode = v1.options.AtomicityMode.COMMIT_FILE
  return settings


def standard_checkpointer(url: str) -> ocp.StandardCheckpointer:
  """A checkpointer of single trees under a URL, with the same settings.

  Raises:
    UserError: if the URL's kind is not known, or its bucket does not exist.
  """
  _prepare(url)
  if not url_lib.is_remote(url):
    return ocp.StandardCheckpointer()
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  return ocp.StandardCheckpointer(
    use_ocdbt=False,
    atomicity_options=ocp.options.AtomicityOptions(mode=mode),
  )


def _prepare(url: str) -> None:
  _add_backends()
  if url_lib.backend(url).makes_buckets:
    # A misspelt URL must not make another bucket.
    bucket = url_lib.bucket(url)
    if not epath.Path(bucket).exists():
      raise errors.UserError(
        f'{url} cannot be used, there is no bucket {bucket}: make it, or check '
        'the URL and your access'
      )


@functools.cache
def _add_backends() -> None:
  """Makes Orbax open arrays on storage that it does not know.

  Its own function turns `s3://bucket/folder` into the local path
  `s3:/bucket/folder`, and no setting changes that.
  """
  plain = tensorstore_utils.build_kvstore_tspec

  @functools.wraps(plain)
  def build_kvstore_tspec(
    directory: str, name: str | None = None, **options
  ) -> dict[str, Any]:
    known = url_lib.is_known(directory)
    if not known or url_lib.backend(directory).orbax_knows:
      return plain(directory, name, **options)
    if options.get('use_ocdbt', True):
      raise ValueError(f'{directory} is not opened with OCDBT')
    return url_lib.kvstore(os.path.join(directory, name or ''))

  tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec

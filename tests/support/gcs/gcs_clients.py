"""Clients of a fake bucket: gcsfs without its cache, and less patience."""

import asyncio
from collections.abc import Callable
import types

import gcsfs.retry
import tensorstore as ts


def filesystem(url: str) -> gcsfs.GCSFileSystem:
  """gcsfs on a server, with nothing cached by others."""
  return gcsfs.GCSFileSystem(
    endpoint_url=url, token='anon', skip_instance_cache=True
  )


# TensorStore waits a second and more by default: for ts.Context.
QUICK_RETRIES = {
  'gcs_request_retries': {
    'max_retries': 32,
    'initial_delay': '5ms',
    'max_delay': '50ms',
  }
}


def hurry() -> Callable[[], None]:
  """Makes clients of this process try again some 100 times sooner.

  gcsfs has no setting for its 1 to 2 seconds. TensorStore's contexts that are
  made afterwards get `QUICK_RETRIES`; its default context keeps its seconds.

  Returns:
    What undoes it.
  """

  async def sleep(seconds):
    await asyncio.sleep(seconds / 100)

  class Context(ts.Context):
    def __init__(self, spec=None, parent=None):
      super().__init__(QUICK_RETRIES | (spec or {}), parent)

  before = gcsfs.retry.asyncio, ts.Context
  gcsfs.retry.asyncio = types.SimpleNamespace(sleep=sleep)
  ts.Context = Context

  def undo():
    gcsfs.retry.asyncio, ts.Context = before

  return undo

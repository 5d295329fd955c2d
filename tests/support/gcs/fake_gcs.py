"""A fake Google Cloud Storage server for tests: JSON API, in memory, loopback.

Serves the calls TensorStore's `gcs` driver, gcsfs and Orbax make: conditional
writes, generation headers, (suffix) byte ranges, paged listings with a
delimiter, media / multipart / resumable uploads, copies, moves and compose. It
counts requests and bytes, and with `Faults` it fails as the real one does.
"""

import collections
import dataclasses
import itertools
import threading
from typing import NamedTuple

from tests.support.gcs import gcs_http
from tests.support.gcs.gcs_faults import Faults


class Count(NamedTuple):
  """Requests, and bytes of their bodies in and out."""

  requests: int
  received: int
  sent: int


@dataclasses.dataclass(frozen=True)
class _Object:
  data: bytes
  generation: int
  content_type: str = 'application/octet-stream'


@dataclasses.dataclass
class _Upload:
  """A resumable upload; `answer` once it is complete."""

  name: str
  query: dict[str, str]
  data: bytearray
  answer: tuple | None = None


class FakeGcs:
  """`with FakeGcs(['bucket']) as url:` serves until the block is left.

  Attributes:
    objects: bucket -> name -> object with `data`.
    log: (method, path, Range header) of every request, in order.
    faults_met: kind -> how many requests met that fault.
    fault_log: (method, class, object, kind) of those.
    forbids: of a method, class and object: whether to answer 403.

  What clients do, found by running them (TensorStore 0.1.86, gcsfs 2026.10):

  TensorStore repeats 503, 429, lost connections and cut downloads, 32 times
  from 1 s on, and ignores Retry-After. Where a conditional write was done but
  its answer lost, the repeated one is refused: `write(if_equal=)` reports
  that it did not happen, partial writes of a shard read again and go on, but
  a transaction on OCDBT may end in ALREADY_EXISTS about its own write (so no
  checkpoint in a bucket is of OCDBT). It dies of a segmentation fault where a
  server refuses a condition that holds, so `stale` gives the object a new
  generation.

  gcsfs repeats the same ones 6 times from 1 to 2 s on, without a timeout of
  its own, and ignores Retry-After. After a lost answer its rm_file and mv_file
  raise FileNotFoundError and mode='create' FileExistsError, although they
  have done what was asked; rm(recursive=True), plain and resumable writes and
  copies go well.
  """

  def __init__(self, buckets, faults: Faults | None = None):
    self.objects = {bucket: {} for bucket in buckets}
    self.faults = faults
    self.lock = threading.Lock()
    self.uploads = {}
    self.log = []
    self.faults_met = collections.Counter()
    self.fault_log = []
    self.forbids = lambda method, what, target: False
    self._counts = {}
    self._times_sent = collections.Counter()
    self._generation = itertools.count(1_000_001)

  def __enter__(self):
    handler = type('Handler', (gcs_http.Handler,), {'gcs': self})
    self._server = gcs_http.Server(('127.0.0.1', 0), handler)
    threading.Thread(
      target=self._server.serve_forever, args=(0.02,), daemon=True
    ).start()
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    return self.url

  def __exit__(self, *exc):
    self._server.shutdown()
    self._server.server_close()

  def counts(self) -> dict[tuple[str, str], Count]:
    """(method, class) -> what was counted since the last `reset_counts`."""
    with self.lock:
      return {key: Count(*count) for key, count in self._counts.items()}

  def reset_counts(self) -> None:
    """Counts requests, bytes and faults from zero; the schedule goes on."""
    with self.lock:
      self._counts.clear()
      self.faults_met.clear()

  def table(self, per: int = 1) -> str:
    """Requests and bytes by method and class, a line each.

    Args:
      per: what all numbers are divided by: batches, say.
    """
    lines = [
      f'{method:6} {what:11} {c.requests / per:10.2f} requests '
      f'{c.received / per:12.0f} bytes in {c.sent / per:12.0f} bytes out'
      for (method, what), c in sorted(self.counts().items())
    ]
    met = ', '.join(
      f'{n} {kind}' for kind, n in sorted(self.faults_met.items())
    )
    return '\n'.join([*lines, f'faults: {met or "none"}'])

  def count(self, method, what, requests=0, received=0, sent=0):
    with self.lock:
      count = self._counts.setdefault((method, what), [0, 0, 0])
      for i, number in enumerate((requests, received, sent)):
        count[i] += number

  def draw_fault(self, request, possible):
    """The fault that a request which has come in is to meet, or None."""
    if self.faults is None:
      return None
    with self.lock:
      self._times_sent[request] += 1
      return self.faults.draw((*request, self._times_sent[request]), possible)

  def fault_met(self, method, what, target, kind):
    with self.lock:
      self.faults_met[kind] += 1
      self.fault_log.append((method, what, target, kind))

  def begin_upload(self, upload, name, query):
    """Notes a resumable upload by its id."""
    self.uploads[upload] = _Upload(name, query, bytearray())

  def put(
    self, bucket, name, data, query, content_type='application/octet-stream'
  ):
    """Returns the new object, or None if a precondition failed."""
    with self.lock:
      if not self.precondition(bucket, name, query):
        return None
      obj = _Object(data, next(self._generation), content_type)
      self.objects[bucket][name] = obj
      return obj

  def touch(self, bucket, name):
    """Gives an object a new generation, as another writer would."""
    with self.lock:
      obj = self.objects[bucket][name]
      self.objects[bucket][name] = dataclasses.replace(
        obj, generation=next(self._generation)
      )

  def delete(self, bucket, name, query):
    with self.lock:
      if name not in self.objects[bucket]:
        return 404
      if not self.precondition(bucket, name, query):
        return 412
      del self.objects[bucket][name]
      return 204

  def precondition(self, bucket, name, query):
    have = self.objects[bucket].get(name)
    have = have.generation if have else 0
    want = query.get('ifGenerationMatch')
    unwanted = query.get('ifGenerationNotMatch')
    return (want is None or int(want) == have) and (
      unwanted is None or int(unwanted) != have
    )

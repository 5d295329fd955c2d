"""What is asked, and the files of questions and answers that other tools use.

`requests.jsonl` has a line for each request without an answer: `id`, `kind`
(explain or detect), `latent`, `messages` and `settings`; a chat request is
`{**settings, "messages": messages}`. `responses.jsonl` has a line for each
answer: `id`, `content`, and optionally `finish_reason`, `refusal`, `logprobs`
(the list `choices[0].logprobs.content`) and `reasoning`, whether there was text
of another kind alone. Of two lines of an id the later one counts. An id is a
digest of all that is asked: an answer to another question is never used.
"""

from collections.abc import Iterable
import dataclasses
import functools
import hashlib
import json
import os
import time
from typing import Any

from absl import logging
from etils import epath

from sae_jax.storage import files, records
from sae_jax.storage import url as url_lib

EXPLAIN, DETECT = 'explain', 'detect'
REQUESTS, RESPONSES = 'requests.jsonl', 'responses.jsonl'
_ID = 24  # hexadecimal digits
# Between two writes of an object that cannot be appended to.
_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Request:
  """A request of a language model.

  Attributes:
    kind: EXPLAIN or DETECT.
    latent: the latent that it is about.
    messages: of the chat.
    settings: all other fields of the chat request.
    texts: for DETECT the places of the texts among those of the latent.
    order: for DETECT the number of the permutation.
    explained: for DETECT the latent whose explanation it is judged by.
  """

  kind: str
  latent: int
  messages: list[dict[str, str]]
  settings: dict[str, Any]
  texts: tuple[int, ...] = ()
  order: int = 0
  explained: int = -1

  @functools.cached_property
  def id(self) -> str:
    """A digest of what is asked; of each order another."""
    asked = [self.kind, self.latent, self.order, self.settings, self.messages]
    data = json.dumps(asked, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:_ID]

  @property
  def line(self) -> dict[str, Any]:
    """Its line of requests.jsonl."""
    return {
      'id': self.id,
      'kind': self.kind,
      'latent': self.latent,
      'messages': self.messages,
      'settings': self.settings,
    }


def write(folder: epath.PathLike, requests: Iterable[Request]) -> None:
  """Writes requests.jsonl, in place of an older one."""
  lines = [
    json.dumps(request.line, allow_nan=False) + '\n' for request in requests
  ]
  files.write_text(epath.Path(folder) / REQUESTS, ''.join(lines))


class Responses:
  """The answers of a folder, and the file that more are added to.

  A local file is appended to, a line at a time, so that a run may be stopped at
  any moment. An object in a bucket is written anew every half minute and at
  the end.

  Attributes:
    by_id: the answers.
  """

  def __init__(self, folder: epath.PathLike):
    self._path = epath.Path(folder) / RESPONSES
    data = self._path.read_bytes() if self._path.exists() else b''
    last = data[data.rfind(b'\n') + 1 :]
    # A process that was killed leaves the last line torn.
    torn = len(last) if records.parse_lines(last)[1] else 0
    whole = data[: len(data) - torn]
    # Where the file is cut off before more is added; None if it is whole.
    self._cut_at = len(whole) if torn else None
    self._lacks_end = whole[-1:] not in (b'', b'\n')
    self._lines = self._sound(whole)
    self.by_id = {line['id']: line for line in self._lines}
    self._file = None
    self._remote = url_lib.is_remote(self._path)
    self._due, self._is_dirty = time.monotonic() + _SECONDS, False

  def _sound(self, data: bytes) -> list[dict[str, Any]]:
    lines, damaged = records.parse_lines(data)
    sound = [
      line
      for line in lines
      if isinstance(line.get('id'), str) and 'content' in line
    ]
    damaged += len(lines) - len(sound)
    if damaged:
      logging.warning(
        '%s has %d lines that are no answers (a mapping with id and content): '
        'left out',
        self._path,
        damaged,
      )
    return sound

  def __enter__(self) -> 'Responses':
    return self

  def __exit__(self, *_) -> None:
    if self._file is not None:
      self._file.close()
    elif self._is_dirty:
      self._write_whole()

  def add(self, response: dict[str, Any]) -> None:
    """Adds an answer to the file.

    Raises:
      OSError: if it cannot be written.
    """
    self.by_id[response['id']] = response
    self._lines.append(response)
    if not self._remote:
      self._append(response)
      return
    self._is_dirty = True
    if time.monotonic() > self._due:
      self._write_whole()

  def _append(self, response):
    if self._file is None:
      self._file = open(os.fspath(self._path), 'ab')  # noqa: SIM115
      if self._cut_at is not None:
        self._file.truncate(self._cut_at)
      if self._lacks_end:
        self._file.write(b'\n')
    self._file.write(json.dumps(response, allow_nan=False).encode() + b'\n')
    self._file.flush()

  def _write_whole(self):
    lines = ''.join(
      json.dumps(line, allow_nan=False) + '\n' for line in self._lines
    )
    files.write_text(self._path, lines)
    self._due, self._is_dirty = time.monotonic() + _SECONDS, False


def unanswered(
  requests: Iterable[Request], responses: Responses
) -> list[Request]:
  """Those without an answer; each id once."""
  left = {r.id: r for r in requests if r.id not in responses.by_id}
  return list(left.values())

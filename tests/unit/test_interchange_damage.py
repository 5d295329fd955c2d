"""Autoencoders with something wrong in their files: read, or refused.

SAE_JAX_DAMAGES sets how many damages of each are tried, from the seed
SAE_JAX_DAMAGES_FROM on.
"""

import contextlib
import io
import json
import os
import random
import sys
import zipfile

import pytest
import yaml

from sae_jax import errors
from tests.support import damages
from tests.support import golden_autoencoders as golden
from tests.support import hostile_files as hostile

COUNT = int(os.environ.get('SAE_JAX_DAMAGES', 20))
FIRST = int(os.environ.get('SAE_JAX_DAMAGES_FROM', 0))
# What Python says of itself when code of a file is found, made or run.
EVENTS = {
  'exec',
  'compile',
  'import',
  'os.system',
  'os.exec',
  'os.posix_spawn',
  'pickle.find_class',
  'subprocess.Popen',
  'socket.connect',
}
_heard: list[list[str]] = []
# Python imports what escapes characters when it is first used.
errors.printable('\x00')


def _hear(event, args):
  # It can't be taken away again.
  if _heard and event in EVENTS:
    _heard[-1].append(f'{event} {args}'[:200])


sys.addaudithook(_hear)


@contextlib.contextmanager
def heard():
  """The events of `EVENTS` while it is open."""
  _heard.append([])
  try:
    yield _heard[-1]
  finally:
    _heard.pop()


def spliced(data, rng):
  """A piece is doubled, moved, or from a program."""
  start, end = sorted(rng.randrange(len(data)) for _ in range(2))
  at = rng.randrange(len(data))
  piece = data[start:end][: rng.choice((1, 4, 30, 1000))]
  if rng.random() < 0.5:
    programs = hostile.programs('ran')
    piece = programs[rng.choice(sorted(programs))].removesuffix(b'.')
  return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def odd_bytes(data, rng, upto):
  if rng.random() < 0.3:
    return spliced(data, rng)
  return rng.choice(damages.OF_BYTES)(data, rng, upto)


def odd_members(data, rng):
  """An archive one of whose members is damaged, and packed again."""
  out = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(data)) as old,
    zipfile.ZipFile(
      out,
      'w',
      rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
      if rng.random() < 0.2
      else zipfile.ZIP_STORED,
    ) as new,
  ):
    names = old.namelist()
    pickles = [name for name in names if name.endswith('.pkl')]
    chosen = rng.choice(pickles * len(names) + names)
    for name in names:
      content = old.read(name)
      if name == chosen and content:
        upto = 100 if name.endswith('.npy') else len(content)
        if len(content) > 8:
          content = odd_bytes(content, rng, max(9, min(upto, len(content))))
      new.writestr(name, content)
  return out.getvalue()


def odd_archive(data, rng):
  if rng.random() < 0.6:
    return odd_members(data, rng)
  # The directory is at the end.
  start = data.find(b'PK\x01\x02')
  tail = odd_bytes(data[start:], rng, len(data) - start)
  return rng.choice((data[:start] + tail, odd_bytes(data, rng, len(data))))


def odd(path, data, rng):
  """A damaged file, by the kind of the whole one."""
  if path.suffix == '.json':
    return damages.odd_json(data, rng)
  if path.suffix == '.yaml':
    if rng.random() < 0.5:
      return damages.odd_json(json.dumps(yaml.safe_load(data)).encode(), rng)
    return odd_bytes(data, rng, len(data))
  if path.suffix == '.safetensors':
    if rng.random() < 0.2:
      return spliced(data, rng)
    return damages.odd_tensors(data, rng)
  return odd_archive(data, rng)


def outcome(name, folder):
  """'read' or 'refused', whichever it is; anything else is an error."""
  try:
    autoencoder = golden.read(name, folder)
    for tensor in (autoencoder.tensors | autoencoder.extra).values():
      values = tensor.read()
      assert values.shape == tensor.shape and values.dtype == tensor.dtype
  except errors.UserError as error:
    assert str(error).isprintable()
    assert len(str(error)) < 1100
    return 'refused'
  return 'read'


@pytest.mark.parametrize('name', golden.NAMES)
def test_a_damaged_autoencoder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = golden.copy(name, tmp_path / 'a')
  # The first imports what is imported late.
  assert outcome(name, folder) == 'read'
  paths = sorted(path for path in folder.rglob('*') if path.is_file())
  outcomes = {'read': 0, 'refused': 0}
  for seed in range(FIRST, FIRST + COUNT):
    rng = random.Random(f'{name} {seed}')
    path = rng.choice(paths)
    whole = path.read_bytes()
    path.write_bytes(odd(path, whole, rng))
    with heard() as events:
      outcomes[outcome(name, folder)] += 1
    assert events == []
    path.write_bytes(whole)
  assert not (tmp_path / 'ran').exists()
  assert outcome(name, folder) == 'read'
  assert outcomes['refused'] > 0 or COUNT < 20


def test_control_events_are_heard():
  with heard() as events:
    eval('1 + 1')
  assert any(event.startswith('exec') for event in events)

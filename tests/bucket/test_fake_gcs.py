"""The server's faults happen, are counted, and its clients survive them."""

import contextlib
import json
import os
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorstore as ts

from tests.support.gcs import fake_gcs, gcs_clients, gcs_faults

_OBJECT = 'storage/v1/b/bucket/o/k'
_UPLOAD = 'upload/storage/v1/b/bucket/o?uploadType=media&name=k'


def serve(kinds, rate=1.0, seed=0, **kwargs):
  faults = gcs_faults.Faults(seed, rate, kinds, **kwargs)
  return fake_gcs.FakeGcs(['bucket'], faults)


def ask(url, path, method='GET', data=None, headers=None):
  """Status, headers and body of one request, which is never repeated."""
  request = urllib.request.Request(
    f'{url}/{path}', data, headers or {}, method=method
  )
  try:
    with urllib.request.urlopen(request, timeout=20) as reply:
      return reply.status, reply.headers, reply.read()
  except urllib.error.HTTPError as error:
    return error.code, error.headers, error.read()


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
  undo = gcs_clients.hurry()
  yield
  undo()


def kvstore(url, monkeypatch, max_retries=32, path=''):
  # Read when the driver opens.
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
  retries = gcs_clients.QUICK_RETRIES['gcs_request_retries']
  context = ts.Context(
    {'gcs_request_retries': retries | {'max_retries': max_retries}}
  )
  spec = {'driver': 'gcs', 'bucket': 'bucket', 'path': path}
  return ts.KvStore.open(spec, context=context).result()


@pytest.mark.parametrize('kind', ['503', '429', '429-after'])
def test_an_error_is_answered_and_nothing_done(kind):
  server = serve((kind,))
  with server as url:
    status, headers, body = ask(url, _UPLOAD, 'POST', b'data')
  assert status == int(kind[:3]) == json.loads(body)['error']['code']
  assert headers['Retry-After'] == ('1' if kind == '429-after' else None)
  assert server.objects['bucket'] == {}
  assert server.faults_met == {kind: 1}
  assert server.fault_log == [('POST', 'write', 'bucket/k', kind)]


@pytest.mark.parametrize(('kind', 'done'), [('drop', 0), ('drop-after', 1)])
def test_a_lost_answer(kind, done):
  server = serve((kind,))
  with server as url:
    with pytest.raises(ConnectionError):
      ask(url, _UPLOAD, 'POST', b'data')
    assert len(server.objects['bucket']) == done
    if done:
      with pytest.raises(ConnectionError):
        ask(url, _OBJECT, 'DELETE')
      assert server.objects['bucket'] == {}
      # What only reads is not of this kind.
      assert ask(url, _OBJECT)[0] == 404
  assert server.faults_met == {kind: 1 + done}


@pytest.mark.parametrize('byte_range', [None, 'bytes=2-7'])
def test_a_cut_download(byte_range):
  server = serve(('cut',))
  server.put('bucket', 'k', b'0123456789', {})
  headers = {'Range': byte_range} if byte_range else {}
  with server as url:
    with pytest.raises(Exception, match='IncompleteRead') as caught:
      ask(url, _OBJECT + '?alt=media', headers=headers)
    assert caught.value.partial == (b'234' if byte_range else b'01234')
    # Metadata, and what is not there, come whole.
    assert ask(url, _OBJECT)[0] == 200
    assert ask(url, 'storage/v1/b/bucket/o/gone?alt=media')[0] == 404
  assert server.faults_met == {'cut': 1}


def test_a_slow_answer_is_right():
  server = serve(('slow',), delay=0.1)
  server.put('bucket', 'k', b'0123456789', {})
  with server as url:
    start = time.monotonic()
    assert ask(url, _OBJECT + '?alt=media')[2] == b'0123456789'
    assert time.monotonic() - start > 0.2
  assert server.faults_met == {'slow': 1}


def test_a_stale_precondition_is_as_if_another_had_written():
  server = serve(('stale',))
  old = server.put('bucket', 'k', b'data', {}).generation
  with server as url:
    absent = f'{_UPLOAD}2&ifGenerationMatch=0'
    assert ask(url, absent, 'POST', b'')[0] == 200
    assert ask(url, _UPLOAD, 'POST', b'data')[0] == 200
    new = server.objects['bucket']['k'].generation
    # One that fails anyway is no fault.
    wrong = f'{_UPLOAD}&ifGenerationMatch={old}'
    assert ask(url, wrong, 'POST', b'x')[0] == 412
    assert not server.faults_met
    right = f'{_UPLOAD}&ifGenerationMatch={new}'
    assert ask(url, right, 'POST', b'x')[0] == 412
  obj = server.objects['bucket']['k']
  assert (obj.data, obj.generation > new) == (b'data', True)
  assert server.faults_met == {'stale': 1}


def test_conditions_are_kept_without_faults():
  server = fake_gcs.FakeGcs(['bucket'])
  with server as url:
    absent = f'{_UPLOAD}&ifGenerationMatch=0'
    assert ask(url, absent, 'POST', b'one')[0] == 200
    assert ask(url, absent, 'POST', b'two')[0] == 412
    have = server.objects['bucket']['k'].generation
    right = f'{_UPLOAD}&ifGenerationMatch={have}'
    assert ask(url, right, 'POST', b'three')[0] == 200
    assert ask(url, right, 'POST', b'four')[0] == 412
  assert server.objects['bucket']['k'].data == b'three'
  assert not server.faults_met


def test_what_is_forbidden_is_answered_403_and_not_done():
  server = fake_gcs.FakeGcs(['bucket'])
  asked = []
  server.forbids = lambda *request: asked.append(request) or len(asked) < 2
  with server as url:
    assert ask(url, _UPLOAD, 'POST', b'data')[0] == 403
    assert asked == [('POST', 'write', 'bucket/k')]
    assert server.objects['bucket'] == {}
    assert ask(url, _UPLOAD, 'POST', b'data')[0] == 200


def test_a_chunk_sent_again_is_not_there_twice():
  server = fake_gcs.FakeGcs(['bucket'])
  start = 'upload/storage/v1/b/bucket/o?uploadType=resumable&name=k'
  with server as url:
    location = ask(url, start, 'POST', b'{}')[1]['Location']
    path = location.removeprefix(url + '/')
    for _ in range(2):
      head = {'Content-Range': 'bytes 0-3/*'}
      status, headers, _ = ask(url, path, 'POST', b'0123', head)
      assert (status, headers['Range']) == (308, 'bytes=0-3')
    early = {'Content-Range': 'bytes 9-9/10'}
    assert ask(url, path, 'POST', b'9', early)[0] == 400
    for _ in range(2):
      head = {'Content-Range': 'bytes 4-5/6'}
      assert ask(url, path, 'POST', b'45', head)[0] == 200
  assert server.objects['bucket']['k'].data == b'012345'


def test_requests_and_bytes_are_counted():
  server = fake_gcs.FakeGcs(['bucket'])
  with server as url:
    ask(url, _UPLOAD, 'POST', b'0123456789')
    server.reset_counts()
    ask(url, _OBJECT + '?alt=media')
    ask(url, _OBJECT + '?alt=media', headers={'Range': 'bytes=1-3'})
    ask(url, _OBJECT + '?alt=media', headers={'Range': 'bytes=-4'})
    metadata = len(ask(url, _OBJECT)[2])
    listing = len(ask(url, 'storage/v1/b/bucket/o')[2])
    written = len(ask(url, _UPLOAD, 'POST', b'01234')[2])
    ask(url, _OBJECT, 'DELETE')
  assert server.counts() == {
    ('GET', 'object read'): (1, 0, 10),
    ('GET', 'range read'): (2, 0, 7),
    ('GET', 'metadata'): (1, 0, metadata),
    ('GET', 'list'): (1, 0, listing),
    ('POST', 'write'): (1, 5, written),
    ('DELETE', 'delete'): (1, 0, 0),
  }
  lines = server.table(per=2).splitlines()
  assert lines[-1] == 'faults: none'
  (ranged,) = (line for line in lines if 'range read' in line)
  assert '1.00 requests' in ranged
  assert ranged.endswith(' 4 bytes out')


def _scheduled(seed, names):
  server = serve(('503', '429', 'drop-after'), rate=0.4, seed=seed)
  with server as url:
    for name in names:
      for _ in range(2):
        with contextlib.suppress(ConnectionError):
          ask(url, _UPLOAD + name, 'POST', b'data')
  return server.fault_log


def test_the_seed_is_the_schedule():
  names = [str(i) for i in range(12)]
  once = _scheduled(0, names)
  assert 5 < len(once) < 15
  assert {kind for *_, kind in once} == {'503', '429', 'drop-after'}
  assert _scheduled(0, names) == once
  assert _scheduled(1, names) != once
  # The order in which clients come to their requests changes nothing.
  assert sorted(_scheduled(0, names[::-1])) == sorted(once)


def test_the_rate_is_the_share_that_fails():
  faults = gcs_faults.Faults(0, 0.1)
  drawn = [faults.draw(('GET', i), {'503', 'cut'}) for i in range(4000)]
  failed = [kind for kind in drawn if kind]
  assert 320 < len(failed) < 480
  assert 120 < failed.count('cut') < 280
  assert set(failed) == {'503', 'cut'}
  with pytest.raises(ValueError, match='no such faults'):
    gcs_faults.Faults(0, 0.1, ('504',))


def test_tensorstore_gets_and_puts_the_right_bytes(quick, monkeypatch):
  server = serve(gcs_faults.ALL_KINDS, 0.1)
  with server as url:
    files = kvstore(url, monkeypatch)
    data = {f'k{i}': bytes([i]) * 50 * i for i in range(40)}
    for name, value in data.items():
      files.write(name, value).result()
    assert {n: files.read(n).result().value for n in data} == data
    assert sorted(files.list().result()) == sorted(k.encode() for k in data)
    for name in list(data)[:20]:
      files.write(name, None).result()
    assert len(files.list().result()) == 20
    # Halves of shards: each write reads, changes and writes an object back.
    spec = {
      'driver': 'zarr3',
      'kvstore': files.spec().to_json() | {'path': 'array/'},
      'metadata': {
        'shape': [64, 16],
        'data_type': 'int32',
        'chunk_grid': {
          'name': 'regular',
          'configuration': {'chunk_shape': [16, 16]},
        },
        'codecs': [
          {
            'name': 'sharding_indexed',
            'configuration': {
              'chunk_shape': [4, 16],
              'codecs': [{'name': 'bytes'}],
            },
          }
        ],
      },
    }
    context = ts.Context()
    array = ts.open(spec, context=context, create=True).result()
    values = np.arange(64 * 16, dtype=np.int32).reshape(64, 16)
    for row in range(0, 64, 2):
      array[row : row + 2].write(values[row : row + 2]).result()
    np.testing.assert_array_equal(array.read().result(), values)
  assert len(server.faults_met) > 4
  assert server.faults_met.total() > 15


@pytest.mark.parametrize('kind', gcs_faults.ALL_KINDS)
def test_tensorstore_meets_every_kind(quick, monkeypatch, kind):
  server = serve((kind,), 0.5)
  with server as url:
    files = kvstore(url, monkeypatch)
    for i in range(8):
      files.write(f'k{i}', b'%d' % i).result()
      assert files.read(f'k{i}').result().value == b'%d' % i
      stamp = files.read(f'k{i}').result().stamp.generation
      # A conditional write says it has not happened where the server says so,
      # and also where the answer was lost: the caller looks and goes on.
      files.write(f'k{i}', b'new', if_equal=stamp).result()
      value = files.read(f'k{i}').result().value
      assert value == (b'new' if kind != 'stale' else value)
  assert server.faults_met[kind] > 2


def test_tensorstore_does_not_wait_as_long_as_it_is_asked(quick, monkeypatch):
  server = serve(('429-after',), 0.5, retry_after=30)
  with server as url:
    files = kvstore(url, monkeypatch)
    start = time.monotonic()
    for i in range(6):
      files.write(f'k{i}', b'data').result()
    assert time.monotonic() - start < 20
  assert server.faults_met['429-after'] > 0


def test_gcsfs_gets_and_puts_the_right_bytes(quick, tmp_path):
  kinds = tuple(k for k in gcs_faults.ALL_KINDS if k != 'drop-after')
  server = serve(kinds, 0.1)
  with server as url:
    files = gcs_clients.filesystem(url)
    data = {f'bucket/a/k{i}': bytes([i]) * 50 * i for i in range(20)}
    for name, value in data.items():
      files.pipe_file(name, value)
    for i, (name, value) in enumerate(data.items()):
      assert files.cat_file(name) == value
      files.get_file(name, str(tmp_path / 'copy'))
      assert (tmp_path / 'copy').read_bytes() == value
      files.cp_file(name, f'bucket/b/k{i}')
      files.mv_file(f'bucket/b/k{i}', f'bucket/c/k{i}')
    assert files.ls('bucket/a') == sorted(data)
    assert [len(o.data) for n, o in server.objects['bucket'].items()] == [
      50 * i for i in range(20)
    ] * 2
    with files.open('bucket/big', 'wb', block_size=2**18) as file:
      for i in range(6):
        file.write(bytes([i]) * 200_000)
    with files.open('bucket/big', 'rb', block_size=2**18) as file:
      assert file.read() == b''.join(bytes([i]) * 200_000 for i in range(6))
    for name in list(data)[:10]:
      files.rm_file(name)
    files.rm('bucket/c', recursive=True)
    left = ['big', *(n.removeprefix('bucket/') for n in list(data)[10:])]
    assert sorted(server.objects['bucket']) == sorted(left)
  assert len(server.faults_met) > 4
  assert server.faults_met.total() > 15


def test_gcsfs_writes_again_what_it_does_not_know_is_written(quick):
  server = serve(('drop-after',), 0.5)
  with server as url:
    files = gcs_clients.filesystem(url)
    for i in range(8):
      files.pipe_file(f'bucket/k{i}', b'%d' % i)
    with files.open('bucket/big', 'wb', block_size=2**18) as file:
      for i in range(6):
        file.write(bytes([i]) * 200_000)
    big = b''.join(bytes([i]) * 200_000 for i in range(6))
    assert server.objects['bucket']['big'].data == big
    assert server.faults_met['drop-after'] > 2
    # It takes its own first delete for another's.
    with pytest.raises(FileNotFoundError):
      for i in range(8):
        files.rm_file(f'bucket/k{i}')


@pytest.mark.parametrize('kind', ['503', 'drop'])
def test_clients_give_up(quick, monkeypatch, kind):
  server = serve((kind,))
  server.put('bucket', 'k', b'data', {})
  with server as url:
    files = kvstore(url, monkeypatch, max_retries=3)
    with pytest.raises(Exception, match=r'(?i)503|unavailable|empty reply'):
      files.read('k').result()
    with pytest.raises(Exception, match=r'(?i)503|unavailable|empty reply'):
      files.write('k', b'new').result()
    with pytest.raises(Exception, match=r'(?i)try again|disconnect'):
      gcs_clients.filesystem(url).cat_file('bucket/k')
  assert server.objects['bucket']['k'].data == b'data'
  assert os.environ['TENSORSTORE_GCS_HTTP_URL'] == url

"""A fake Google Cloud Storage server for tests: JSON API, in memory, loopback.

Serves the calls TensorStore's `gcs` driver, gcsfs and Orbax make: conditional
writes, generation headers, (suffix) byte ranges, paged listings with a
delimiter, media / multipart / resumable uploads, copies and compose.
"""

import base64
import dataclasses
import http.server
import itertools
import json
import re
import socketserver
import threading
import urllib.parse

import google_crc32c


@dataclasses.dataclass(frozen=True)
class _Object:
  data: bytes
  generation: int
  content_type: str = 'application/octet-stream'


class FakeGcs:
  """`with FakeGcs(['bucket']) as url:` serves until the block is left."""

  def __init__(self, buckets):
    self.objects = {bucket: {} for bucket in buckets}
    self.lock = threading.Lock()
    self.uploads = {}
    self.log = []
    self._generation = itertools.count(1_000_001)

  def __enter__(self):
    handler = type('Handler', (_Handler,), {'gcs': self})
    self._server = _Server(('127.0.0.1', 0), handler)
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    return self.url

  def __exit__(self, *exc):
    self._server.shutdown()
    self._server.server_close()

  def put(
    self, bucket, name, data, query, content_type='application/octet-stream'
  ):
    """Returns the new object, or None if a precondition failed."""
    with self.lock:
      if not self._precondition(bucket, name, query):
        return None
      obj = _Object(data, next(self._generation), content_type)
      self.objects[bucket][name] = obj
      return obj

  def delete(self, bucket, name, query):
    with self.lock:
      if name not in self.objects[bucket]:
        return 404
      if not self._precondition(bucket, name, query):
        return 412
      del self.objects[bucket][name]
      return 204

  def _precondition(self, bucket, name, query):
    have = self.objects[bucket].get(name)
    have = have.generation if have else 0
    want = query.get('ifGenerationMatch')
    unwanted = query.get('ifGenerationNotMatch')
    return (want is None or int(want) == have) and (
      unwanted is None or int(unwanted) != have
    )


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    pass  # A client that hung up.


def _resource(bucket, name, obj):
  crc = base64.b64encode(google_crc32c.value(obj.data).to_bytes(4, 'big'))
  return {
    'kind': 'storage#object',
    'bucket': bucket,
    'name': name,
    'id': f'{bucket}/{name}/{obj.generation}',
    'size': str(len(obj.data)),
    'generation': str(obj.generation),
    'metageneration': '1',
    'contentType': obj.content_type,
    'crc32c': crc.decode(),
    'etag': str(obj.generation),
    'timeCreated': '2026-01-01T00:00:00.000Z',
    'updated': '2026-01-01T00:00:00.000Z',
    'storageClass': 'STANDARD',
  }


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # Else every reply waits 40 ms for an ACK.
  wbufsize = -1
  gcs: FakeGcs

  def log_message(self, *args):
    pass

  def _reply(self, status, body=b'', headers=()):
    if isinstance(body, (dict, list)):
      body = json.dumps(body).encode()
      headers = [('Content-Type', 'application/json'), *headers]
    self.send_response(status)
    for key, value in headers:
      self.send_header(key, value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD' and status not in (204, 304):
      self.wfile.write(body)

  def _error(self, status, message=''):
    self._reply(status, {'error': {'code': status, 'message': message}})

  def _body(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      parts = []
      while size := int(self.rfile.readline().split(b';')[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _route(self):
    body = self._body()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    unquote = urllib.parse.unquote
    self.gcs.log.append((self.command, self.path, self.headers.get('Range')))
    buckets = re.findall('/b/([^/]+)', url.path)
    if not {unquote(bucket) for bucket in buckets} <= self.gcs.objects.keys():
      return self._error(404)
    if m := re.fullmatch(
      r'/(?:resumable/)?upload/storage/v1/b/([^/]+)/o', url.path
    ):
      return self._upload(unquote(m[1]), query, body)
    if m := re.fullmatch(
      r'/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)', url.path
    ):
      return self._object(unquote(m[1]), unquote(m[2]), query)
    if m := re.fullmatch(r'/storage/v1/b/([^/]+)/o', url.path):
      return self._list(unquote(m[1]), query)
    if m := re.fullmatch(
      r'/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)',
      url.path,
    ):
      return self._copy(
        *map(unquote, m.groups()), query, 'rewriteTo' in url.path
      )
    if m := re.fullmatch(r'/storage/v1/b/([^/]+)/o/([^/]+)/compose', url.path):
      return self._compose(unquote(m[1]), unquote(m[2]), query, body)
    if m := re.fullmatch(r'/storage/v1/b/([^/]+)', url.path):
      name = unquote(m[1])
      return self._reply(
        200,
        {
          'kind': 'storage#bucket',
          'name': name,
          'id': name,
          'location': 'US',
          'locationType': 'multi-region',
          'storageClass': 'STANDARD',
        },
      )
    if m := re.fullmatch(r'/storage/v1/b/([^/]+)/storageLayout', url.path):
      return self._reply(
        200,
        {
          'kind': 'storage#storageLayout',
          'bucket': unquote(m[1]),
          'hierarchicalNamespace': {'enabled': False},
        },
      )
    self._error(501, self.path)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _route

  def _object(self, bucket, name, query):
    if self.command == 'DELETE':
      status = self.gcs.delete(bucket, name, query)
      return self._reply(204) if status == 204 else self._error(status)
    obj = self.gcs.objects[bucket].get(name)
    if obj is None:
      if query.get('ifGenerationMatch', '0') != '0':
        return self._error(412)
      return self._error(404)
    if query.get('ifGenerationMatch', str(obj.generation)) != str(
      obj.generation
    ):
      return self._error(412)
    if query.get('ifGenerationNotMatch') == str(obj.generation):
      return self._reply(304)
    if query.get('alt') != 'media':
      return self._reply(200, _resource(bucket, name, obj))
    crc = _resource(bucket, name, obj)['crc32c']
    headers = [
      ('x-goog-generation', str(obj.generation)),
      ('x-goog-metageneration', '1'),
      ('x-goog-hash', f'crc32c={crc}'),
      ('x-goog-stored-content-length', str(len(obj.data))),
      ('Content-Type', obj.content_type),
    ]
    byte_range = self.headers.get('Range')
    if not byte_range:
      return self._reply(200, obj.data, headers)
    begin, end = re.fullmatch(r'bytes=(\d*)-(\d*)', byte_range).groups()
    size = len(obj.data)
    if begin:
      start, stop = int(begin), min(int(end) + 1 if end else size, size)
    else:
      start, stop = max(0, size - int(end)), size
    if start >= size:
      return self._reply(
        416, b'', [('Content-Range', f'bytes */{size}'), *headers]
      )
    headers.append(('Content-Range', f'bytes {start}-{stop - 1}/{size}'))
    self._reply(206, obj.data[start:stop], headers)

  def _list(self, bucket, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    first = max(query.get('startOffset', ''), query.get('pageToken', ''))
    last = query.get('endOffset')
    limit = int(query.get('maxResults', 1000))
    with self.gcs.lock:
      objects = sorted(self.gcs.objects[bucket].items())
    items, prefixes, token = [], [], None
    for name, obj in objects:
      if not name.startswith(prefix) or name < first or (last and name >= last):
        continue
      rest = name[len(prefix) :]
      folder = (
        prefix + rest.split(delimiter)[0] + delimiter
        if delimiter and delimiter in rest
        else None
      )
      if folder and folder in prefixes:
        continue
      if len(items) + len(prefixes) == limit:
        token = name
        break
      if folder:
        prefixes.append(folder)
      else:
        items.append(_resource(bucket, name, obj))
    reply = {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes}
    if token:
      reply['nextPageToken'] = token
    self._reply(200, reply)

  def _store(
    self, bucket, name, data, query, content_type='application/octet-stream'
  ):
    obj = self.gcs.put(bucket, name, data, query, content_type)
    if obj is None:
      return self._error(412, 'conditionNotMet')
    self._reply(200, _resource(bucket, name, obj))

  def _upload(self, bucket, query, body):
    kind = query.get('uploadType')
    if kind == 'media':
      return self._store(
        bucket,
        query['name'],
        body,
        query,
        self.headers.get('Content-Type') or 'application/octet-stream',
      )
    if kind == 'multipart':
      boundary = (
        re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1]
        .encode()
        .strip(b"'")
      )
      meta, media = [
        p.lstrip(b'\r\n').split(b'\r\n\r\n', 1)[-1]
        if b'\r\n\r\n' in p
        else p.lstrip(b'\n').split(b'\n\n', 1)[-1]
        for p in re.split(rb'\r?\n?--' + re.escape(boundary), body)[1:3]
      ]
      return self._store(
        bucket, query.get('name') or json.loads(meta)['name'], media, query
      )
    if kind == 'resumable' and 'upload_id' not in query:
      name = query.get('name') or json.loads(body)['name']
      upload = str(len(self.gcs.uploads))
      self.gcs.uploads[upload] = (name, query, bytearray())
      location = f'http://{self.headers["Host"]}{urllib.parse.urlsplit(self.path).path}?uploadType=resumable&upload_id={upload}'
      return self._reply(
        200, b'', [('Location', location), ('X-GUploader-UploadID', upload)]
      )
    if kind == 'resumable':
      name, start_query, data = self.gcs.uploads[query['upload_id']]
      data += body
      if (self.headers.get('Content-Range') or '').endswith('/*'):
        headers = [('Range', f'bytes=0-{len(data) - 1}')] if data else []
        return self._reply(308, b'', headers)
      return self._store(bucket, name, bytes(data), start_query)
    self._error(501, self.path)

  def _copy(self, bucket, name, to_bucket, to_name, query, rewrite):
    obj = self.gcs.objects[bucket].get(name)
    if obj is None:
      return self._error(404)
    new = self.gcs.put(to_bucket, to_name, obj.data, query, obj.content_type)
    if new is None:
      return self._error(412)
    resource = _resource(to_bucket, to_name, new)
    self._reply(
      200,
      {
        'kind': 'storage#rewriteResponse',
        'done': True,
        'resource': resource,
        'objectSize': str(len(obj.data)),
        'totalBytesRewritten': str(len(obj.data)),
      }
      if rewrite
      else resource,
    )

  def _compose(self, bucket, name, query, body):
    names = [s['name'] for s in json.loads(body)['sourceObjects']]
    objects = self.gcs.objects[bucket]
    self._store(bucket, name, b''.join(objects[n].data for n in names), query)

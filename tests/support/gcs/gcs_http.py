"""The JSON API of a fake bucket over HTTP: routes, replies, faults."""

import http.server
import json
import re
import socketserver
import time
from typing import Any
import urllib.parse

from tests.support.gcs import gcs_messages


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    pass  # A client that hung up.


_OBJECT = '/storage/v1/b/([^/]+)/o/([^/]+)'
# What the groups of a path are given to.
_ROUTES = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    ('/(?:resumable/)?upload/storage/v1/b/([^/]+)/o', '_upload'),
    (f'(?:/download)?{_OBJECT}', '_object'),
    ('/storage/v1/b/([^/]+)/o', '_list'),
    (f'{_OBJECT}/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)', '_copy'),
    (f'{_OBJECT}/moveTo/o/([^/]+)', '_move'),
    (f'{_OBJECT}/compose', '_compose'),
    ('/storage/v1/b/([^/]+)', '_bucket'),
    ('/storage/v1/b/([^/]+)/storageLayout', '_layout'),
  )
)


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # Else every reply waits 40 ms for an ACK.
  wbufsize = -1
  # What is served, a `fake_gcs.FakeGcs`; set in a class of each server's own.
  gcs: Any

  def log_message(self, *args):
    pass

  def _reply(self, status, body=b'', headers=()):
    if isinstance(body, (dict, list)):
      body = json.dumps(body).encode()
      headers = [('Content-Type', 'application/json'), *headers]
    if self.fault == 'drop-after':
      self.close_connection = True
      return
    self.send_response(status)
    for key, value in headers:
      self.send_header(key, value)
    if status in (204, 304):
      self.end_headers()
      return
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command == 'HEAD':
      return
    half = len(body) // 2
    if self.fault == 'cut' and body and status in (200, 206):
      self._met()
      body = body[:half]
      self.close_connection = True
    elif self.fault == 'slow':
      self.wfile.write(body[:half])
      self.wfile.flush()
      time.sleep(self.gcs.faults.delay)
    self.wfile.write(body[half:] if self.fault == 'slow' else body)
    self.gcs.count(self.command, self.what, sent=len(body))

  def _error(self, status, message='', headers=()):
    self._reply(
      status, {'error': {'code': status, 'message': message}}, headers
    )

  def _body(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      parts = []
      while size := int(self.rfile.readline().split(b';')[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _met(self):
    self.gcs.fault_met(self.command, self.what, self.target, self.fault)

  def _find(self, path):
    for pattern, handler in _ROUTES:
      if match := pattern.fullmatch(path):
        return handler, [urllib.parse.unquote(g) for g in match.groups()]
    return '_unknown', []

  def _classify(self, handler, query):
    if handler == '_object':
      if self.command == 'DELETE':
        return 'delete'
      if query.get('alt') == 'media':
        return 'range read' if self.headers.get('Range') else 'object read'
    if handler in ('_upload', '_copy', '_move', '_compose'):
      return 'write'
    return 'list' if handler == '_list' else 'metadata'

  def _route(self):
    body = self._body()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    byte_range = self.headers.get('Range')
    handler, groups = self._find(url.path)
    self.fault = None
    self.what = self._classify(handler, query)
    with self.gcs.lock:
      self.gcs.log.append((self.command, self.path, byte_range))
    self.gcs.count(self.command, self.what, 1, len(body))
    self.target = '/'.join(groups)
    if handler == '_list':
      self.target += '/' + query.get('prefix', '')
    elif handler == '_upload':
      self.target += '/' + self._upload_name(query, body)
    # An upload's chunks are told apart by where they begin.
    part = byte_range or self.headers.get('Content-Range')
    self.fault = self.gcs.draw_fault(
      (self.command, self.what, self.target, part),
      self._possible(handler, groups, query),
    )
    if self.fault not in (None, 'cut'):
      self._met()
    if self.fault == 'slow':
      time.sleep(self.gcs.faults.delay)
    if self.fault == 'drop':
      self.close_connection = True
    elif self.fault == 'stale':
      self.gcs.touch(groups[0], query.get('name') or groups[1])
      self._error(412, 'conditionNotMet')
    elif self.fault == '429-after':
      after = str(self.gcs.faults.retry_after)
      self._error(429, 'rateLimitExceeded', [('Retry-After', after)])
    elif self.fault in ('503', '429'):
      self._error(int(self.fault), 'try again')
    elif self.gcs.forbids(self.command, self.what, self.target):
      self._error(403, 'no permission for this')
    elif groups and groups[0] not in self.gcs.objects:
      self._error(404)
    else:
      getattr(self, handler)(query, body, *groups)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _route

  def _upload_name(self, query, body):
    if 'upload_id' in query:
      return self.gcs.uploads[query['upload_id']].name
    if 'name' in query:
      return query['name']
    # The first part of a multipart body is short.
    found = re.search(rb'"name": *("(?:[^"\\]|\\.)*")', body[:10_000])
    return json.loads(found[1]) if found else ''

  def _possible(self, handler, groups, query):
    possible = {'503', '429', '429-after', 'drop', 'slow'}
    if self.what in ('write', 'delete'):
      possible.add('drop-after')
    bucket = groups[0] if groups else None
    if bucket not in self.gcs.objects:
      return possible
    if self.what.endswith('read'):
      obj = self.gcs.objects[bucket].get(groups[1])
      # What the client has already is answered without a body.
      fresh = self.gcs.precondition(bucket, groups[1], query)
      if obj is not None and obj.data and fresh:
        possible.add('cut')
    conditional = 'ifGenerationMatch' in query
    media = query.get('uploadType') == 'media'
    if conditional and (media or self.what == 'delete'):
      name = query['name'] if media else groups[1]
      exists = name in self.gcs.objects[bucket]
      if exists and self.gcs.precondition(bucket, name, query):
        possible.add('stale')
    return possible

  def _unknown(self, query, body):
    self._error(501, self.path)

  def _bucket(self, query, body, name):
    self._reply(
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

  def _layout(self, query, body, bucket):
    self._reply(
      200,
      {
        'kind': 'storage#storageLayout',
        'bucket': bucket,
        'hierarchicalNamespace': {'enabled': False},
      },
    )

  def _object(self, query, body, bucket, name):
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
      return self._reply(200, gcs_messages.resource(bucket, name, obj))
    crc = gcs_messages.resource(bucket, name, obj)['crc32c']
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

  def _list(self, query, body, bucket):
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
        items.append(gcs_messages.resource(bucket, name, obj))
    reply = {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes}
    if token:
      reply['nextPageToken'] = token
    self._reply(200, reply)

  def _store(
    self, bucket, name, data, query, content_type='application/octet-stream'
  ):
    """Status and body that answer a write."""
    obj = self.gcs.put(bucket, name, data, query, content_type)
    if obj is None:
      return 412, {'error': {'code': 412, 'message': 'conditionNotMet'}}
    return 200, gcs_messages.resource(bucket, name, obj)

  def _upload(self, query, body, bucket):
    kind = query.get('uploadType')
    if kind == 'media':
      content_type = self.headers.get('Content-Type')
      self._reply(
        *self._store(
          bucket,
          query['name'],
          body,
          query,
          content_type or 'application/octet-stream',
        )
      )
    elif kind == 'multipart':
      meta, media = gcs_messages.parts(self.headers['Content-Type'], body)
      name = query.get('name') or json.loads(meta)['name']
      self._reply(*self._store(bucket, name, media, query))
    elif kind == 'resumable' and 'upload_id' not in query:
      name = query.get('name') or json.loads(body)['name']
      with self.gcs.lock:
        upload = str(len(self.gcs.uploads))
        self.gcs.begin_upload(upload, name, query)
      path = urllib.parse.urlsplit(self.path).path
      location = (
        f'http://{self.headers["Host"]}{path}'
        f'?uploadType=resumable&upload_id={upload}'
      )
      self._reply(
        200, b'', [('Location', location), ('X-GUploader-UploadID', upload)]
      )
    elif kind == 'resumable':
      self._resume(bucket, self.gcs.uploads[query['upload_id']], body)
    else:
      self._error(501, self.path)

  def _resume(self, bucket, upload, body):
    """Takes a chunk; one that is sent again does no harm."""
    if self.command == 'DELETE':
      return self._error(499)
    if upload.answer is not None:
      return self._reply(*upload.answer)
    # bytes 0-9/*, bytes 10-14/15 or bytes */15; none with a whole upload.
    given = self.headers.get('Content-Range') or f'bytes 0-/{len(body)}'
    start, total = re.fullmatch(
      r'bytes (?:\*|(\d+)-\d*)/(\*|\d+)', given
    ).groups()
    data = upload.data
    if start is not None:
      if int(start) > len(data):
        return self._error(400, f'{len(data)} bytes are here, not {start}')
      data[int(start) : int(start) + len(body)] = body
    if total != str(len(data)):
      headers = [('Range', f'bytes=0-{len(data) - 1}')] if data else []
      return self._reply(308, b'', headers)
    upload.answer = self._store(bucket, upload.name, bytes(data), upload.query)
    self._reply(*upload.answer)

  def _copy(self, query, body, bucket, name, to_bucket, to_name):
    obj = self.gcs.objects[bucket].get(name)
    if obj is None or to_bucket not in self.gcs.objects:
      return self._error(404)
    status, resource = self._store(
      to_bucket, to_name, obj.data, query, obj.content_type
    )
    if status == 200 and '/rewriteTo/' in self.path:
      resource = {
        'kind': 'storage#rewriteResponse',
        'done': True,
        'resource': resource,
        'objectSize': str(len(obj.data)),
        'totalBytesRewritten': str(len(obj.data)),
      }
    self._reply(status, resource)

  def _move(self, query, body, bucket, name, to_name):
    with self.gcs.lock:
      obj = self.gcs.objects[bucket].pop(name, None)
    if obj is None:
      return self._error(404)
    self._reply(*self._store(bucket, to_name, obj.data, {}, obj.content_type))

  def _compose(self, query, body, bucket, name):
    names = [s['name'] for s in json.loads(body)['sourceObjects']]
    objects = self.gcs.objects[bucket]
    data = b''.join(objects[n].data for n in names)
    self._reply(*self._store(bucket, name, data, query))

"""What goes over the wire beside the bytes of objects."""

import base64
import re

import google_crc32c


def resource(bucket, name, obj):
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


def parts(content_type, body):
  """The description and the bytes of an upload in two parts."""
  boundary = (
    re.search('boundary="?([^";]+)', content_type)[1].encode().strip(b"'")
  )
  # gcsfs ends lines with \n, Google's own client with \r\n.
  end = b'\r\n' if body.startswith(b'--%b\r\n' % boundary) else b'\n'
  between = end + b'--' + boundary
  _, meta, rest = (end + body).split(between, 2)
  return [
    part.split(end + end, 1)[1] for part in (meta, rest.rsplit(between, 1)[0])
  ]

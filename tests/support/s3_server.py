"""An S3 in this process: moto's server, and what clients need to find it."""

from collections.abc import Iterator
import contextlib
import logging

import boto3
from etils.epath import backend
from moto.server import ThreadedMotoServer
import pytest
import s3fs


class Bucket:
  """The bucket `s3://bucket` of a server."""

  def __init__(self, url: str):
    self.url = url
    self._client = boto3.client('s3', endpoint_url=url)
    self._client.create_bucket(Bucket='bucket')

  def names(self, folder: str) -> list[str]:
    """Names of the objects in a folder, without the folder's."""
    pages = self._client.get_paginator('list_objects_v2').paginate(
      Bucket='bucket', Prefix=f'{folder}/'
    )
    return [
      found['Key'].removeprefix(f'{folder}/')
      for page in pages
      for found in page.get('Contents', ())
    ]

  def objects(self, folder: str) -> dict[str, bytes]:
    """Objects in a folder: name -> bytes."""
    return {
      name: self._client.get_object(Bucket='bucket', Key=f'{folder}/{name}')[
        'Body'
      ].read()
      for name in self.names(folder)
    }

  def put(self, name: str, data: bytes) -> None:
    self._client.put_object(Bucket='bucket', Key=name, Body=data)

  def delete(self, name: str) -> None:
    self._client.delete_object(Bucket='bucket', Key=name)


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
  """A server while the context is open; there is one at a time."""
  server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
  # A line for every request, in red where one is refused.
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server.start()
  host, port = server.get_host_and_port()
  environment = {
    'AWS_ENDPOINT_URL': f'http://{host}:{port}',
    'AWS_REGION': 'us-east-1',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
  }
  with pytest.MonkeyPatch.context() as patch:
    for name in ('AWS_PROFILE', 'AWS_SESSION_TOKEN', 'AWS_ENDPOINT_URL_S3'):
      patch.delenv(name, raising=False)
    for name, value in environment.items():
      patch.setenv(name, value)
    # Those know another server.
    s3fs.S3FileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Bucket(environment['AWS_ENDPOINT_URL'])
  server.stop()

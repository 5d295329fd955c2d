"""A server that takes a request and never answers."""

from concurrent import futures
import os
import socket
import subprocess
import sys
import threading

# So long that a second request would have come.
_SECONDS = 4
_CODE = """
import threading, time
import sae_jax
from sae_jax.store import layout
read = lambda: layout.read_manifest('gs://bucket/store')
threading.Thread(target=read, daemon=True).start()
time.sleep(float({seconds}))
"""


def _requests(after: str) -> int:
  """How often a manifest is asked for; a client waits for so many seconds."""
  taken = []
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    server.listen()

    def serve():
      while True:
        try:
          taken.append(server.accept()[0])
        except OSError:
          return

    threading.Thread(target=serve, daemon=True).start()
    url = f'http://127.0.0.1:{server.getsockname()[1]}'
    environment = os.environ | {
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'fake',
      'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS': after,
    }
    code = _CODE.format(seconds=_SECONDS)
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)
    server.shutdown(socket.SHUT_RDWR)
  for connection in taken:
    connection.close()
  return len(taken)


def test_a_request_that_is_not_answered_is_sent_again():
  with futures.ThreadPoolExecutor() as pool:
    limited, unlimited = pool.map(_requests, ('1', '0'))
  assert limited >= 2
  # Control: without a limit it waits.
  assert unlimited == 1


def test_the_limit_is_a_minute_unless_it_is_set():
  code = (
    'import os, sae_jax; '
    "print(os.environ['TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS'])"
  )
  name = 'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS'
  plain = {k: v for k, v in os.environ.items() if k != name}
  for environment, want in ((plain, '60'), (plain | {name: '7'}, '7')):
    out = subprocess.run(
      [sys.executable, '-c', code],
      env=environment,
      check=True,
      capture_output=True,
      text=True,
    )
    assert out.stdout.strip() == want

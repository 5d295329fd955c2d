"""Latents of known words, finished results of probing them, a judge of words.

Of the words w0 to w49 the first eight have a latent each, which is active where
they stand; the next eight come close. Latent 8 is active everywhere, the others
nowhere.
"""

import collections
import contextlib
from http import server
import json
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from sae_jax import checkpoint, store
from sae_jax import subject as subject_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.explaining.config import ExplainConfig, Protocol
from sae_jax.probing import reconstruction
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan
from tests.support import probed, synthetic_features

PLANTED, LATENTS, EVERYWHERE = 8, 12, 8
DOCUMENTS, CONTEXTS, HELDOUT = 90, 4, 80
WINDOW = 4
PROTOCOL = Protocol(4, 1, 2, 5, 2, 10, 5, 5, 3)
CONFIG = ExplainConfig(
  window=WINDOW, least_examples=10, batch_rows=256, n_latents=LATENTS
)


def rows_of(tokens, rng):
  """Activations of tokens: each of the first words along its own axis."""
  rows_TD = 0.01 * rng.standard_normal((len(tokens), probed.D_MODEL))
  for row_D, token in zip(rows_TD, tokens):
    if token < 2 * PLANTED:
      near = token >= PLANTED
      # Of the words themselves one in six comes no nearer.
      near |= rng.random() < 1 / 6
      row_D[token % PLANTED] += 0.3 if near else rng.uniform(1, 3)
  return rows_TD.astype(np.float32)


def write_store(url):
  """A finished store; position 0 of each context is masked."""
  rng = np.random.default_rng(0)
  stretches, held = [], 0
  for document in range(DOCUMENTS):
    for _ in range(CONTEXTS):
      planted = rng.integers(0, PLANTED, probed.CONTEXT)
      others = rng.integers(PLANTED, probed.VOCABULARY, probed.CONTEXT)
      tokens = np.where(rng.random(probed.CONTEXT) < 0.35, planted, others)
      keep = np.arange(probed.CONTEXT) > 0
      held += keep.sum() * (document >= DOCUMENTS - HELDOUT)
      stretches.append(
        (
          tokens,
          np.full(probed.CONTEXT, document),
          np.arange(probed.CONTEXT),
          keep,
          {str(probed.SITE): rows_of(tokens[keep], rng)},
        )
      )
  plan = StorePlan(
    subject='made',
    sites=(str(probed.SITE),),
    d_model=probed.D_MODEL,
    weights_sha256='a' * 64,
    chunk_rows=64,
    shard_rows=512,
    context_length=probed.CONTEXT,
    sources=('made',),
  )
  writer_lib.write(
    url, plan, stretches, holdout_rows=int(held), mask={'rule': 'position 0'}
  )
  return store.open_store(url)


def make_trained(data, activation='topk'):
  """The autoencoder of the planted words."""
  config = SaeConfig(
    d_model=probed.D_MODEL,
    n_latents=LATENTS,
    k=2,
    preprocessing='none',
    activation=activation,
  )
  fresh = reconstruction.untrained(config, data.read_rows(0, 200), 3)
  w_enc_ND = np.eye(LATENTS, probed.D_MODEL, dtype=np.float32)
  w_enc_ND[PLANTED:] = 0
  b_lat_N = np.full(LATENTS, -100, np.float32)
  b_lat_N[:PLANTED], b_lat_N[EVERYWHERE] = -0.5, 1
  thresholds = {
    'threshold': np.float32(0.1),
    'log_threshold_N': np.full(LATENTS, np.log(0.1), np.float32),
  }
  sae = fresh.sae.replace(
    w_enc_ND=jnp.asarray(w_enc_ND),
    b_lat_N=jnp.asarray(b_lat_N),
    b_pre_D=jnp.zeros(probed.D_MODEL),
    extra={n: jnp.asarray(thresholds[n]) for n in fresh.sae.extra},
  )
  metadata = checkpoint.Metadata(
    train_config={'sample_rows': 200, 'optimizer': {}},
    mse_of_mean=1.0,
    dataset=data.about,
    metric_definitions={},
  )
  return checkpoint.Trained(config, sae, 1.0, 7, metadata)


def write_results(workdir, data, trained):
  """Finished results of sae-probe, as far as explanations read them."""
  table, report, _ = synthetic_features.make(LATENTS, 2, 8, 2000)
  tokens = data.tokens()[data.stream_index()]
  counts = np.bincount(tokens, minlength=LATENTS)[:LATENTS]
  counts[EVERYWHERE:] = 0
  counts[EVERYWHERE] = len(tokens)
  table['count'] = counts.astype(np.int64)
  table['density'] = (counts / len(tokens)).astype(np.float32)
  table['mean'] = np.where(counts, 1.5, 0).astype(np.float32)
  for name, ids in table.items():
    if name.endswith(('_tokens', 'up_ids', 'down_ids')):
      table[name] = np.where(ids < 0, ids, ids % probed.VOCABULARY)
  made_from = {
    'sae_fingerprint': checkpoint.fingerprint(trained.sae),
    'store': data.manifest.identity,
    'step': trained.step,
    'probe_config': {'average': True},
  }
  report |= {
    'made_from': made_from,
    'subject': 'made',
    'site': str(probed.SITE),
    'weights_sha256': 'a' * 64,
  }
  synthetic_features.write_results(workdir, made_from, report, table)


@contextlib.contextmanager
def without_files(trained):
  """The checkpoint and the tokenizer are made, not read."""
  words = {f'w{i}': i for i in range(probed.VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token='w0'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, 'load', lambda *a, **k: trained)
    patch.setattr(subject_lib, 'load_recorded_tokenizer', lambda *a: tokenizer)
    patch.setenv('NO_PROXY', '*')
    patch.delenv('OPENAI_API_KEY', raising=False)
    yield


def asked(body):
  """'explain' or 'detect', and the texts of a request."""
  user = body['messages'][1]['content']
  kind = 'explain' if user.startswith('Active on:') else 'detect'
  return kind, re.findall(r'^\d+\. (.*)$', user, re.MULTILINE)


def words_judge(body):
  """What a judge says that knows words and nothing else."""
  kind, texts = asked(body)
  if kind == 'explain':
    marked = collections.Counter()
    for text in texts:
      marked.update(re.findall(r'<<(w\d+)\|\d+>>', text))
    return f'Thinking.\nEXPLANATION: the word {marked.most_common(1)[0][0]}'
  words, *texts = (
    set(re.findall(r'w\d+', text))
    for text in [body['messages'][1]['content'].split('\n')[0], *texts]
  )
  return json.dumps([int(bool(words & text)) for text in texts])


def reply(content, **more):
  """A server's reply with a message."""
  message = {'role': 'assistant', 'content': content, **more}
  return {'choices': [{'message': message, 'finish_reason': 'stop'}]}


@contextlib.contextmanager
def served(answer):
  """A server with the chat API; its URL, and the requests that it has read.

  Args:
    answer: a handler of http.server and a request's body -> the content of a
      reply, a whole reply, or None if it has replied itself.
  """
  bodies = []

  class Handler(server.BaseHTTPRequestHandler):
    # Else a reply is sent in pieces, the second of which waits for the first's
    # acknowledgement.
    wbufsize = -1

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      bodies.append({'path': self.path, 'headers': dict(self.headers), **body})
      out = answer(self, body)
      if isinstance(out, str):
        out = reply(out)
      if out is not None:
        send(self, 200, json.dumps(out).encode())

    def log_message(self, *_):
      pass

  running = server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  running.daemon_threads = True
  thread = threading.Thread(target=running.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield f'http://127.0.0.1:{running.server_port}/v1', bodies
  finally:
    running.shutdown()
    thread.join()
    running.server_close()


def send(handler, status, data, **headers):
  """Sends a reply; a Content-Length among the headers replaces the true one."""
  handler.send_response(status)
  for name, value in {'Content-Length': len(data), **headers}.items():
    handler.send_header(name.replace('_', '-'), str(value))
  handler.end_headers()
  handler.wfile.write(data)

"""A small random subject, a store of its residuals, and autoencoders for them.

The store has what a harvest of real text has: contexts of every length, some
of one token, masked tokens anywhere, documents of several contexts.
"""

import functools

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax import checkpoint, store, subject
from sae_jax.autoencoder import SaeConfig
from sae_jax.probing import reconstruction
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan
from sae_jax.subject import capture, transformer

D_MODEL, VOCABULARY, CONTEXT = 16, 50, 12
SITE = capture.Site(0, 'resid_post')
CONFIG = transformer.TransformerConfig(
  n_layers=2,
  d_model=D_MODEL,
  n_heads=2,
  n_kv_heads=1,
  d_head=8,
  d_ff=24,
  vocab_size=VOCABULARY,
  rope_base=1e4,
  norm_eps=1e-5,
  rope_pairs='half',
)
# Of each document; the last eight are held out, and four of them test.
LENGTHS = (
  (12, 1, 5), (9,), (12, 12, 12, 3), (1,), (2, 7), (12, 8), (11, 4), (6,),
  (12, 9), (7,), (3, 11), (12,), (12, 12, 4), (3, 1, 10), (1, 12, 12), (8, 2),
)  # fmt: skip
HELDOUT = 8
DEAD = (0, 5)

run_capture = jax.jit(capture.capture, static_argnums=(0, 3))


@functools.cache
def make_subject():
  """Words w0 to w49, one token each; 'made' is its name."""
  words = {f'w{i}': i for i in range(VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  params = transformer.init(CONFIG, jax.random.key(0))
  return subject.Subject('made', CONFIG, params, tokenizer, 'a' * 64)


def residuals(tokens, site=SITE):
  """Activations of one context, by itself."""
  padded_BT = np.zeros((1, CONTEXT), np.int32)
  padded_BT[0, : len(tokens)] = tokens
  params = make_subject().params
  return np.asarray(run_capture(CONFIG, params, padded_BT, site))[
    0, : len(tokens)
  ]


def write_store(
  url,
  lengths=LENGTHS,
  heldout=HELDOUT,
  share_kept=0.8,
  site=SITE,
  target_site='',
  **kwargs,
):
  """A finished store with the subject's activations; opened."""
  sites = [capture.parse_site(str(of)) for of in (site, target_site) if of]
  rng = np.random.default_rng(0)
  stretches = []
  for document, contexts in enumerate(lengths):
    for length in contexts:
      tokens = rng.integers(0, VOCABULARY, length)
      keep = rng.random(length) < share_kept
      keep[0] &= rng.random() < 0.2
      stretches.append(
        (
          tokens,
          np.full(length, document),
          np.arange(length),
          keep,
          {str(of): residuals(tokens, of)[keep] for of in sites},
        )
      )
  plan = StorePlan(
    **{
      'subject': 'made',
      'sites': tuple(map(str, sites)),
      'd_model': capture.width(CONFIG, sites[0]),
      'weights_sha256': make_subject().weights_sha256,
      'chunk_rows': 16,
      'shard_rows': 64,
      'context_length': CONTEXT,
      'sources': ('made',),
    }
    | kwargs
  )
  first = len(lengths) - heldout
  held = sum(keep.sum() for _, d, _, keep, _ in stretches if d[0] >= first)
  writer_lib.write(
    url,
    plan,
    stretches,
    holdout_rows=int(held),
    mask={'rule': 'at random'},
  )
  return store.open_store(url, str(sites[0]), target_site=target_site)


def make_trained(
  data,
  n_latents=24,
  k=4,
  preprocessing='center_unit_norm',
  activation='topk',
):
  """An autoencoder with biases of many sizes; the latents DEAD never fire."""
  config = SaeConfig(
    d_model=data.manifest.d_model,
    n_latents=n_latents,
    k=k,
    preprocessing=preprocessing,
    activation=activation,
  )
  sample_BD = data.read_rows(0, data.n_train)
  fresh = reconstruction.untrained(config, sample_BD, 3)
  rng = np.random.default_rng(1)
  bias_N = rng.normal(-0.3, 0.2, n_latents).astype(np.float32)
  bias_N[list(DEAD)] = -100
  w_dec_ND = rng.standard_normal((n_latents, config.d_model)).astype(np.float32)
  w_dec_ND /= np.linalg.norm(w_dec_ND, axis=1, keepdims=True)
  # Of all latents, or for each of them another.
  thresholds = {
    'threshold': np.float32(0.1),
    'log_threshold_N': np.log(rng.uniform(0.02, 0.2, n_latents), dtype='f4'),
    'r_mag_N': rng.normal(0, 0.2, n_latents).astype('f4'),
    'b_mag_N': rng.normal(0, 0.2, n_latents).astype('f4'),
  }
  sae = fresh.sae.replace(
    b_lat_N=jax.numpy.asarray(bias_N),
    w_dec_ND=jax.numpy.asarray(w_dec_ND),
    extra={n: jax.numpy.asarray(thresholds[n]) for n in fresh.sae.extra},
  )
  return checkpoint.Trained(
    config,
    sae,
    fresh.mse_of_mean,
    7,
    checkpoint.Metadata(
      train_config={'sample_rows': data.n_train, 'optimizer': {}},
      mse_of_mean=fresh.mse_of_mean,
      dataset=data.about,
      metric_definitions={},
    ),
  )


def wide(trained):
  """The parameters in float64."""
  return jax.tree.map(lambda a: np.asarray(a, np.float64), trained.sae)


def inputs(trained, raw_BD):
  """What the autoencoder reads, and what brings it back, in float64."""
  raw_BD = np.asarray(raw_BD, np.float64)
  if trained.config.preprocessing == 'none':
    return raw_BD, (0.0, 1.0)
  shift_B1 = raw_BD.mean(1, keepdims=True)
  scale_B1 = np.linalg.norm(raw_BD - shift_B1, axis=1, keepdims=True)
  return (raw_BD - shift_B1) / scale_B1, (shift_B1, scale_B1)


def latents(trained, x_BD):
  """All N latents of each token, in float64; those not active are 0."""
  sae = wide(trained)
  pre_BN = (x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  if trained.config.activation == 'gated':
    magnitude_BN = (pre_BN - sae.b_lat_N) * np.exp(sae.extra['r_mag_N'])
    magnitude_BN += sae.extra['b_mag_N']
    return np.where(pre_BN > 0, np.maximum(magnitude_BN, 0), 0)
  if trained.config.activation == 'groupmax':
    groups_BGM = pre_BN.reshape(len(pre_BN), trained.config.k, -1)
    is_most_BGM = groups_BGM == groups_BGM.max(-1, keepdims=True)
    return np.maximum(
      np.where(is_most_BGM, groups_BGM, 0).reshape(pre_BN.shape), 0
    )
  if trained.config.activation != 'topk':
    threshold = {
      'relu': lambda: 0.0,
      'jumprelu': lambda: np.exp(sae.extra['log_threshold_N']),
      'batchtopk': lambda: sae.extra['threshold'],
    }[trained.config.activation]()
    return np.where(pre_BN > threshold, pre_BN, 0)
  out_BN = np.zeros_like(pre_BN)
  for row, pre_N in enumerate(pre_BN):
    best = np.argsort(-pre_N, kind='stable')[: trained.config.k]
    out_BN[row, best] = np.maximum(pre_N[best], 0)
  return out_BN


def decoded(trained, latents_BN):
  """Reconstructions in the autoencoder's space, in float64."""
  sae = wide(trained)
  return latents_BN @ sae.w_dec_ND + sae.b_pre_D

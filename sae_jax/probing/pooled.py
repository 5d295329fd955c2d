"""One vector per prompt: the subject's activations, pooled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax.checkpoint import Trained
from sae_jax.subject import capture, Subject
from sae_jax.subject.formats import tokenizer as tokenizer_lib

POOLING = ('mean', 'last')
_BATCH = 16
_WIDTH_STEP = 16


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pool(
  subject_config, site, sae_config, pooling, params, sae, tokens_BT, length_B
):
  raw_BTD = capture.capture(subject_config, params, tokens_BT, site)
  shape = raw_BTD.shape
  x_BTD, _ = autoencoder.preprocess(
    sae_config, sae, raw_BTD.reshape(-1, shape[-1])
  )
  x_BTD = x_BTD.reshape(shape)
  place_T = jnp.arange(shape[1])
  if pooling == 'last':
    weight_BT = place_T == length_B[:, None] - 1
  else:
    # Position 0 is the attention sink; a prompt of one token has no other.
    inside_BT = (place_T > 0) & (place_T < length_B[:, None])
    weight_BT = jnp.where(length_B[:, None] > 1, inside_BT, place_T == 0)
  weight_BT = weight_BT.astype(x_BTD.dtype)
  # A sum, not a product: a TPU would round the activations for that.
  total_BD = (weight_BT[:, :, None] * x_BTD).sum(1)
  return total_BD / weight_BT.sum(-1, keepdims=True)


def pooled_inputs(
  trained: Trained,
  subject: Subject,
  site_name: str,
  prompts: list[str],
  max_tokens: int,
  pooling: str,
  desc: str,
  bos: str = '',
) -> np.ndarray:
  """Preprocessed activations of each prompt, pooled over its tokens.

  Pre-activations are linear in them, so encoding the mean gives the mean of
  the pre-activations.

  Args:
    trained: the autoencoder, whose preprocessing is applied.
    subject: the model that reads the prompts.
    site_name: the site of the subject.
    prompts: P texts.
    max_tokens: longer prompts are cut to this many tokens, a BOS among them.
    pooling: 'mean' over positions from 1 on, or 'last'.
    desc: label of the progress bar.
    bos: the token that prompts begin with, as contexts of the store do; '' for
      none.

  Returns:
    x_PD float32.
  """
  site = capture.parse_site(site_name)
  start = tokenizer_lib.context_start(subject.tokenizer, bos)
  first = [] if start is None else [start]
  ids = [
    (first + tokenizer_lib.encode(subject.tokenizer, prompt))[:max_tokens]
    or [0]
    for prompt in prompts
  ]
  out_PD = np.zeros((len(ids), trained.config.d_model), np.float32)
  # Prompts of like length share a batch, so that little of it is padding.
  order = np.argsort([len(i) for i in ids], kind='stable')
  with progress.bar(total=len(ids), unit='prompt', desc=desc) as bar:
    for start in range(0, len(order), _BATCH):
      members = order[start : start + _BATCH]
      longest = max(len(ids[m]) for m in members)
      width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
      tokens_BT = np.zeros((_BATCH, width), np.int32)
      length_B = np.ones((_BATCH,), np.int32)
      for row, member in enumerate(members):
        length_B[row] = len(ids[member])
        tokens_BT[row, : length_B[row]] = ids[member]
        # One of another prompt may have an embedding that is not finite.
        tokens_BT[row, length_B[row] :] = ids[member][-1]
      pooled_BD = _pool(
        subject.config,
        site,
        trained.config,
        pooling,
        subject.params,
        trained.sae,
        tokens_BT,
        length_B,
      )
      out_PD[members] = np.asarray(pooled_BD)[: len(members)]
      bar.update(len(members))
  return out_PD


def pre_activations(trained: Trained, x_PD: np.ndarray) -> np.ndarray:
  """W_enc (x - b_pre) + b_lat of pooled inputs: pre_PN, before TopK."""
  sae = trained.sae
  return np.asarray(
    (jnp.asarray(x_PD) - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  )

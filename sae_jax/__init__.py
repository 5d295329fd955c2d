"""TopK sparse autoencoders for language-model activations, in JAX.

Array names end in the letters of their axes, as in an einsum:

  B  tokens in a batch            D  activation width (d_model)
  N  latents                      K  active latents of a token
  S  latents of one shard         T  sequence positions
  V  vocabulary                   R  rows of an activation store
  M  examples kept for a latent   W  tokens of an example's context
  P  prompts of a probe task      C  classes or tasks
  H  histogram bins

so `w_dec_ND` is a decoder with one row per latent and `vals_BK` holds the K
activations of each token of a batch.
"""

import os

# TensorStore waits for ever for a server that is silent. With these a transfer
# that stays below a kilobyte a second for a minute is begun again.
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '60')
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1024')

__version__ = '0.1.0'

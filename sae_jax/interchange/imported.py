"""What an autoencoder of another library is, in one set of terms.

An autoencoder is the function y(x) below. Each field of `Semantics` chooses
one of its lines; a format that has no such line has the field's default.

  x^ = (x - mean(x)) / (std(x) + 1e-5)       normalisation 'layer_norm', where
                                             std divides by D - 1
     = x sqrt(D) / |x|                       'constant_norm_rescale'
     = x scale_in                            'dataset'
     = x                                     'none'
  u  = x^ - b_dec_D                          subtract_b_dec, else x^
  h  = w_enc_ND u + b_enc_N                  without b_enc_N where there is none
  h  = h |w_dec_ND|, the norm of each row    rescale_by_decoder_norm
  h  = ReLU(h)                               relu_before_topk
  z  = ReLU(h)                               'relu'
     = h, but for the k largest of them 0    'topk'
     = h, but for the largest of each of k
       groups of consecutive latents 0       'groupmax'
     = h where h > threshold, else 0         'jumprelu', 'batchtopk'
     = ReLU(exp(r_mag_N) h + b_mag_N) where
       h + b_gate_N > 0, else 0              'gated', which has no b_enc_N
  z  = ReLU(z)                               is_rectified
  v  = w_dec_ND^T z + b_dec_D                rows of unit norm if
                                             rescale_by_decoder_norm
  y  = v std(x) + mean(x)                    normalisation 'layer_norm'
     = v |x| / sqrt(D)                       'constant_norm_rescale'
     = v / scale_out                         'dataset'
     = v                                     'none'
  y  = y + w_skip_DD x                       if there is one; x is not changed

The rows of w_dec_ND have the width of what is written, which for a transcoder
may be another one than that of what is read.
"""

import dataclasses
from typing import Any

from sae_jax.storage import tensors

NONLINEARITIES = (
  'relu',
  'topk',
  'groupmax',
  'jumprelu',
  'batchtopk',
  'gated',
)
# A name for the site that a transcoder writes whose file says none.
TARGET = 'target'
NORMALISATIONS = ('none', 'layer_norm', 'constant_norm_rescale', 'dataset')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Semantics:
  """Which function an autoencoder is, see above.

  Attributes:
    nonlinearity: one of `NONLINEARITIES`; 'batchtopk' is told from 'jumprelu'
      by how it was trained alone.
    k: active latents of a token: of 'topk' and 'groupmax' exactly, of
      'batchtopk' on average in training, where it is known.
    threshold: the threshold of all latents; None if there is a `threshold_N`,
      or none.
    is_rectified: whether negative values become zero.
    relu_before_topk: whether they do before the largest are chosen. The
      values are the same ones, and so is the choice but for ties at zero.
    normalisation: one of `NORMALISATIONS`.
    scale_in: of 'dataset', what an activation is multiplied by.
    scale_out: of 'dataset', what a reconstruction is divided by.
    subtract_b_dec: whether the decoder's bias is subtracted first.
    rescale_by_decoder_norm: whether a latent's value is measured by the norm
      of its row of the decoder.
  """

  nonlinearity: str
  k: int | None = None
  threshold: float | None = None
  is_rectified: bool = True
  relu_before_topk: bool = False
  normalisation: str = 'none'
  scale_in: float | None = None
  scale_out: float | None = None
  subtract_b_dec: bool = False
  rescale_by_decoder_norm: bool = False

  def __post_init__(self):
    if self.nonlinearity not in NONLINEARITIES:
      raise ValueError(f'no nonlinearity is called {self.nonlinearity!r}')
    if self.normalisation not in NORMALISATIONS:
      raise ValueError(f'no normalisation is called {self.normalisation!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
  """Where an autoencoder is from, in its own words; None where it is silent.

  Attributes:
    model: the language model.
    site: the name of the activations that it reads.
    target_site: of those that it writes, if they are others; `TARGET` if they
      are and the file does not say which.
    context_size: tokens of a context in training.
    prepend_bos: whether contexts began with the token for it.
    reshape: how activations become vectors, if they are none: 'hook_z' for all
      heads of a token, one behind the other.
    settings: everything that its config says.
  """

  model: str | None = None
  site: str | None = None
  target_site: str | None = None
  context_size: int | None = None
  prepend_bos: bool | None = None
  reshape: str | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
  """An autoencoder of another library, its weights not read yet.

  Attributes:
    format: a name of `formats.NAMES`.
    url: its folder or file.
    d_in: width of the activations that it reads.
    d_out: of those that it writes.
    n_latents: its latents.
    tensors: by name: w_enc_ND, w_dec_ND, b_dec_D, and where there are such
      b_enc_N, threshold_N, w_skip_DD (a row per written value), r_mag_N,
      b_mag_N, b_gate_N; axes are in the order of the name whatever the file's.
    transposed: names of those that the file has in the other order, so that
      columns are read faster than rows.
    extra: tensors that are no part of the function, by their names in the file.
    semantics: which function it is.
    provenance: where it is from.
  """

  format: str
  url: str
  d_in: int
  d_out: int
  n_latents: int
  tensors: dict[str, tensors.Tensor]
  transposed: frozenset[str]
  extra: dict[str, tensors.Tensor]
  semantics: Semantics
  provenance: Provenance


def is_transcoder(of: Imported) -> bool:
  """Whether it writes another site than it reads, by what is known of it."""
  return (
    of.provenance.target_site is not None
    or 'w_skip_DD' in of.tensors
    or of.d_in != of.d_out
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """What some formats do not say, by the user.

  Attributes:
    k: active latents of a token.
    scale_in: what an activation is multiplied by before it is encoded.
  """

  k: int | None = None
  scale_in: float | None = None

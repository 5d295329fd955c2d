"""The folders of Llama Scope (He et al. 2024), OpenMOSS's first format.

hyperparams.json and checkpoints/final.safetensors. Activations are scaled to a
norm of sqrt(D) on average over the dataset, what is read and what is written
each by its own average. The threshold is one number for all latents. It holds
for activations at inference, into which the library has folded the scales
(`standardize_parameters_of_dataset_norm`, then `transform_to_unit_decoder_norm`
if `sparsity_include_decoder_norm`): so it is scaled back here, by the scale of
what is written or, without that flag, of what is read.
"""

import math

from sae_jax.interchange import imported, weights
from sae_jax.interchange.place import Place

_CONFIG, _WEIGHTS = 'hyperparams.json', 'checkpoints/final.safetensors'
_TABLE = {
  'encoder.weight': ('w_enc_ND', 'nd'),
  'encoder.bias': ('b_enc_N', 'n'),
  'decoder.weight': ('w_dec_ND', 'on'),
  'decoder.bias': ('b_dec_D', 'o'),
}
LOOKED_FOR = f'a folder with {_CONFIG} and {_WEIGHTS}'


def detect(where: Place) -> str | None:
  """See `formats.Format`."""
  return LOOKED_FOR if where.has(_CONFIG, _WEIGHTS) else None


def read(where: Place, given: imported.Given) -> imported.Imported:
  """See `formats.Format`."""
  del given
  settings = where.json(_CONFIG)
  settings.choice('act_fn', ('jumprelu',))
  settings.choice('norm_activation', ('dataset-wise',))
  settings.choice('use_glu_encoder', (False,), False)
  settings.choice('use_decoder_bias', (True,), True)
  width = settings.count('d_model')
  content = weights.take(
    where.tensors(_WEIGHTS),
    _TABLE,
    {'n': settings.count('d_sae'), 'd': width, 'o': width},
  )
  norms = settings.inner('dataset_average_activation_norm')
  scale_in, scale_out = (
    math.sqrt(width) / norms.positive(end) for end in ('in', 'out')
  )
  is_rescaled = settings.flag('sparsity_include_decoder_norm', True)
  site, target = (settings.text(f'hook_point_{end}') for end in ('in', 'out'))
  return imported.Imported(
    format='llama_scope',
    url=where.url,
    **content.fields(),
    semantics=imported.Semantics(
      nonlinearity='jumprelu',
      threshold=settings.positive('jump_relu_threshold')
      * (scale_out if is_rescaled else scale_in),
      normalisation='dataset',
      scale_in=scale_in,
      scale_out=scale_out,
      subtract_b_dec=settings.flag('apply_decoder_bias_to_pre_encoder', False),
      rescale_by_decoder_norm=is_rescaled,
    ),
    provenance=imported.Provenance(
      site=site,
      target_site=target if target != site else None,
      settings=dict(settings.values),
    ),
  )

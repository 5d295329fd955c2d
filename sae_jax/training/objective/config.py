"""The config of the loss."""

import dataclasses

from sae_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(config_lib.Config):
  """Terms of the loss (Gao et al. 2024, sections 2.3, 4 and A.2)."""

  k_aux: int = config_lib.option(
    256,
    'number of dead latents that model the error of a token (AuxK), with topk '
    'and batchtopk; 0 for no AuxK',
    least=0,
  )
  aux_weight: float = config_lib.option(
    1 / 32, 'weight of AuxK in the loss, alpha', least=0
  )
  dead_after_tokens: int = config_lib.option(
    0,
    'number of tokens after which a latent that was active for none of them '
    'counts as dead; 0 for a twentieth of the run, at most 10 million',
    least=0,
    most=2**30,
  )
  multi_topk: int = config_lib.option(
    0,
    'Multi-TopK: the loss also takes in the reconstruction from this many '
    'times k latents (4 in the paper); 0 for no Multi-TopK',
    least=0,
  )
  multi_weight: float = config_lib.option(
    1 / 8, 'weight of Multi-TopK in the loss', least=0
  )
  topk_recall: float = config_lib.option(
    1.0,
    'least share of the top k that TPU kernels are expected to find in '
    'training; 1 is exact, less is faster. Evaluation is always exact',
    least=0.5,
    most=1,
  )
  sparsity_weight: float = config_lib.option(
    0.0,
    'weight of the sparsity penalty of the baselines: the L1 norm of the '
    "codes, in units of the tokens' RMS distance from their mean, with relu; "
    'the L0 norm with jumprelu',
    least=0,
  )
  jump_bandwidth: float = config_lib.option(
    1e-3,
    'width of the kernel with which jumprelu estimates the gradient of its '
    "thresholds, in units of the tokens' RMS distance from their mean",
    least=1e-12,
  )

  def widest(self, k: int) -> int:
    """Active latents of a token in the widest code of k, that of Multi-TopK."""
    return k * max(1, self.multi_topk)

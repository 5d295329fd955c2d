"""The config of the loss."""

import dataclasses

from sae_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(config_lib.Config):
  """Terms of the loss (Gao et al. 2024, sections 2.3, 4 and A.2)."""

  k_aux: int = config_lib.option(
    256,
    'dead latents that model the error of a token (AuxK); 0 for none. It goes '
    'with topk and batchtopk, the baselines have none',
    least=0,
  )
  aux_weight: float = config_lib.option(1 / 32, "AuxK's weight, alpha", least=0)
  dead_after_tokens: int = config_lib.option(
    10_000_000,
    'a latent that was silent for so many tokens is dead',
    least=1,
    most=2**30,
  )
  multi_topk: int = config_lib.option(
    0,
    'Multi-TopK: the loss also takes in the reconstruction from so many times '
    'k latents (the paper: 4); 0 for none',
    least=0,
  )
  multi_weight: float = config_lib.option(1 / 8, "Multi-TopK's weight", least=0)
  topk_recall: float = config_lib.option(
    1.0,
    "of training's top-k with TPU kernels: 1 is exact; below, a share of 1 - "
    'topk_recall of the active latents may be others than the top ones, which '
    'is less work. Evaluation is always exact',
    least=0.5,
    most=1,
  )
  sparsity_weight: float = config_lib.option(
    0.0,
    "weight of relu's L1 penalty (of z in units of the tokens' RMS distance "
    "from their mean) or of jumprelu's L0 penalty",
    least=0,
  )
  jump_bandwidth: float = config_lib.option(
    1e-3,
    "width of jumprelu's gradient estimate for thresholds, in units of the "
    "tokens' RMS distance from their mean",
    least=1e-12,
  )

  def widest(self, k: int) -> int:
    """Active latents of a token in the widest code of k, that of Multi-TopK."""
    return k * max(1, self.multi_topk)

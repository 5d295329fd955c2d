"""What training minimises: the reconstruction error, AuxK and penalties.

`loss` is the same for all; a file named after a nonlinearity holds the rest.
"""

from sae_jax.training.objective.config import ObjectiveConfig
from sae_jax.training.objective.loss import value_and_grad
from sae_jax.training.objective.registry import check, of
from sae_jax.training.objective.terms import Terms

__all__ = ['ObjectiveConfig', 'Terms', 'check', 'of', 'value_and_grad']

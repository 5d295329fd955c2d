"""Examples of latents, and what the saved codes say of each one."""

from sae_jax.probing.examples.config import FeatureConfig
from sae_jax.probing.examples.second import second_pass

__all__ = ['FeatureConfig', 'second_pass']

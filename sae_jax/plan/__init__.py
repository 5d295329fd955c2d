"""What a run would need of TPUs that are not here, by compiling it for them.

`program` reads what a compiled program says,
`roofline` how long that takes at least, `planner`
puts them together.
"""

from sae_jax.plan.planner import plan
from sae_jax.plan.record import Plan

__all__ = ['Plan', 'plan']

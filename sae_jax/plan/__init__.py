"""What a run would need of TPUs that are not here, by compiling it for them.

`program` reads a compiled program, `roofline` bounds its time from below,
`planner` puts the two together.
"""

from sae_jax.plan.planner import plan
from sae_jax.plan.record import Plan

__all__ = ['Plan', 'plan']

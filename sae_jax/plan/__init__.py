"""What a run would need of TPUs that are not here, by compiling it for them.

`chips` has the published figures, `hlo` reads a compiled program's text,
`program` says what it does, `roofline` how long that takes at least, `plan`
puts them together.
"""

from sae_jax.plan.planner import plan
from sae_jax.plan.record import Plan

__all__ = ['Plan', 'plan']

"""What the compiler is asked by the kernels' benchmark."""

from experiments.kernels import estimate
from experiments.kernels.estimate import job


def test_one_loop_is_estimated_and_a_nested_one_is_not():
  jobs = [
    job('v6e', 'nested', outer=a, inner=b)
    for a, b in ((1, 10), (1, 1000), (100, 10))
  ]
  found = estimate.run(jobs)
  few, many, nested = (found[one].of('nested') for one in jobs)
  # A fixed part, and the same again for each iteration.
  assert 900 < (many - few) / 12 < 1100
  # The same thousand iterations, of which few are seen.
  assert nested < few + (many - few) / 10


def test_what_the_compiler_refuses_comes_with_its_reason():
  bad = job('v6e', 'nested', outer=1)
  empty = job('v6e', 'select_units', k=0, unit=32, units=1)
  found = estimate.run([bad, empty])
  assert not found[bad].cycles and not found[empty].cycles
  assert 'TypeError' in found[bad].error
  assert 'no estimate' in found[empty].error

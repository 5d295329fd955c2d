"""Many runs over a grid, by any number of workers that share a folder.

grid         the runs: every combination of some fields' values
packs        which runs are trained on one reading of a store
convergence  when a run that goes on until then has converged
cells        what is kept of a finished run, and where
work         a worker: takes runs, trains and scores them, until none is left
cost         floating-point operations that runs take
planned      what a sweep would take, before it runs
"""

#!/usr/bin/env bash
# Runs what new releases can break on the newest Python from 3.12 on that is
# found here; with COLAB=1 what the older ones that Colab has can break.
set -euo pipefail
venv=${VENV:-.venv-newest}

runs() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

found=
# Those of Colab have no wheels for 3.14.
for name in ${COLAB:+python3.13} python3.14 python3.13 python3.12 python3 \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if command -v "$name" >/dev/null && runs "$name"; then
    found=$name
    break
  fi
done
if [ -z "$found" ]; then
  echo 'newest: no Python 3.12 or later here, ran nothing'
  exit 0
fi

stamp=$venv/.installed
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  "$found" -m venv "$venv"
  "$venv/bin/pip" --disable-pip-version-check --quiet install uv
  "$venv/bin/uv" --quiet pip install --python "$venv/bin/python" \
    ${COLAB:+--constraint tests/colab.txt} --editable '.[test]'
  touch "$stamp"
fi
"$venv/bin/python" - <<'PY'
import platform
import jax
print(f'newest: Python {platform.python_version()}, jax {jax.__version__}')
PY
# What a newer jax, flax, optax, Orbax or TensorStore can break: of each way in
# which they are used one test. A name that is gone is an error of pytest.
# Structs and first weights; arrays of either library; the language model.
unit=(
  autoencoder.py::test_encode_decode_equal_a_float64_definition
  autoencoder.py::test_fresh_autoencoder_fits_its_inputs
  autoencoder.py::test_geometric_median_is_the_minimum
  raw.py::test_double_precision_is_kept_where_jax_has_it
  raw.py::test_they_run_under_jit
  metrics.py::test_evaluate_batch_is_encode_decode_and_sums
  subject_transformer.py::test_forward_equals_numpy_float64
  subject_transformer.py::test_gradient_equals_float64_differences
)
# Kernels, interpreted: of encoding, gathers, sums of gradients, top-k and Adam,
# called alone and where the library differentiates them.
unit+=(
  encode_kernel.py::test_the_top_k_is_that_of_a_stable_sort
  encode_kernel.py::test_values_that_are_no_numbers_come_through
  'gather_kernels.py::test_sums_and_products_are_those_of_float64[ragged]'
  'gather_kernels.py::test_segment_sums_are_those_of_float64[2]'
  top_k_kernel.py
  adam_rows.py::test_kernel_and_reference_equal_a_float64_loop
  adam_rows.py::test_a_step_that_is_not_taken_leaves_everything
  sparse.py::test_kernels_by_name_equal_the_gathers_with_their_gradients
  sparse.py::test_decode_and_its_gradients_equal_the_dense_product
  sparse.py::test_bucketed_top_k_equals_a_stable_sort
  sparse.py::test_top_k_takes_buckets_for_wide_rows_with_the_same_result
)
# Objectives, gradients that are written by hand, optax, a run with Orbax.
unit+=(
  'objective.py::test_gradients_equal_dense_autodiff[4-0.03125-gather]'
  'objective.py::test_gradients_equal_dense_autodiff[4-0.03125-dense]'
  'objective.py::test_micro_batches_change_nothing_but_rounding[5]'
  'objective.py::test_jump_relu_and_its_estimates_equal_those_by_hand[1.0]'
  objective.py::test_bfloat16_products_are_near_and_leave_float32
  objective.py::test_relu_and_its_penalty_equal_dense_autodiff
  batchtopk.py::test_the_smallest_active_value_is_that_of_a_sort
  batchtopk.py::test_the_threshold_follows_the_steps_that_are_taken
  optimizer.py::test_updates_equal_a_float64_loop
  optimizer.py::test_schedule_rises_stays_and_falls
  'optimizer.py::test_plain_steps_keep_their_bits[True-2.0]'
  'optimizer.py::test_a_step_is_held_unless_all_is_finite[pallas]'
  checkpoint.py
  saved_tensors.py::test_a_tensor_is_saved_as_an_array_is
  train.py::test_a_damaged_checkpoint_is_named
  train.py::test_load_gives_the_average_or_the_last_weights
  train.py::test_a_finished_run_goes_on_to_more_steps
)
# TensorStore, and every stage in turn.
unit+=(store.py feed.py text_to_page.py)
mesh=(
  mesh.py
  sparse.py
  step.py::test_abstract_state_is_that_of_a_real_one
  step.py::test_initial_weights_do_not_depend_on_the_mesh
  step.py::test_evaluation_is_of_the_averaged_weights_on_every_mesh
  step.py::test_a_mesh_changes_nothing_but_rounding
  step.py::test_a_step_that_is_not_finite_is_skipped
  'step.py::test_baselines_are_the_same_on_a_mesh[jumprelu]'
)
if [ -n "${COLAB:-}" ]; then
  # The tests beside the library need a newer jax for float64; these do not.
  unit=(train.py checkpoint.py explain.py notebook.py)
  mesh=(step.py::test_initial_weights_do_not_depend_on_the_mesh
    step.py::test_a_mesh_changes_nothing_but_rounding)
fi
pytest=("$venv/bin/python" -m pytest -n 2 --dist=loadfile -q)
"${pytest[@]}" "${unit[@]/#/tests/unit/test_}"
"${pytest[@]}" "${mesh[@]/#/tests/mesh/test_}"

"""Change one line of each rule that users rely on, and see that a test notices.

    python tests/mutations.py [--list] [--only NAME ...]

A mutation is applied to a temporary copy of the checkout, never in place. It is killed if one of
its tests fails. Exits with 1 if one survives, or if its old text is not found exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What of the checkout its tests need.
COPIED = ("s2l_ray", "tests", "jobs", "clusters", "pyproject.toml", "README.md")
# Hypothesis ends at the first failure that it finds: looking for the smallest one takes a minute.
CONFTEST = """\
from hypothesis import Phase, settings

settings.register_profile("first_failure", phases=(Phase.explicit, Phase.generate))
settings.load_profile("first_failure")
"""
# Exit status of pytest if a test failed or a module could not be imported.
FAILED, INTERRUPTED = 1, 2


@dataclass(frozen=True)
class Mutation:
    """One changed line.

    Attributes:
        name: the rule that is broken.
        file: relative to s2l_ray.
        old, new: text of the line, which occurs once in the file, and what comes in its place.
        tests: paths or node ids of pytest, relative to tests/unit.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SELECTION = (
    Mutation(
        "quota_order_ascending",
        "core/selection/quotas.py",
        'np.argsort(sizes, kind="stable")',
        'np.argsort(-sizes, kind="stable")',
        ("core/selection/test_quotas.py",),
    ),
    Mutation(
        "quota_floor",
        "core/selection/quotas.py",
        "remaining // (len(sizes) - num_done)",
        "-(-remaining // (len(sizes) - num_done))",
        ("core/selection/test_quotas.py",),
    ),
    Mutation(
        "small_last_limit",
        "core/selection/quotas.py",
        "sizes > small_last",
        "sizes >= small_last",
        ("core/selection/test_quotas.py", "core/selection/test_rules.py"),
    ),
    Mutation(
        "nested_quotas_by_rows",
        "core/selection/quotas.py",
        "np.bincount(parents, weights=sizes)",
        "np.bincount(parents)",
        ("core/selection/test_quotas.py",),
    ),
    Mutation(
        "budget_share_as_written",
        "core/selection/quotas.py",
        "Fraction(str(budget))",
        "Fraction(budget)",
        ("config/test_config.py",),
    ),
    Mutation(
        "budget_share_at_least_one_row",
        "core/selection/quotas.py",
        "max(1, math.floor(",
        "max(0, math.floor(",
        ("config/test_config.py",),
    ),
    Mutation(
        "budget_above_the_data",
        "core/selection/quotas.py",
        "if rows > eligible:",
        "if rows > eligible + 1:",
        ("config/test_config.py",),
    ),
    Mutation(
        "draw_ends_before_the_upper_key",
        "core/selection/draw.py",
        "(hash_ < high_hash)",
        "(hash_ <= high_hash)",
        ("core/selection/test_draw.py::test_a_realistic_draw_is_exact_and_exchanges_few_keys",),
    ),
    Mutation(
        "middle_rounds_down",
        "core/selection/draw.py",
        "(sizes - quotas) // 2 if",
        "(sizes - quotas + 1) // 2 if",
        ("core/selection/test_draw.py::test_a_realistic_draw_is_exact_and_exchanges_few_keys",),
    ),
    Mutation(
        "ties_by_hash",
        "core/selection/keys.py",
        "order = np.lexsort((points.hashes, points.scores, points.groups))",
        "order = np.lexsort((points.scores, points.groups))",
        ("core/selection/test_keys.py", "core/selection/test_draw.py"),
    ),
    Mutation(
        "order_of_negative_scores",
        "core/selection/keys.py",
        "np.where(bits & sign, ~bits, bits | sign)",
        "np.where(bits & sign, bits, bits | sign)",
        ("core/selection/test_keys.py",),
    ),
    Mutation(
        "hash_depends_on_the_seed",
        "core/hashing.py",
        "np.uint64(1)) * _GOLDEN + key",
        "np.uint64(1)) * _GOLDEN",
        ("core/test_hashing.py",),
    ),
    Mutation(
        "hash_depends_on_the_purpose",
        "core/hashing.py",
        "_finalise(key ^ np.uint64(_salt(purpose)))",
        "_finalise(key)",
        ("core/test_hashing.py",),
    ),
    Mutation(
        "rules_draw_by_themselves",
        "core/selection/rules.py",
        "if section.paired:",
        "if True:",
        ("core/selection/test_rules.py",),
    ),
    Mutation(
        "ifd_is_the_ratio_of_losses",
        "config/rules.py",
        '"where(at(answer_loss) > 0, at(answer_loss), 1)",',
        '"1",',
        ("core/selection/test_rules.py",),
    ),
    Mutation(
        "facility_lazy_ties_by_hash",
        "core/selection/facility.py",
        "current = (-self._gain(row), hash_, row)",
        "current = (-self._gain(row), 0, row)",
        ("core/selection/test_facility.py::test_ties_are_decided_by_the_seed",),
    ),
    Mutation(
        "facility_ties_by_hash",
        "core/selection/facility.py",
        "min((-self._gain(row), self.hashes[row], row)",
        "min((-self._gain(row), row, row)",
        ("core/selection/test_facility.py::test_ties_are_decided_by_the_seed",),
    ),
    Mutation(
        "at_is_the_chosen_step",
        "config/expressions.py",
        "values[:, [columns.at]]",
        "values[:, [0]]",
        ("config/test_expressions.py",),
    ),
    Mutation(
        "first_is_one_step",
        "config/expressions.py",
        '"first": (lambda columns, values: values[:, :1], 1)',
        '"first": (lambda columns, values: values[:, 1:2], 1)',
        ("config/test_expressions.py",),
    ),
    Mutation(
        "last_is_the_last_step",
        "config/expressions.py",
        "values[:, -1:]",
        "values[:, -2:-1]",
        ("config/test_expressions.py",),
    ),
    Mutation(
        "after_leaves_out_step_0",
        "config/expressions.py",
        '"after": (lambda columns, values: values[:, 1:], 1)',
        '"after": (lambda columns, values: values[:, :], 1)',
        ("config/test_expressions.py",),
    ),
)

TEXT = (
    Mutation(
        "prompt_is_not_learned",
        "core/text/encoding.py",
        "learned[first:stop] = True",
        "learned[:stop] = True",
        ("core/text/test_encoding.py::test_bytes_span_by_span",),
    ),
    Mutation(
        "end_token_is_learned",
        "core/text/encoding.py",
        "if piece.end:",
        "if not piece.end:",
        ("core/text/test_encoding.py::test_bytes_span_by_span",),
    ),
    Mutation(
        "first_token_is_not_learned",
        "core/text/encoding.py",
        "learned[:1] = False",
        "learned[:0] = False",
        ("core/text/test_encoding.py::test_the_first_token_is_never_learned",),
    ),
    Mutation(
        "truncation_side",
        "core/text/encoding.py",
        'self.truncation == "right"',
        'self.truncation == "left"',
        ("core/text/test_encoding.py::test_longer_rows_are_cut_on_one_side",),
    ),
    Mutation(
        "max_length",
        "core/text/encoding.py",
        "cut = len(ids) - self.max_length",
        "cut = len(ids) - self.max_length - 1",
        ("core/text/test_encoding.py::test_longer_rows_are_cut_on_one_side",),
    ),
    Mutation(
        "start_token_stays",
        "core/text/encoding.py",
        "kept = int(ids[0] == self.bos)",
        "kept = 0",
        ("core/text/test_encoding.py::test_longer_rows_are_cut_on_one_side",),
    ),
    Mutation(
        "token_over_the_border_is_learned",
        "core/text/encoding.py",
        "range(count), span[1], lo=first, key=lambda number: tokens.token_to_chars(number)[0]",
        "range(count), span[1], lo=first, key=lambda number: tokens.token_to_chars(number)[1]",
        ("core/text/test_encoding.py",),
    ),
    Mutation(
        "batch_has_the_length_of_its_longest_row",
        "core/text/batching.py",
        "max(1, lengths[order[0]])",
        "max(1, lengths[order[-1]])",
        ("core/text/test_encoding.py::test_batches_hold_every_row_once_within_the_limit",),
    ),
    Mutation(
        "little_padding",
        "core/text/batching.py",
        "(1 + MOST_PADDING)",
        "(2 + MOST_PADDING)",
        ("core/model/test_scoring.py",),
    ),
)

MODEL = (
    Mutation(
        "loss_is_a_mean_over_learned_tokens",
        "core/model/statistics.py",
        "values_M.double()) / counts_B)",
        "values_M.double()) / counts_B.max())",
        ("core/model/test_statistics.py::test_statistics_equal_numpy",),
    ),
    Mutation(
        "el2n_is_a_norm",
        "core/model/statistics.py",
        "torch.linalg.vector_norm(errors_CV, dim=1)",
        "torch.linalg.vector_norm(errors_CV, 1, dim=1)",
        ("core/model/test_statistics.py::test_statistics_equal_numpy",),
    ),
    Mutation(
        "mean_probability_is_arithmetic",
        "core/model/statistics.py",
        "_means((-losses_M).exp(), counts_B)",
        "_means(-losses_M, counts_B).exp()",
        ("core/model/test_statistics.py::test_statistics_equal_numpy",),
    ),
    Mutation(
        "min_probability_is_the_lowest",
        "core/model/statistics.py",
        '"amin"',
        '"amax"',
        ("core/model/test_statistics.py::test_statistics_equal_numpy",),
    ),
    Mutation(
        "grand_is_of_the_mean_loss",
        "core/model/statistics.py",
        ".sqrt() / counts_B)",
        ".sqrt())",
        ("core/model/test_statistics.py::test_statistics_equal_numpy",),
    ),
    Mutation(
        "position_before_predicts",
        "core/model/output_layer.py",
        "predicts_BL[:, :-1] = learned_BL[:, 1:]",
        "predicts_BL[:] = learned_BL",
        ("core/model/test_losses.py::test_losses_equal_an_unbatched_forward",),
    ),
    Mutation(
        "answer_begins_at_the_start_token",
        "core/model/scoring.py",
        "first = start if example.input_ids[0] == start else end",
        "first = end",
        ("core/model/test_scoring.py",),
    ),
    Mutation(
        "statistics_are_finite",
        "core/model/scoring.py",
        "if np.isfinite(values).all():",
        "if np.isfinite(values).any():",
        ("core/model/test_scoring.py",),
    ),
    Mutation(
        "warm_up_begins_at_0",
        "core/model/schedule.py",
        "section.learning_rate * step / warmup",
        "section.learning_rate * (step + 1) / warmup",
        ("core/model/test_schedule.py",),
    ),
    Mutation(
        "cosine_decay",
        "core/model/schedule.py",
        "0.5 * (1 + math.cos(math.pi * progress))",
        "math.cos(0.5 * math.pi * progress)",
        ("core/model/test_schedule.py",),
    ),
    Mutation(
        "checkpoint_steps_round_half_up",
        "core/model/schedule.py",
        "(2 * i * total_steps + count) // (2 * count)",
        "i * total_steps // count",
        ("core/model/test_schedule.py",),
    ),
    Mutation(
        "gradient_accumulation_divides",
        "core/model/schedule.py",
        "if global_batch % of_all_workers:",
        "if global_batch < of_all_workers:",
        ("core/model/test_schedule.py",),
    ),
    Mutation(
        "parts_are_shuffled_anew_each_epoch",
        "core/model/order.py",
        "{TRAINING_ORDER}, epoch {epoch}, pass {number}",
        "{TRAINING_ORDER}, pass {number}",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "rows_are_shuffled_anew_each_epoch",
        "core/model/order.py",
        "self._draw(window.epoch, 0, part)",
        "self._draw(0, part)",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "files_are_spread_over_an_epoch",
        "core/model/order.py",
        "for number in range(PASSES):",
        "for number in [0] * PASSES:",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "a_short_run_takes_a_share_of_every_part",
        "core/model/order.py",
        "np.diff(ends * wanted // self.epoch_rows, prepend=0)",
        "np.diff(np.minimum(ends, wanted), prepend=0)",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "a_window_is_bounded",
        "core/model/order.py",
        "if pieces and rows + stop - start > self.window:",
        "if pieces and rows > self.window:",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "worker_owns_a_contiguous_share",
        "core/model/order.py",
        "(position % self.global_batch) // share == rank",
        "position % world_size == rank",
        ("core/model/test_order.py",),
    ),
    Mutation(
        "vectors_do_not_decay",
        "core/model/engine.py",
        "len(full_shape(parameter)) > 1 and ",
        "",
        ("core/model/test_families.py",),
    ),
    Mutation(
        "dropout_is_off",
        "core/model/architecture.py",
        "if not dropout:",
        "if False:",
        ("core/model/test_families.py",),
    ),
    Mutation(
        "a_model_that_looks_ahead_is_refused",
        "core/model/lookahead.py",
        "if before > TOLERANCE",
        "if after > TOLERANCE",
        ("core/model/test_architecture.py",),
    ),
    Mutation(
        "padding_that_is_ignored_is_noticed",
        "core/model/decoding.py",
        "return bool(moved <= MOVED_BY_ROUNDING * spread)",
        "return True",
        ("core/model/test_architecture.py",),
    ),
    Mutation(
        "unknown_fields_of_a_config_are_refused",
        "core/model/architecture.py",
        "if name not in known:",
        "if False:",
        ("core/model/test_architecture.py",),
    ),
    Mutation(
        "micro_batches_hold_useful_examples",
        "core/model/micro_batches.py",
        "(e for e in share if e.learned.any()), key=",
        "(e for e in share), key=",
        ("core/model/test_training.py",),
    ),
    Mutation(
        "loss_that_is_not_finite_is_refused",
        "core/model/training.py",
        "if math.isfinite(value := total.item()):",
        "if not math.isinf(value := total.item()):",
        ("core/model/test_training.py",),
    ),
    Mutation(
        "newest_state_is_resumed_from",
        "core/model/state.py",
        'sorted(files.list("state"), reverse=True)',
        'sorted(files.list("state"))',
        ("core/model/test_state.py",),
    ),
    Mutation(
        "state_is_complete",
        "core/model/state.py",
        "return found if found == wanted else []",
        "return found",
        ("core/model/test_state.py",),
    ),
    Mutation(
        "checkpoint_is_complete",
        "core/model/checkpoint.py",
        'if "files.json" not in files.list(folder):',
        "if not files.list(folder):",
        ("core/model/test_state.py",),
    ),
    Mutation(
        "answers_are_compared_without_white_space",
        "core/text/turns.py",
        "answer.rpartition(THOUGHT_END)[2].strip()",
        "answer.rpartition(THOUGHT_END)[2]",
        ("core/text/test_turns.py",),
    ),
    Mutation(
        "held_out_loss_of_a_source_is_a_mean_over_rows",
        "core/answers/resampling.py",
        "return np.asarray(sums[0] / sums[1])",
        "return np.asarray(sums[0])",
        ("stages/test_evaluation.py",),
    ),
    Mutation(
        "held_out_mean_weighs_sources_equally",
        "core/answers/resampling.py",
        "np.asarray(np.mean([means",
        "np.asarray(np.max([means",
        ("stages/test_evaluation.py",),
    ),
    Mutation(
        "two_models_have_the_same_resamples",
        "core/answers/resampling.py",
        "keyed_hash(BOOTSTRAP, number, example_ids)",
        "keyed_hash(BOOTSTRAP, number + id(example_ids), example_ids)",
        ("core/answers/test_resampling.py",),
    ),
    Mutation(
        "an_empty_program_answer_is_asked_again",
        "stages/evaluation/answering.py",
        "if self.scorer.is_empty(",
        "if not self.scorer.is_empty(",
        ("stages/test_evaluation.py",),
    ),
    Mutation(
        "published_rules_are_about_their_sets",
        "core/answers/scores.py",
        "return name if name in published.SETS else None",
        'return name if name in published.SETS else "gsm8k"',
        ("stages/test_evaluation.py",),
    ),
    Mutation(
        "whole_numbers_must_be_equal",
        "core/answers/numeric.py",
        "return value == gold",
        "return abs(value - gold) <= CLOSE * abs(gold)",
        ("core/answers/test_rules.py",),
    ),
    Mutation(
        "a_tuple_keeps_its_order",
        "core/answers/numeric.py",
        "if _ordered(wanted):",
        "if False:",
        ("core/answers/test_rules.py",),
    ),
    Mutation(
        "published_rules_round_on_math",
        "core/answers/published.py",
        "return round(number) == gold",
        "return number == gold",
        ("core/answers/test_rules.py",),
    ),
    Mutation(
        "a_program_of_root_becomes_nobody",
        "core/answers/programs.py",
        "if os.getuid() == 0:",
        "if False:",
        ("core/answers/test_programs.py",),
    ),
    Mutation(
        "a_program_writes_nowhere_but_in_its_own_folder",
        "core/answers/programs.py",
        '"--perms", "1777", "--size", str(FILES_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/"',
        '"--perms", "1777", "--tmpfs", "/tmp"',
        ("core/answers/test_programs.py",),
    ),
    Mutation(
        "a_program_is_denied_some_system_calls",
        "core/answers/seccomp.py",
        "(_EQUAL, len(numbers) - place, 0, number)",
        "(_EQUAL, 0, 0, number)",
        ("core/answers/test_programs.py",),
    ),
    Mutation(
        "a_program_has_little_memory",
        "core/answers/programs.py",
        "(r.RLIMIT_AS, {MEMORY})",
        "(r.RLIMIT_AS, -1)",
        ("core/answers/test_programs.py",),
    ),
    Mutation(
        "batches_are_halved_where_memory_is_short",
        "core/model/decoding.py",
        "tokens_per_batch = tokens * len(several) // 2",
        "tokens_per_batch = tokens",
        ("core/model/test_architecture.py",),
    ),
    Mutation(
        "layers_over_several_gpus_follow_each_other",
        "core/model/spreading.py",
        "int((filled + size / 2) / share)",
        "number % gpus",
        ("core/model/test_spreading.py",),
    ),
    Mutation(
        "bert_score_leaves_out_added_tokens",
        "core/model/bert_score.py",
        'encoded.pop("special_tokens_mask").bool() | ~encoded',
        "~encoded",
        ("core/model/test_bert_score.py",),
    ),
    Mutation(
        "nothing_runs_without_a_sandbox",
        "core/answers/programs.py",
        'if ran.output != "42":',
        "if False:",
        ("core/answers/test_programs.py",),
    ),
)

TRAINING = (
    Mutation(
        "deepspeed_json_contradicts",
        "core/model/zero.py",
        "if came != expected and not (key",
        "if False and not (key",
        ("core/model/test_zero.py",),
    ),
    Mutation(
        "state_is_written_in_the_background",
        "core/model/state.py",
        "self._writing = self._thread.submit(self._write, folder, copies, part)",
        "self._write(folder, copies, part)",
        ("core/model/test_state.py",),
    ),
    Mutation(
        "fragment_begins_elsewhere",
        "core/model/fragments.py",
        "own.copy_(values[first - start : last - start])",
        "own.copy_(values[: last - first])",
        ("core/model/test_state.py",),
    ),
    Mutation(
        "packed_rows_see_each_other",
        "core/text/batching.py",
        "[np.arange(len(example.input_ids)) for example in batch],",
        "[np.arange(sum(len(e.input_ids) for e in batch))],",
        ("core/model/test_packing.py",),
    ),
    Mutation(
        "activations_are_kept",
        "core/model/engine.py",
        "if setup.scaling.activation_checkpointing:",
        "if False:",
        ("core/model/test_engine.py",),
    ),
    Mutation(
        "adapter_is_not_merged",
        "core/model/adapters.py",
        "weight = weight + layer.get_delta_weight(NAME).detach().float()",
        "weight = weight + 0 * layer.get_delta_weight(NAME).detach().float()",
        ("core/model/test_adapters.py",),
    ),
    Mutation(
        "missing_gpu_is_silent",
        "core/model/workers.py",
        "if gpus and not torch.cuda.is_available():",
        "if False:",
        ("core/model/test_scoring.py",),
    ),
    Mutation(
        "deepspeed_place_counts",
        "core/model/zero.py",
        "for key, value in _leaves(settings_of(section))\n",
        'for key, value in [("path", section.deepspeed)]\n',
        ("core/model/test_zero.py",),
    ),
)

KMEANS = (
    Mutation(
        "clusters_are_numbered_by_mean",
        "core/kmeans/lloyd.py",
        "np.lexsort((*centroids.T[::-1], means))",
        "np.lexsort((means, *centroids.T[::-1]))",
        (
            "core/kmeans/test_lloyd.py::test_clusters_are_numbered_by_ascending_mean_and_history_follows",
        ),
    ),
    Mutation(
        "objective_is_the_sum_of_squared_distances",
        "core/kmeans/sums.py",
        "two ** (1 - exponent - _SUBNORMAL)",
        "two ** (-exponent - _SUBNORMAL)",
        (
            "core/kmeans/test_lloyd.py::test_the_objective_falls_every_round_and_the_tolerance_stops",
        ),
    ),
    Mutation(
        "empty_clusters_get_the_farthest_rows",
        "core/kmeans/queries.py",
        "keys = -squared_distances",
        "keys = squared_distances",
        ("core/kmeans/test_lloyd.py::test_empty_clusters_get_the_farthest_distinct_rows",),
    ),
    Mutation(
        "seeded_rows_are_distinct",
        "core/kmeans/topk.py",
        "if value not in seen:",
        "if value:",
        ("core/kmeans/test_lloyd.py::test_the_farthest_rows_are_those_of_a_full_sort",),
    ),
    Mutation(
        "fixed_point_scale",
        "core/kmeans/sums.py",
        "return 62 - exact.bit_length()",
        "return 61 - exact.bit_length()",
        ("core/kmeans/test_lloyd.py::test_the_fixed_point_uses_all_bits_that_cannot_overflow",),
    ),
    Mutation(
        "fixed_point_rounds_half_to_even",
        "core/kmeans/sums.py",
        "np.rint(wide, out=wide)",
        "np.floor(wide, out=wide)",
        ("core/kmeans/test_lloyd.py::test_fixed_point_sums_are_exact_sums_of_the_rounded_values",),
    ),
    Mutation(
        "start_sample_has_the_smallest_hashes",
        "core/kmeans/lloyd.py",
        "SmallestHashes(self.seed, self.start_rows)",
        "SmallestHashes(self.seed + 1, self.start_rows)",
        (
            "core/kmeans/test_lloyd.py::"
            "test_the_start_is_k_means_plus_plus_on_the_rows_with_the_smallest_hashes",
        ),
    ),
    Mutation(
        "start_draws_by_squared_distance",
        "core/kmeans/start.py",
        "cumulative = np.cumsum(closest)",
        "cumulative = np.cumsum(closest > 0)",
        (
            "core/kmeans/test_lloyd.py::"
            "test_the_start_is_k_means_plus_plus_on_the_rows_with_the_smallest_hashes",
        ),
    ),
    Mutation(
        "sample_has_as_many_rows_as_asked_for",
        "core/kmeans/start.py",
        "hashes[num_rows - before - 1]",
        "hashes[max(0, num_rows - before - 2)]",
        ("core/kmeans/test_lloyd.py::test_the_hash_limit_is_that_of_a_full_sort",),
    ),
    Mutation(
        "tolerance_is_reached_by_equality",
        "core/kmeans/state.py",
        "last.shift <= tolerance",
        "last.shift < tolerance",
        (
            "core/kmeans/test_lloyd.py::"
            "test_without_tolerance_exactly_the_rounds_that_are_allowed_unless_nothing_moves",
        ),
    ),
    Mutation(
        "seeding_round_is_not_the_last",
        "core/kmeans/state.py",
        "last.reseeded == 0 and",
        "last.reseeded >= 0 and",
        (
            "core/kmeans/test_lloyd.py::"
            "test_a_round_that_seeds_a_cluster_is_not_the_last_although_no_other_centroid_moved",
        ),
    ),
    Mutation(
        "hamerly_bound_loses_the_drift",
        "core/kmeans/hamerly.py",
        "self.negative_margins += drift.take(labels)",
        "self.negative_margins -= drift.take(labels)",
        (
            "core/kmeans/test_lloyd.py::"
            "test_bounds_leave_out_only_rows_that_faiss_would_leave_where_they_are",
        ),
    ),
    Mutation(
        "step_0_is_left_out_of_the_trajectory",
        "core/kmeans/features.py",
        "begin = [0] if section.initial else []",
        "begin = [0]",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "steps_end_with_the_last",
        "core/kmeans/features.py",
        "trained[-(-(place + 1) * len(trained) // count) - 1]",
        "trained[place * len(trained) // count]",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "centred_is_less_the_mean",
        "core/kmeans/features.py",
        "[column - mean for column in losses]",
        "[column - losses[0] for column in losses]",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "difference_is_later_less_earlier",
        "core/kmeans/features.py",
        "later - earlier for",
        "earlier - later for",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "zscore_divides_by_all_steps",
        "core/kmeans/features.py",
        "sum(squares[1:], squares[0]) / len(squares)",
        "sum(squares[1:], squares[0]) / (len(squares) - 1)",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "relative_is_bounded",
        "core/kmeans/features.py",
        "SMALLEST_FIRST * largest",
        "0 * largest",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "weights_weigh_squares",
        "core/kmeans/features.py",
        "np.sqrt(weight)",
        "weight",
        ("core/kmeans/test_features.py",),
    ),
    Mutation(
        "losses_of_clusters_are_finite",
        "core/kmeans/features.py",
        "wrong = ~np.isfinite(losses_NS)",
        "wrong = np.isnan(losses_NS)",
        ("core/kmeans/test_features.py",),
    ),
)

DATA = (
    Mutation(
        "other_rows_keys_are_exported",
        "core/data/original.py",
        "    if pa.types.is_string(table.schema.field(NAME).type):",
        "    if False:",
        ("core/data/test_original.py",),
    ),
    Mutation(
        "integers_become_floats",
        "core/data/original.py",
        "MAX_EXACT = 1 << 53",
        "MAX_EXACT = 1 << 63",
        ("core/data/test_original.py",),
    ),
    Mutation(
        "infinite_numbers_are_kept_as_floats",
        "core/data/original.py",
        "return finite and all(",
        "return all(",
        ("core/data/test_original.py",),
    ),
    Mutation(
        "deep_values_have_a_type",
        "core/data/original.py",
        "MAX_LEVELS = 32",
        "MAX_LEVELS = 320",
        ("core/data/test_original.py",),
    ),
    Mutation(
        "links_are_followed_again",
        "core/data/walk.py",
        "        if real in seen:",
        "        if real in seen and os.path.isdir(path):",
        ("core/data/test_find.py::test_a_link_is_followed_once",),
    ),
    Mutation(
        "the_ids_of_the_last_round_are_kept",
        "core/data/rounds.py",
        'own.get(FIRST_ID, own.get(ID, "null"))',
        'own.get(ID, "null")',
        ("core/data/test_rounds.py",),
    ),
    Mutation(
        "a_record_may_name_any_place",
        "core/data/hub.py",
        'if not isinstance(name, str) or "/" in name or not is_plain_path(name):',
        "if not isinstance(name, str):",
        ("core/data/test_hub.py",),
    ),
    Mutation(
        "a_row_may_have_any_size",
        "core/data/formats/source.py",
        "if size > LARGEST_ROW:",
        "if size < 0:",
        ("core/data/test_large_rows.py",),
    ),
    Mutation(
        "a_key_may_stand_twice",
        "core/data/formats/json_objects.py",
        "if len(made) < len(pairs):",
        "if not pairs:",
        ("core/data/test_read.py",),
    ),
    Mutation(
        "id_holds_file_and_row",
        "core/data/parts.py",
        "ID_BITS = 40",
        "ID_BITS = 39",
        ("core/data/test_read.py::test_ids_hold_the_files_number_and_the_row",),
    ),
    Mutation(
        "csv_quotes_end_where_fields_do",
        "core/data/formats/delimited.py",
        "delimiter=delimiter, strict=True)",
        "delimiter=delimiter, strict=False)",
        ("pipeline/test_bad_files.py::test_bad_input_is_refused",),
    ),
    Mutation(
        "csv_quotes_hold_line_ends",
        "core/data/formats/delimited.py",
        "delimiter=delimiter, strict=True)",
        "delimiter=delimiter, quoting=csv.QUOTE_NONE)",
        ("core/data/test_formats.py::test_csv_of_quoted_lines_blank_lines_and_any_line_end",),
    ),
    Mutation(
        "csv_is_utf8",
        "core/data/formats/delimited.py",
        'decode(errors="surrogateescape")',
        'decode(errors="replace")',
        ("pipeline/test_bad_files.py::test_bad_input_is_refused",),
    ),
    Mutation(
        "parquet_text_is_utf8",
        "core/data/rows.py",
        "column.validate(full=True)",
        "column.validate()",
        ("core/data/test_read.py::test_text_of_parquet_that_is_not_utf8_is_named_or_listed",),
    ),
    Mutation(
        "new_files_are_numbered_last",
        "core/data/incremental.py",
        "numbers.append(next_number + len(new))",
        "numbers.append(len(numbers))",
        ("core/data/test_incremental.py",),
    ),
    Mutation(
        "changed_files_stop",
        "core/data/incremental.py",
        "if (gone or changed) and",
        "if gone and",
        ("core/data/test_incremental.py",),
    ),
    Mutation(
        "losses_of_another_version_are_not_taken",
        "core/data/incremental.py",
        "if made_by != (version, section, proxy):",
        "if made_by[1:] != (section, proxy):",
        ("core/data/test_incremental.py",),
    ),
    Mutation(
        "files_are_sorted_by_name",
        "core/data/find.py",
        "for name in sorted(files)]",
        "for name in files]",
        ("core/data/test_find.py",),
    ),
)

ROWS = (
    Mutation(
        "examples_of_several_formats_are_one_table",
        "core/data/original.py",
        "if len(kinds) < 2:",
        "if True:",
        ("test_api.py::test_examples_of_several_formats_are_one_table",),
    ),
    Mutation(
        "marks_of_turns_are_honoured",
        "core/data/chats.py",
        "return any(value == (key == MASKED_KEY) for key, value in said.items())",
        "return False",
        ("core/data/test_conversations.py::test_answers_that_say_so_are_not_learned",),
    ),
    Mutation(
        "prompts_are_masked",
        "core/data/conversations.py",
        'masked=meaning == "instruction"',
        "masked=False",
        ("core/data/test_conversations.py::test_answers_in_a_prompt_are_not_learned",),
    ),
    Mutation(
        "masked_answers_are_not_learned",
        "core/text/turns.py",
        "and not turn.masked",
        "and True",
        ("core/text/test_encoding.py",),
    ),
    Mutation(
        "columns_of_conversation_are_read",
        "core/data/uses.py",
        "if not _is_read(name, values[row], texts[row]):",
        "if False:",
        ("core/data/test_uses.py",),
    ),
    Mutation(
        "marks_of_pictures_are_no_text",
        "core/data/rows.py",
        '_no_marks_of_media(made["messages"], bad_row)',
        "None",
        ("core/data/test_uses.py::test_the_mark_of_a_picture_is_no_text",),
    ),
)
TEMPLATES = (
    Mutation(
        "thoughts_are_needed",
        "core/text/chat_template.py",
        "if self.thoughts:",
        "if False:",
        ("core/text/test_chat_template.py::test_the_thought_of_a_learned_answer_must_be_there",),
    ),
    Mutation(
        "prompts_are_those_of_training",
        "core/text/chat_template.py",
        "if marks is not None and not text.startswith(opened):",
        "if False:",
        (
            "core/text/test_chat_template.py::"
            "test_a_prompt_is_what_comes_before_the_answer_in_training",
        ),
    ),
    Mutation(
        "unused_tools_are_seen",
        "core/text/chat_template.py",
        "conversation.refuse_unused_tools(text)",
        "None",
        (
            "core/text/test_chat_template.py::test_tools_of_which_only_the_calls_are_there_are_refused",
        ),
    ),
)
REJECTS = (
    Mutation(
        "errors_about_held_out_files_name_their_section",
        "config/data.py",
        'section: ClassVar[str] = "evaluation"',
        'section: ClassVar[str] = "examples"',
        ("core/data/test_uses.py",),
    ),
    Mutation(
        "first_rows_of_raw_files_are_not_kept",
        "core/data/catalog.py",
        "replace(index, first=None)",
        "index",
        ("core/data/test_catalog.py",),
    ),
    Mutation(
        "an_unknown_column_to_ignore_is_told",
        "core/data/catalog.py",
        "if unknown and present:",
        "if False:",
        ("core/data/test_ignored.py",),
    ),
    Mutation(
        "the_report_knows_what_was_passed_over",
        "pipeline/execution.py",
        "passed_over=making.plan.passed_over",
        "passed_over={}",
        ("pipeline/test_rejects.py",),
    ),
    Mutation(
        "too_many_rejects_stop",
        "stages/examples/make.py",
        "if bad > most * (rows + bad):",
        "if False:",
        ("pipeline/test_rejects.py::test_more_bad_rows_than_allowed_stop_the_run",),
    ),
)
STORAGE = (
    Mutation(
        "no_path_leads_out_of_a_storage",
        "core/storage/store.py",
        "if path and not is_plain_path(path):",
        "if False:",
        ("core/storage/test_hostile.py",),
    ),
    Mutation(
        "manifests_name_files_inside_their_folder",
        "core/storage/records.py",
        "if not is_plain_path(text):",
        "if False:",
        ("core/storage/test_hostile.py",),
    ),
    Mutation(
        "a_manifest_is_checked_by_its_checksum",
        "core/storage/manifest.py",
        "if hashlib.sha256(text).hexdigest().encode() != digest:",
        "if False:",
        ("core/storage/test_hostile.py",),
    ),
    Mutation(
        "hash_of_a_file_is_checked",
        "core/storage/manifest.py",
        "if digest != entry.sha256:",
        "if len(digest) != len(entry.sha256):",
        ("core/storage/test_store.py::test_a_damaged_data_file_is_named_when_it_is_read",),
    ),
    Mutation(
        "size_of_a_file_is_checked",
        "core/storage/manifest.py",
        "if len(data) != entry.bytes:",
        "if not len(data):",
        ("core/storage/test_store.py::test_a_damaged_data_file_is_named_when_it_is_read",),
    ),
    Mutation(
        "commit_checks_files",
        "core/storage/artifact.py",
        "wrong = [entry.name for entry in listed if sizes.get(entry.name) != entry.bytes]",
        "wrong = [entry.name for entry in listed if entry.name not in sizes]",
        ("core/storage/test_store.py::test_a_missing_or_short_file_stops_the_commit",),
    ),
    Mutation(
        "receipt_counts_with_all_files",
        "core/storage/receipts.py",
        "if all(sizes.get(",
        "if any(sizes.get(",
        ("core/storage/test_store.py::test_a_receipt_counts_only_with_all_its_files",),
    ),
    Mutation(
        "fingerprint_ignores_the_order_of_keys",
        "core/storage/manifest.py",
        'sort_keys=True, separators=(",", ":")',
        'sort_keys=False, separators=(",", ":")',
        ("core/storage/test_store.py::test_equal_values_have_equal_fingerprints",),
    ),
    Mutation(
        "parquet_extension_types_are_refused",
        "core/storage/parquet.py",
        "any(trace in footer for trace in EXTENSION_TRACES)",
        "EXTENSION_KEY in footer",
        (
            "core/data/test_extension_types.py::test_an_extension_type_is_refused_before_it_is_built",
        ),
    ),
    Mutation(
        "files_are_written_whole",
        "core/storage/store.py",
        'temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"',
        "temporary = full",
        ("core/storage/test_store.py::test_a_write_that_fails_half_way_leaves_the_old_file",),
    ),
)

PIPELINE = (
    Mutation(
        "a_dry_run_passes_over_models_only_where_they_are_not_at_hand",
        "core/model/places.py",
        "if model.hub is not None:\n        return False",
        "if model.path is None:\n        return False",
        ("pipeline/test_estimate.py::test_a_dry_run_looks_at_the_models_that_are_at_hand",),
    ),
    Mutation(
        "a_dry_run_refuses_what_the_machine_cannot_hold",
        "pipeline/estimate.py",
        "placement.check_placement(node.request, node.at_once, hosts)",
        "pass",
        ("pipeline/test_estimate.py",),
    ),
    Mutation(
        "a_score_is_tried_on_the_steps_that_will_be_stored",
        "stages/subset/stage.py",
        "expressions.try_on(score, len(steps))",
        "expressions.try_on(score, 9)",
        ("pipeline/test_bad_input.py",),
    ),
    Mutation(
        "the_plan_counts_the_sample",
        "stages/clusters/stage.py",
        "section.k > facts.scored",
        "section.k > facts.rows",
        ("pipeline/test_small_data.py",),
    ),
    Mutation(
        "a_damaged_state_falls_back_to_the_one_before",
        "core/model/state.py",
        "if damage is None:",
        "if True:",
        ("core/model/test_state.py",),
    ),
    Mutation(
        "pruning_keeps_what_a_run_wants",
        "status.py",
        "for key in sorted(wanted):",
        "for key in ():",
        ("test_status.py",),
    ),
    Mutation(
        "no_access_is_not_tried_again",
        "edge/failures.py",
        "cause.errno in FULL | FORBIDDEN or",
        "cause.errno in FULL or",
        ("edge/test_failures.py",),
    ),
    Mutation(
        "yaml_is_not_deeper_than_a_config",
        "config/loading.py",
        "if self.level > MOST_LEVELS:",
        "if False:",
        ("config/test_config.py",),
    ),
    Mutation(
        "what_is_left_is_counted_host_by_host",
        "edge/packing.py",
        "np.minimum(fewest[number:]",
        "np.maximum(fewest[number:]",
        ("edge/test_packing.py",),
    ),
    Mutation(
        "names_of_others_are_no_markup",
        "display.py",
        "markup=False",
        "markup=True",
        ("test_display.py",),
    ),
    Mutation(
        "credentials_of_uris_are_left_out",
        "errors.py",
        'USER_AND_SECRET.sub("", text)',
        "text",
        ("test_display.py",),
    ),
    Mutation(
        "needs_are_made_first",
        "pipeline/task_graph.py",
        "if failed is None and missing.isdisjoint(own)",
        "if failed is None",
        ("pipeline/test_task_graph.py",),
    ),
    Mutation(
        "no_more_at_once",
        "pipeline/task_graph.py",
        "ready[: at_once - len(running)]",
        "ready[:at_once]",
        ("pipeline/test_task_graph.py",),
    ),
)

MUTATIONS = (
    *SELECTION,
    *TEXT,
    *MODEL,
    *TRAINING,
    *KMEANS,
    *DATA,
    *ROWS,
    *TEMPLATES,
    *REJECTS,
    *STORAGE,
    *PIPELINE,
)


def occurrences(mutation: Mutation) -> int:
    """How often the old text of a mutation occurs in its file."""
    return (ROOT / "s2l_ray" / mutation.file).read_text().count(mutation.old)


def is_killed(mutation: Mutation, copy: Path) -> bool:
    """Run the tests of a mutation on a copy of the checkout, which is as it was afterwards.

    Raises:
        RuntimeError: pytest could not run them, such as for a node id that is not there.
    """
    file = copy / "s2l_ray" / mutation.file
    before = file.read_text()
    file.write_text(before.replace(mutation.old, mutation.new))
    tests = [f"tests/unit/{path}" for path in mutation.tests]
    # Without files of bytecode: those of a change within a second could pass for the original's.
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(before)
    if ended.returncode not in (0, FAILED, INTERRUPTED):
        raise RuntimeError(f"pytest could not run {' '.join(tests)}:\n{ended.stdout}{ended.stderr}")
    return ended.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these mutations")
    parser.add_argument("--list", action="store_true", help="name the mutations and end")
    arguments = parser.parse_args()
    names = {mutation.name for mutation in MUTATIONS}
    if unknown := set(arguments.only or ()) - names:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if m.name in (arguments.only or names)]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:45} {mutation.file}")
        return 0
    results: list[tuple[Mutation, str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, copy / name)
        (copy / "conftest.py").write_text(CONFTEST)
        for mutation in chosen:
            began = time.perf_counter()
            if (count := occurrences(mutation)) != 1:
                result = f"OLD TEXT FOUND {count} TIMES"
            else:
                result = "killed" if is_killed(mutation, copy) else "SURVIVED"
            results.append((mutation, result, time.perf_counter() - began))
            print(f"{mutation.name}: {result} ({results[-1][2]:.1f} s)", flush=True)
    print()
    for mutation, result, seconds in results:
        print(f"{mutation.name:45} {mutation.file:35} {result:10} {seconds:6.1f} s")
    wrong = [mutation.name for mutation, result, _ in results if result != "killed"]
    print(f"{len(results) - len(wrong)} of {len(results)} killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

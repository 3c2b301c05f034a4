"""Applies one-line bugs, one at a time, and checks that the fast tests detect each: `make mutations`.

A pattern that does not match exactly once among its files is an error: adapt it to the changed code. Files are restored
afterwards, also after Ctrl-C. C++ code is left out, since each bug would need a build.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

ROOT = Path(__file__).parents[1]
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
# Imported once: the tests of each mutation run in a fork of this process, which must not import the package itself.
_STATUS = 10  # added to the status of pytest: a process that fails otherwise ends with 1
PRELOADED = ("torch", "scipy.stats", "h5py", "pytest", "pydantic")


class Mutation(NamedTuple):
    name: str
    files: str  # glob
    pattern: str  # regular expression
    replacement: str
    tests: str  # arguments of pytest; globs are expanded


MUTATIONS = [
    Mutation(
        "Triton search: counts of all tiles but the last are lost",
        "kernels/vq_assign/triton_forward.py",
        r"counts \+= tl\.load\(counts_out",
        "counts = counts + 0.0 * tl.load(counts_out",
        "tests/kernels/test_vq_assign_triton.py -k many_rows",
    ),
    Mutation(
        "Triton search: products of distances in plain TF32",
        "kernels/vq_assign/triton_forward.py",
        r'(tl\.trans\(e\), products, input_precision=)"tf32x3"',
        r'\1"tf32"',
        "tests/kernels/test_report.py",
    ),
    Mutation(
        "Triton segments: counts are read past the end of a small codebook",
        "kernels/_common/triton_code_sums.py",
        r"tl\.minimum\(first_k, K\)",
        "first_k",
        "tests/kernels/test_vq_assign_triton.py -k many_rows",
    ),
    Mutation(
        "Triton rotation: sign of the last term",
        "kernels/_common/triton_rotation.py",
        r"\+ along_target",
        "- along_target",
        "tests/kernels/test_vq_assign_triton.py -k gradients",
    ),
    Mutation(
        "Triton moving average: idle codes move",
        "kernels/ema_update/triton_update.py",
        r"n > idle_share \* total / K",
        "n >= 0.0 * idle_share",
        "tests/kernels/test_vq_assign_triton.py -k ema_update",
    ),
    Mutation(
        "Triton residual quantizer: gradient of the last stage only",
        "kernels/residual_vq/triton_backward.py",
        r"grad_x \+= tl\.where",
        "grad_x = tl.where",
        "tests/kernels/test_residual_vq_triton.py -k float64",
    ),
    Mutation(
        "Triton topographic loss: gradient without the correlation's second term",
        "kernels/topo_loss/triton_backward.py",
        r"\(x - pre \* z\)",
        "(x - pre * x)",
        "tests/kernels/test_*topo*.py -k row_counts",
    ),
    Mutation(
        "Triton grouped layers: gradient without the dropout scale",
        "kernels/*/triton*.py",
        r"== 0\.0, 0\.0, out \* scale\)",
        "== 0.0, 0.0, out)",
        "tests/kernels/test_grouped_mlp_triton.py -k gradients_of",
    ),
    Mutation(
        "Moving average: Laplace smoothing with one epsilon instead of K",
        "kernels/ema_update/reference.py",
        r"\(total \+ K \* epsilon\)",
        "(total + epsilon)",
        "tests/kernels/test_ema_update.py",
    ),
    Mutation(
        "Perplexity: logarithm of the counts instead of the shares",
        "kernels/ema_update/reference.py",
        r"xlogy\(share, share\)",
        "xlogy(share, counts)",
        "tests/kernels/test_ema_update.py",
    ),
    Mutation(
        "Loss: mean over all entries of the code similarity, the diagonal included",
        "kernels/code_cosines/reference.py",
        r"\(K \* \(K - 1\.0\)\)",
        "(K * K)",
        "tests/kernels/test_code_mlp.py",
    ),
    Mutation(
        "Loss: a term of weight 0 is kept",
        "spinlock_fast/models/losses.py",
        r"if weight != 0\.0\]",
        "]",
        "tests/models/test_losses.py",
    ),
    Mutation(
        "Metrics: reconstruction error per row instead of per value",
        "spinlock_fast/models/metric_sums.py",
        r'sums\["error"\] / \(N \* F\)',
        'sums["error"] / N',
        "tests/models/test_metrics.py",
    ),
    Mutation(
        "Cleaning: the less informative of two equal columns is kept",
        "spinlock_fast/features/cleaning.py",
        r"np\.argsort\(-score",
        "np.argsort(score",
        "tests/features/test_cleaning.py",
    ),
    Mutation(
        "Cleaning: clip bounds without mad_scale",
        "spinlock_fast/features/cleaning.py",
        r"config\.mad_threshold \* config\.mad_scale \* mad",
        "config.mad_threshold * mad",
        "tests/features/test_cleaning.py",
    ),
    Mutation(
        "Normalisation: inverse without the centre",
        "spinlock_fast/features/normalize.py",
        r"x \* self\.scale \+ self\.center",
        "x * self.scale",
        "tests/features/test_normalize.py",
    ),
    Mutation(
        "Training: warm-up starts with a learning rate of 0",
        "spinlock_fast/training/step.py",
        r"\(step \+ 1\) / warmup",
        "step / warmup",
        "tests/training/test_step.py",
    ),
    Mutation(
        "Training: the learning rate is fixed when a step is recorded",
        "spinlock_fast/training/optimizer.py",
        r"lr=self\.rate\b",
        "lr=float(self.rate)",
        "tests/training/test_step.py",
    ),
    Mutation(
        "Training: an epoch that is resumed draws another order of rows",
        "spinlock_fast/training/loop.py",
        r"self\.seed, epoch, self\.training\.row_order",
        "self.seed, epoch + self.step, self.training.row_order",
        "tests/training/test_interruptions.py",
    ),
    Mutation(
        "Checkpoints: the state before the last one is not kept",
        "spinlock_fast/checkpoints/resumable.py",
        r"if os\.path\.exists\(path\):\n",
        "if not os.path.exists(path):\n",
        "tests/checkpoints tests/training/test_interruptions.py",
    ),
    Mutation(
        "Files: permissions of a replaced file are lost",
        "spinlock_fast/output/atomic_files.py",
        r"\n        _(take|copy)_permissions\(temporary, target\)",
        "",
        "tests/output/test_atomic_files.py",
    ),
    Mutation(
        "Analysis: Wilson interval with half of its spread",
        "spinlock_fast/analysis/significance.py",
        r"\+ z \* z / 4\)",
        "+ z * z / 16)",
        "tests/analysis/test_significance.py",
    ),
    Mutation(
        "Simulation: noise without its variance normalised",
        "spinlock_fast/simulate/noise.py",
        r"\(amplitude / variance\.sqrt\(\)\)",
        "(amplitude / variance)",
        "tests/simulate/test_initial_and_noise.py",
    ),
    Mutation(
        "Drop-in: orthogonality without the diagonal of the identity",
        "spinlock_fast/dropin/losses.py",
        r"\(H \* K\*\*2\) - 1\.0 / K",
        "(H * K**2)",
        "tests/dropin/test_equality.py -k orthogonal",
    ),
    Mutation(
        "Joint search: the sums before the sweep",
        "kernels/joint_search/reference.py",
        r"\(sums - table\[codes",
        "(begin.sums - table[codes",
        "tests/kernels/test_joint_search.py -k coordinate_descent",
    ),
    Mutation(
        "Triton joint search: the hidden sums keep the replaced code",
        "kernels/joint_search/triton_forward.py",
        r"sums - before \+ after",
        "sums + after",
        "tests/kernels/test_joint_search_triton.py",
    ),
    Mutation(
        "Ranks: gradients and statistics are not summed",
        "spinlock_fast/training/distributed.py",
        r"self\.ranks\.sum_\(self\.buffer\)",
        "self.buffer.clone()",
        "tests/training/test_distributed.py -k train_what_one",
    ),
    Mutation(
        "Ranks: the commitment loss is not weighted by the rows of a rank",
        "spinlock_fast/training/distributed.py",
        r"weights\.vq \* fraction",
        "weights.vq",
        "tests/training/test_distributed.py -k train_what_one",
    ),
    Mutation(
        "Descriptors: sign of the velocity of one component",
        "spinlock_fast/descriptors/per_step.py",
        r"xx \* moment\[:, 1\] - xy",
        "xx * moment[:, 1] + xy",
        "tests/descriptors/test_per_step.py -k velocity",
    ),
    Mutation(
        "Ablation: differences of runs in their order instead of their seeds",
        "spinlock_fast/ablation/statistics.py",
        r"values\[seed\] - base\[seed\] for seed in sorted\(values\.keys\(\) & base\.keys\(\)\)",
        "a - b for a, b in zip(values.values(), base.values())",
        "tests/ablation/test_statistics.py",
    ),
    Mutation(
        "Prediction: log-loss of levels given the predicted tokens",
        "spinlock_fast/prediction/evaluation.py",
        r"predictor\.network\(\*inputs, true\.to\(greedy\.device\)\)",
        "predictor.network(*inputs)",
        "tests/prediction/test_predict.py -k references",
    ),
    Mutation(
        "Explorer: components of the map swapped",
        "spinlock_fast/report/explorer/rows.py",
        r"\[:, \[-1, -2\]\]",
        "[:, [-2, -1]]",
        "tests/report/test_explorer.py -k principal",
    ),
    Mutation(
        "Explorer: the farthest rows count as typical of a code",
        "spinlock_fast/report/explorer/rows.py",
        r"np\.lexsort\(\(distance, tokens\)\)",
        "np.lexsort((-distance, tokens))",
        "tests/report/test_explorer_rows.py -k ranks_of",
    ),
    Mutation(
        "Explorer: first and last states swapped",
        "spinlock_fast/report/explorer/fields.py",
        r"states\[0\], states\[-1\]",
        "states[-1], states[0]",
        "tests/report/test_explorer_fields.py -k states_of",
    ),
    Mutation(
        "Explorer: series of the wrong rows of the page",
        "spinlock_fast/report/explorer/series.py",
        r"observed\.rows\[rows\]",
        "rows",
        "tests/report/test_explorer_series.py -k equal_those",
    ),
    Mutation(
        "Explorer: the series that differ least are kept",
        "spinlock_fast/report/explorer/series.py",
        r"argsort\(-largest",
        "argsort(largest",
        "tests/report/test_explorer_series.py -k many_rows",
    ),
    Mutation(
        "Training curves: epochs after the resumed state are kept",
        "spinlock_fast/commands/scalars.py",
        r" if epoch <= last_epoch",
        "",
        "tests/commands/test_scalars.py -k resumed_state",
    ),
    Mutation(
        "Explorer: examples by their row in the file",
        "spinlock_fast/report/explorer/data.py",
        r"np\.searchsorted\(observed\.rows, table\[\"row\"\]\)",
        'table["row"]',
        "tests/report/test_explorer.py -k analyze",
    ),
    Mutation(
        "Behaviour loss: a target that is not finite is kept",
        "spinlock_fast/behaviour_loss.py",
        r"predicted\.finite & target\.finite",
        "predicted.finite",
        "tests/test_behaviour_loss.py -k not_finite",
    ),
    Mutation(
        "Behaviour loss: features that are not available count",
        "spinlock_fast/behaviour_loss.py",
        r"\(known / known\.sum\(\)\)",
        "(known / len(known))",
        "tests/test_behaviour_loss.py -k left_out",
    ),
]


def place_of(mutation: Mutation) -> tuple[Path, str]:
    """The file that a mutation changes, and its changed text; raises ValueError unless the pattern matches once."""
    found = []
    for path in sorted(ROOT.glob(mutation.files)):
        text, count = re.subn(mutation.pattern, mutation.replacement, path.read_text(encoding="utf-8"))
        found += [(path, text)] * count
    if len(found) != 1:
        raise ValueError(f"{mutation.name}: {mutation.pattern!r} matches {len(found)} times in {mutation.files}")
    return found[0]


@contextmanager
def applied(path: Path, text: str) -> Iterator[None]:
    """Replaces the text of a file within the block. Its modification time is restored too: .pyc files depend on it."""
    original, status = path.read_bytes(), path.stat()
    try:
        path.write_text(text, encoding="utf-8")
        yield
    finally:
        path.write_bytes(original)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def expand(arguments: str) -> list[str]:
    """The arguments, with each glob replaced by the files that it matches."""
    return [
        part
        for argument in arguments.split()
        for part in ([str(path) for path in sorted(ROOT.glob(argument))] if "*" in argument else [argument])
    ]


def is_detected(mutation: Mutation) -> bool:
    """Whether the tests of a mutation fail; raises RuntimeError if they do not run."""
    path, text = place_of(mutation)
    with applied(path, text):
        return not tests_pass(mutation.tests)


def tests_pass(tests: str) -> bool:
    """Whether tests pass; raises RuntimeError if they do not run."""
    with tempfile.TemporaryFile("w+") as output:
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests, output))
        process.start()
        process.join()
        status = (process.exitcode or 0) - _STATUS
        if status not in (0, 1):  # 1: tests failed
            output.seek(0)
            raise RuntimeError(f"{tests}: the process ended with {process.exitcode}: {output.read()[-3000:]}")
    return status == 0


def run_tests(tests: str, output: TextIO) -> NoReturn:
    """Runs pytest in this process and exits with its status plus `_STATUS`."""
    import pytest

    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(ROOT)
    sys.exit(_STATUS + int(pytest.main([*PYTEST, *expand(tests)])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name or files contain TEXT")
    parser.add_argument("--list", action="store_true", help="only check that every pattern matches once")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name + " " + mutation.files]
    for mutation in chosen:
        place_of(mutation)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in PRELOADED if not options.list else ():
        import_module(module)
    if not options.list and not tests_pass(chosen[0].tests):
        raise RuntimeError(f"{chosen[0].tests}: fails without a mutation")
    missed = []
    for mutation in [] if options.list else chosen:
        start = time.perf_counter()
        if not is_detected(mutation):
            missed.append(mutation.name)
        result = "missed" if mutation.name in missed else "detected"
        sys.stdout.write(f"{result} in {time.perf_counter() - start:.0f} s: {mutation.name}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} mutations, {len(missed)} missed\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

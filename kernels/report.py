"""Compiles every kernel without a GPU: `python -m spinlock_fast.kernels.report [--json FILE]`.

Each kernel is compiled ahead of time for sm_80, sm_90 and sm_100 in the configurations that training launches. The
table shows registers, shared memory, stack and local memory of the machine code, the number of matrix instructions,
and a lower bound of the time on an H100 from the bytes and operations. Exit status 1 if any kernel spills.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinlock_fast.kernels._compile_report.launch import KernelLaunch

CAPABILITIES = (80, 90, 100)
OPERATIONS = (
    "vq_assign",
    "residual_vq",
    "ema_update",
    "dead_codes",
    "augment",
    "adam",
    "topo_loss",
    "code_decoders",
    "grouped_mlp",
    "latent_projection",
    "joint_search",
)
# H100 SXM data sheet: bytes per second, operations per second.
_MEMORY, _FLOAT32, _TF32 = 3.35e12, 67e12, 495e12


def launches(capability: int) -> list[KernelLaunch]:
    """The launches of all operations on a device of that compute capability."""
    all_launches: list[KernelLaunch] = []
    for name in OPERATIONS:
        all_launches += importlib.import_module(f"spinlock_fast.kernels._compile_report.{name}").launches(capability)
    return all_launches


def compile_launch(launch: KernelLaunch, capability: int) -> dict[str, Any]:
    """Resources of the machine code, and the precision of its matrix products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=launch.kernel, signature=launch.signature(), constexprs=launch.constants)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    precisions = sorted(set(re.findall(r"inputPrecision = (\w+)", compiled.asm["ttir"])))
    instructions = re.findall(
        r"^\s*(?:@\S+\s+)?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*)", compiled.asm["ptx"], re.M
    )
    return {
        "kernel": launch.name,
        "shape": launch.shape,
        "constants": launch.constants,
        "capability": capability,
        "num_warps": launch.num_warps,
        "shared": compiled.metadata.shared,
        "dots": compiled.asm["ttir"].count("tt.dot "),
        "precisions": precisions,
        "matrix_instructions": len(instructions),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]}


def least_microseconds(launch: KernelLaunch) -> float:
    """Lower bound of the time on an H100: the larger of memory traffic and arithmetic."""
    arithmetic = launch.float_ops / _FLOAT32 + launch.passes * launch.dot_ops / _TF32
    return 1e6 * max(launch.num_bytes / _MEMORY, arithmetic)


def first_launches(capability: int) -> list[KernelLaunch]:
    """One launch per kernel: the first of `launches`."""
    return list({launch.name: launch for launch in reversed(launches(capability))}.values())


def rows(capabilities: Sequence[int] = CAPABILITIES, *, quick: bool = False) -> list[dict[str, Any]]:
    """A row of the report per launch, or with `quick` per kernel, and compute capability."""
    selected = first_launches if quick else launches
    return [
        {
            **compile_launch(launch, capability),
            "bytes": launch.num_bytes,
            "float_ops": launch.float_ops,
            "dot_ops": launch.dot_ops,
            "h100_least_us": least_microseconds(launch),
        }
        for capability in capabilities
        for launch in selected(capability)
    ]


def spills(row: dict[str, Any]) -> bool:
    return bool(row["stack"] or row["local"])


def _print_table(report_rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels, compiled ahead of time")
    numbers = ["sm", "warps", "regs", "shared", "stack", "local", "MMA", "bytes", "Mflop", "least us, H100"]
    for column in ["kernel", "shape"]:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    for row in report_rows:
        operations = (row["float_ops"] + row["dot_ops"]) / 1e6
        values = [row["capability"], row["num_warps"], row["registers"], row["shared"], row["stack"], row["local"]]
        values += [row["matrix_instructions"], f"{row['bytes']:,}", f"{operations:,.1f}", f"{row['h100_least_us']:.2f}"]
        table.add_row(row["kernel"], row["shape"], *map(str, values), style="red" if spills(row) else None)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spinlock_fast.kernels.report", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument(
        "--capability", type=int, action="append", help="80, 90 or 100, may be repeated; default: all three"
    )
    parser.add_argument("--quick", action="store_true", help="compile one launch per kernel instead of all")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels that are interpreted cannot be compiled")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default; setting it avoids a warning
    report_rows = rows(options.capability or CAPABILITIES, quick=options.quick)
    _print_table(report_rows)
    if options.json:
        Path(options.json).write_text(json.dumps(report_rows, indent=1) + "\n")
    return int(any(spills(row) for row in report_rows))


if __name__ == "__main__":
    sys.exit(main())

"""What the compiler makes of every kernel, without a GPU: `python -m spinlock_fast.kernels.report [--json FILE]`.

Each kernel is compiled ahead of time in the configurations that are launched, for sm_80, sm_90 and sm_100. The table
shows registers, shared memory, stack and local memory as the machine code states them, matrix instructions, and the
least time on an H100 by the bytes and operations counted. Exit status 1 where anything spills.
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

from spinlock_fast.kernels._triton.specimen import Specimen

CAPABILITIES = (80, 90, 100)
MODULES = (
    "vq_assign.triton_forward",
    "vq_assign.triton_streaming",
    "residual_vq.triton_forward",
    "ema_update.triton_update",
    "augment.triton",
    "adam.triton",
    "topo_loss.triton",
    "topo_loss.pull",
    "code_decoders.triton",
    "grouped_mlp.triton",
    "grouped_mlp.projection",
)
# Figures of the H100 SXM data sheet: bytes and operations a second.
_MEMORY, _FLOAT32, _TF32 = 3.35e12, 67e12, 495e12


def specimens(capability: int) -> list[Specimen]:
    """Every kernel at the shapes that it is launched at, on a device of that compute capability."""
    found: list[Specimen] = []
    for name in MODULES:
        found += importlib.import_module(f"spinlock_fast.kernels.{name}").specimens(capability)
    return found


def compiled(specimen: Specimen, capability: int) -> dict[str, Any]:
    """Resources of the machine code, and how matrix products are computed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=specimen.kernel, signature=specimen.signature(), constexprs=specimen.constants)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    precisions = sorted(set(re.findall(r"inputPrecision = (\w+)", made.asm["ttir"])))
    instructions = re.findall(
        r"^\s*(?:@\S+\s+)?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*)", made.asm["ptx"], re.M
    )
    return {
        "kernel": specimen.name,
        "shape": specimen.shape,
        "constants": specimen.constants,
        "capability": capability,
        "num_warps": specimen.num_warps,
        "shared": made.metadata.shared,
        "dots": made.asm["ttir"].count("tt.dot "),
        "precisions": precisions,
        "matrix_instructions": len(instructions),
        **_resources(made.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]}


def least_microseconds(specimen: Specimen) -> float:
    """The larger of the times that bytes and operations take on an H100."""
    arithmetic = specimen.float_ops / _FLOAT32 + specimen.passes * specimen.dot_ops / _TF32
    return 1e6 * max(specimen.num_bytes / _MEMORY, arithmetic)


def rows(capabilities: Sequence[int] = CAPABILITIES) -> list[dict[str, Any]]:
    """Every specimen on every device."""
    found = []
    for capability in capabilities:
        for specimen in specimens(capability):
            counted = {
                "bytes": specimen.num_bytes,
                "float_ops": specimen.float_ops,
                "dot_ops": specimen.dot_ops,
                "h100_least_us": least_microseconds(specimen),
            }
            found.append({**compiled(specimen, capability), **counted})
    return found


def spills(row: dict[str, Any]) -> bool:
    return bool(row["stack"] or row["local"])


def _show(found: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels, compiled ahead of time")
    numbers = ["sm", "warps", "regs", "shared", "stack", "local", "MMA", "bytes", "Mflop", "least us, H100"]
    for column in ["kernel", "shape"]:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    for row in found:
        operations = (row["float_ops"] + row["dot_ops"]) / 1e6
        values = [row["capability"], row["num_warps"], row["registers"], row["shared"], row["stack"], row["local"]]
        values += [row["matrix_instructions"], f"{row['bytes']:,}", f"{operations:,.1f}", f"{row['h100_least_us']:.2f}"]
        table.add_row(row["kernel"], row["shape"], *map(str, values), style="red" if spills(row) else None)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spinlock_fast.kernels.report", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--capability", type=int, action="append", help="one of 80, 90, 100; all of them without it")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway, without its warning
    found = rows(options.capability or CAPABILITIES)
    _show(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(spills(row) for row in found))


if __name__ == "__main__":
    sys.exit(main())

"""Times training steps of quantizer layers beside those of vector-quantize-pytorch, where it is installed.

    python -m benchmarks.kernels.layer_times --output layers.json

Codes are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.common.quantizer_layers import (
    LARGE,
    SHAPES,
    check_same_codes,
    grouped_quantizer,
    peer_quantizers,
    quantizer_step,
    random_inputs,
)
from benchmarks.common.timing import peak_memory, time_calls, write

warnings.filterwarnings("ignore")  # of other packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for shape in ("seed", *(LARGE if device.type == "cuda" else ("medium",))):
        z, codes = random_inputs(*SHAPES[shape], device)
        expected = grouped_quantizer(codes).eval()(z)[1]
        layers: list[tuple[str, Any]] = [("spinlock-fast", grouped_quantizer(codes))]
        if shape != "tall" and device.type == "cuda":
            layers.append(("spinlock-fast, reference", grouped_quantizer(codes, "reference")))
        layers += list(peer_quantizers(codes))
        for name, layer in layers:
            step = partial(quantizer_step, layer, z)
            try:
                check_same_codes(expected, layer(z)[1])
                times = time_calls(step, device)
                memory = {"peak_bytes": peak_memory(step)} if z.is_cuda else {}
                rows.append({"shape": shape, "layer": name, **times, **memory})
                line = f"{shape:6} {name:28} {times['p50_us']:12.1f} us {memory.get('peak_bytes', 0) / 2**20:10.1f} MiB"
            except torch.OutOfMemoryError:
                rows.append({"shape": shape, "layer": name, "error": "out of memory"})
                line = f"{shape:6} {name:28} out of memory"
            print(line, flush=True)
            write(arguments.output, rows)


if __name__ == "__main__":
    main()

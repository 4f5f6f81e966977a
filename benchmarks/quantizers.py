"""What the scale search gains: squared error on Gaussian weights, against absmax scales in the same format.

`python -m benchmarks.quantizers` prints one JSON object: the change in percent on 2^20 samples of a fixed seed.
What quantizing costs in time is a row of `qlora bench kernels`.
"""

import json

import torch

import nf4
from benchmarks.provenance import provenance

SAMPLES = 2**20


def main() -> None:
    gains = {
        f"search_block_{size}{'_double_quant' if double else ''}_percent": gain(size, double)
        for size in (32, 64, 128, 4096)
        for double in (False, True)
    }
    bits = nf4.quantize(torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))).bits_per_weight
    print(json.dumps({**gains, "bits_per_weight": bits, **provenance("cpu")}, indent=1))


def gain(block_size: int, double_quant: bool) -> float:
    """Change of the squared error by the search, in percent of that of absmax scales."""
    weight = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))
    errors = [
        nf4.error(weight, nf4.quantize(weight, nf4.QuantConfig("nf4", block_size, double_quant, 256, scale))).mse
        for scale in ("absmax", "search")
    ]
    return round(100 * (errors[1] / errors[0] - 1), 2)


if __name__ == "__main__":
    main()

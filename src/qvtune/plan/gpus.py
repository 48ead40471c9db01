"""What is known of the GPUs that are rented: numbers of their makers' data sheets."""

from dataclasses import dataclass

from qvtune.config.zero_stage import GIB

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory: bytes that torch reports as total memory, rounded down to GiB.
        tflops: dense bfloat16 matrix products, 1e12 FLOP/s; data sheets also give twice as much, with sparsity.
        memory_bandwidth: 1e9 bytes/s.
        link: to the other GPUs of the node, in one direction, 1e9 bytes/s; data sheets give the sum of both.
        nic: network of one GPU where a node has one adapter per GPU, in one direction, 1e9 bytes/s.
        source: where the numbers are from.
    """

    memory: int
    tflops: float
    memory_bandwidth: float
    link: float
    nic: float
    source: str


_H100 = "NVIDIA H100 data sheet; DGX H100: 8 adapters of 400 Gbit/s"
_A100 = "NVIDIA A100 data sheet; DGX A100: 8 adapters of 200 Gbit/s"
GPUS = {
    "h100-80": Gpu(79 * GIB, 989, 3350, 450, 50, _H100),
    "h100-pcie-80": Gpu(79 * GIB, 756, 2000, 64, 25, "NVIDIA H100 data sheet (PCIe 5.0 x16); 200 Gbit/s assumed"),
    "h200": Gpu(139 * GIB, 989, 4800, 450, 50, "NVIDIA H200 data sheet; network as DGX H100"),
    "b200": Gpu(178 * GIB, 2250, 8000, 900, 50, "NVIDIA DGX B200 data sheet: a GPU's share; 400 Gbit/s adapters"),
    "a100-80": Gpu(79 * GIB, 312, 2039, 300, 25, _A100),
    "a100-40": Gpu(39 * GIB, 312, 1555, 300, 25, _A100),
    "l40s": Gpu(44 * GIB, 362, 864, 32, 25, "NVIDIA L40S data sheet (PCIe 4.0 x16); 200 Gbit/s assumed"),
    "rtx-4090": Gpu(23 * GIB, 165, 1008, 32, 1.25, "NVIDIA Ada GPU architecture paper; 10 Gbit/s assumed"),
}

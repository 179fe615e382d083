//! What the node has: GPUs by NVML, or a simulated set.

"""The mathematics in plain PyTorch: the specification, the CPU path, and the oracle in float64."""

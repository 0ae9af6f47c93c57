"""One sequence over many devices, by ``torch.distributed``."""

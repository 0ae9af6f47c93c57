"""How Senri is trained: samples, optimiser groups, and transformers' Trainer."""

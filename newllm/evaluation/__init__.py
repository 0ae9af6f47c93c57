"""Measurements of trained models: recall of passkeys, perplexity by position, and their pictures."""

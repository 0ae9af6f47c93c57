"""Tests of recall as prompts: what is hidden, how it is asked for, and what the answer is, to the token."""

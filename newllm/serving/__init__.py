"""A server of sessions: one model, many conversations, each a state of constant size kept by its id."""

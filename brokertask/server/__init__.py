"""The server: what needs a memory across runs. It talks to the others through the broker alone."""

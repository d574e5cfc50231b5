"""The peers: tiny programs with the same task, run in an environment of their own."""

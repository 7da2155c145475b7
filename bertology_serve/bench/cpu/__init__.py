"""``bench cpu``: this package beside what else runs an encoder on a CPU, each contender in a process of its own."""

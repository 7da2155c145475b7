"""One set of deltas on several servers: which of them answers for which delta, and a router that sends calls there."""

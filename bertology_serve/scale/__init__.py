"""One set of deltas on several servers: which answers for which delta, a router that sends calls there, a planner."""

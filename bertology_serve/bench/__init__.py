"""What measures the rest: ``bench`` and ``prove``, with their commands. Nothing imports it."""

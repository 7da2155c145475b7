"""What measures the rest: ``bench`` and ``prove``. Nothing but the command line imports it."""

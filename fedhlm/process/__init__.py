"""What every service does with its process: start, stop, notify, keep state."""

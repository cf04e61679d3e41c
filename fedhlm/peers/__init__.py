"""What agents of a cluster tell each other: context keys, neighbours, and when asking pays."""

"""Studies on the simulator and on the shipped pair."""

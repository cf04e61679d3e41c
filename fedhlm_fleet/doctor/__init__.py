"""What is wrong with a part where it stands, and what to do about it: `fedhlm doctor`."""

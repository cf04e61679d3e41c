"""`fedhlm doctor`: find problems of a part on its machine, and say how to fix them."""

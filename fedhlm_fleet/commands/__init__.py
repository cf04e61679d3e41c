"""The groups of the `fedhlm` command; each module holds one App."""

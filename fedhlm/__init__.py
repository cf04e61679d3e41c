"""fedhlm ground floor."""

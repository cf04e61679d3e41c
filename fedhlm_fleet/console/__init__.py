"""The live console: what a fleet's messages tell, as the state of one page."""

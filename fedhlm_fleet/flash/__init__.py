"""Set-up of devices: SD cards that boot into a running agent without internet, and running machines over ssh."""

"""Devices made ready: cards that boot into a running agent without internet, and machines provisioned over ssh."""

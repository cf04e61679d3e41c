"""Collaboration of peers: context keys, verified neighbours, and the decision whether to ask peers."""

"""Nipype workflows; this folder installs as ``bids_jointseg.workflows``."""

"""Deployable worker apps, written with brokertask's public names only."""

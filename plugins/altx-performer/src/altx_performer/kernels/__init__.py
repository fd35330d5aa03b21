"""Ops of this plugin."""

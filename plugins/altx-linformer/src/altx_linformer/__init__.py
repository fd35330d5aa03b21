"""Linformer attention for altx."""
